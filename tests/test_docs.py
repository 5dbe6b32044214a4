"""The documents are true: their blocks run, their commands and options exist, their links lead somewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from documents import COMMANDS, anchors, blocks, commands, documents, links, prose, run_block, workplace
from running import REPOSITORY, daemon
from tta_adapters.methods import METHODS, options_of
from tta_cloud.cli import app as cloud
from tta_edge.cli import app as edge
from tta_exporters.cli import app as exporter

APPS = dict(zip(COMMANDS, (edge, exporter, cloud), strict=True))
README = REPOSITORY / "README.md"
RUNNABLE = [block for document in documents() for block in blocks(document) if block.mark == "run"]
MARKS = {"", "run", "example", "terminal-1", "terminal-2", "terminal-3", "cloud-1", "cloud-2"}


def subcommands():
    """(command, subcommand) -> its click form."""
    found = {}
    for name, app in APPS.items():
        group = typer.main.get_command(app)
        found |= {(name, sub): command for sub, command in group.commands.items()}
    return found


def ids(items):
    return [str(item) for item in items]


# --- blocks -----------------------------------------------------------------------------------------


def by_document():
    groups = defaultdict(list)
    for block in RUNNABLE:
        groups[block.document].append(block)
    return groups


@pytest.mark.parametrize(
    "document", by_document(), ids=[str(path.relative_to(REPOSITORY)) for path in by_document()]
)
def test_the_runnable_blocks_of_a_document_run_in_order(document, tmp_path):
    folder = workplace(tmp_path)
    for block in by_document()[document]:
        result = run_block(block, folder)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


def test_the_readme_shows_something_runnable_of_each_kind():
    kinds = {block.language for block in RUNNABLE if block.document == README}
    assert kinds == {"bash", "python"}


def test_a_failing_block_is_noticed(tmp_path):
    (first, *_) = RUNNABLE
    folder = workplace(tmp_path)
    wrong_option = replace(first, language="bash", text="tta-edge evaluate --no-such-option\ntrue\n")
    assert run_block(wrong_option, folder).returncode == 2
    assert run_block(replace(first, language="python", text="raise SystemExit(3)"), folder).returncode == 3


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_blocks_are_marked_with_known_marks_only(document):
    for block in blocks(document):
        assert block.mark in MARKS, f"{block}: unknown mark {block.mark!r}"


def test_the_three_terminals_of_the_readme(tmp_path):
    found = {block.mark: block for block in blocks(README) if block.mark.startswith("terminal-")}
    serve = found["terminal-1"].text.split()
    assert serve[:2] == ["tta-edge", "serve"]
    place = serve[serve.index("--bind") + 1]
    assert place == "tcp://127.0.0.1:5555"
    rest = [word for word in serve[2:] if word not in ("--bind", place)]
    with daemon(*rest) as served:
        assert served.endpoint, served.log
        for mark in ("terminal-2", "terminal-3"):
            assert place in found[mark].text
            # The README's port may be taken on this machine; the daemon under test has a free one.
            elsewhere = replace(found[mark], text=found[mark].text.replace(place, served.endpoint))
            result = run_block(elsewhere, workplace(_sub(tmp_path, mark)))
            assert result.returncode == 0, f"{found[mark]}\n{result.stdout}\n{result.stderr}"
        assert served.stop() == 0


def _sub(folder, name):
    (folder / name).mkdir()
    return folder / name


# --- commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_describes_itself(name):
    result = CliRunner().invoke(APPS[name], ["--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("name", "sub"), subcommands(), ids=lambda part: part)
def test_every_subcommand_has_help_with_an_example_and_stands_in_a_document(name, sub):
    result = CliRunner().invoke(APPS[name], [sub, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"Example: {name} {sub}" in " ".join(result.output.split())
    named = [command for document in documents() for command in commands(document)]
    assert any(command.words[:2] == (name, sub) for command in named), f"no document shows `{name} {sub}`"


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_command_line_of_a_document_exists_with_its_options(document):
    known = subcommands()
    for command in commands(document):
        name, *rest = command.words
        if not rest or rest[0].startswith("-"):
            assert set(rest) <= {"--help", "--version"}, f"{command.where}: {' '.join(command.words)}"
            continue
        assert (name, rest[0]) in known, f"{command.where}: there is no `{name} {rest[0]}`"
        form = known[name, rest[0]]
        if hasattr(form, "commands") and rest[1:]:  # a command of commands: `config show`
            assert rest[1] in form.commands, f"{command.where}: there is no `{name} {rest[0]} {rest[1]}`"
            form = form.commands[rest[1]]
        options = {text for each in form.params for text in (*each.opts, *each.secondary_opts)} | {"--help"}
        for word in rest[1:]:
            if re.match(r"--?[A-Za-z]", word):
                assert word.split("=")[0] in options, (
                    f"{command.where}: `{name} {rest[0]}` has no option {word}"
                )


def test_every_make_target_of_a_document_exists():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    for document in documents():
        inline = re.findall(r"`make ([a-z-]+)`", prose(document))
        shell = [
            word
            for block in blocks(document)
            if block.language == "bash"
            for word in re.findall(r"^make ([a-z-]+)", block.text, re.M)
        ]
        assert {*inline, *shell} <= targets, document


def test_every_option_of_export_build_is_documented():
    page = (REPOSITORY / "docs" / "export.md").read_text()
    for parameter in subcommands()["tta-export", "build"].params:
        options = [text for text in parameter.opts if text.startswith("-") and text != "--help"]
        assert not options or any(text in page for text in options), f"docs/export.md lacks {options}"


def test_every_method_is_documented_with_its_options_and_settings():
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    for name in METHODS:
        assert f"### {name}\n" in page, f"docs/methods.md has no section {name}"
        section = page.split(f"### {name}\n")[1].split("\n### ")[0]
        for option in options_of(name):
            assert f"`{option}`" in section, f"docs/methods.md, {name}: no option {option}"


# --- links ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(document):
    for target in links(document):
        path, _, fragment = target.partition("#")
        place = (document.parent / path).resolve() if path else document
        assert place.is_relative_to(REPOSITORY), f"{target} leads out of the repository"
        assert place.exists(), f"{target} does not exist"
        if fragment:
            assert fragment in anchors(place), f"{target}: {place.name} has no such heading"
