"""docs/operations.md: its commands work on a running daemon, its tables list every code there is."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import get_args

import pytest

from documents import blocks, run_block, shell_lines, workplace
from running import REPOSITORY, daemon
from tta_edge import errors
from tta_edge.config import Config
from tta_edge.events import Reason
from tta_edge.policy import Kind
from tta_runtime import errors as runtime_errors

PAGE = REPOSITORY / "docs" / "operations.md"
BIND, HTTP = "tcp://127.0.0.1:5555", "http://127.0.0.1:5556"
NEVER_FOUND = {"state", "state-missing", "state-unwritable"}
"""Codes of state errors that put no file aside: the family's own, no file at all, and writing."""


def table_below(heading):
    """The rows of the first table below a heading, without its head."""
    _, found, rest = PAGE.read_text().partition(f"# {heading}\n")
    assert found, heading
    lines = iter(rest.splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def codes(rows):
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row[0])]


def family(module, base):
    """The codes of an error class and of all below it."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)]
    return {kind.code for kind in kinds}


# --- commands -----------------------------------------------------------------------------------------


def test_the_commands_of_the_page_work_on_the_daemon_of_the_page(tmp_path):
    found = blocks(PAGE)
    (serve,) = [block for block in found if block.mark == "terminal-1"]
    words = serve.text.split()
    assert words == f"tta-edge serve --bind {BIND} --http {HTTP[7:]} --state-dir state".split()
    folder = workplace(tmp_path)
    # The page's ports may be taken on this machine; the daemon under test has free ones.
    with daemon("--state-dir", folder / "state", TTA_HTTP="127.0.0.1:0") as served:
        http = http_of(served)
        ran = 0
        for block in (block for block in found if block.mark == "terminal-2"):
            assert all(BIND in line or HTTP in line for line in shell_lines(block.text))
            if "curl" in block.text and shutil.which("curl") is None:
                continue
            there = replace(block, text=block.text.replace(BIND, served.endpoint).replace(HTTP, http))
            result = run_block(there, folder)
            assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
            ran += 1
        assert ran >= 4
        assert served.stop() == 0
    assert (folder / "state" / "switch.json").exists()
    assert (folder / "state" / "events.jsonl").exists()


def http_of(served):
    """Where the daemon's HTTP server listens, as its log says."""
    (found,) = re.findall(r"metrics and health at (http://\S+)", "\n".join(served.log))
    return found


def test_the_setting_that_the_page_shows_in_prose_exists():
    text = PAGE.read_text()
    prefix = {name.upper() for name in Config.__struct_fields__}
    assert set(re.findall(r"`TTA_(\w+)`", text)) <= prefix


# --- tables -------------------------------------------------------------------------------------------


def test_every_reason_is_in_the_table_and_no_other():
    found = codes(table_below("Reasons"))
    stored = family(runtime_errors, runtime_errors.StateError) - NEVER_FOUND
    assert len(set(found)) == len(found)
    assert set(found) == {reason.value for reason in Reason} | stored


def test_every_row_of_the_reasons_names_actions_that_exist():
    source = (REPOSITORY / "edge" / "tta_edge" / "events.py").read_text()
    actions = set(re.findall(r"`(\w+)`", source.partition("action: ")[2].partition("reason: ")[0]))
    assert len(actions) > 8
    shown = {action for row in table_below("Reasons") for action in row[1].split(", ")}
    assert shown == actions


def test_every_code_of_a_refused_request_is_in_the_table():
    inputs = {
        runtime_errors.WrongShape,
        runtime_errors.WrongDtype,
        runtime_errors.NonFinite,
        runtime_errors.EmptyBatch,
        runtime_errors.TooLarge,
        runtime_errors.InvalidUtf8,
        runtime_errors.EmptyText,
        runtime_errors.ContextTooLong,
        runtime_errors.UnknownToken,
        runtime_errors.BadSampling,
        runtime_errors.WrongTask,
        runtime_errors.AbsorbUnsupported,
        runtime_errors.NonFiniteLogits,
    }
    expected = family(runtime_errors, runtime_errors.WireError) | family(errors, errors.ServiceError)
    expected |= {kind.code for kind in inputs} | {"engine-failed", "slow-reader", "client-gone"}
    assert set(codes(table_below("Requests are refused"))) == expected - {"wire", "service"}


def test_every_policy_is_in_the_table():
    assert tuple(codes(table_below("When a stream adapts"))) == get_args(Kind)


@pytest.mark.parametrize("name", ["edge.toml", "tta-edge.service", "Containerfile"])
def test_the_page_tells_of_every_file_to_install(name):
    assert f"(../deploy/{name})" in PAGE.read_text()


def test_the_page_names_only_settings_that_exist():
    text = PAGE.read_text()
    known = set(Config.__struct_fields__)
    named = set(
        re.findall(r"`((?:max|min|every|inline|step|batch|reset|drain|state|checkpoint|allow)_\w+)`", text)
    )
    assert len(named) > 12
    assert named <= known | {"retry_after_s"}
