"""The cloud's Prometheus text: names, values, documents, dashboard and alerts, and a service that is scraped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml
import zmq
from prometheus_client.parser import text_string_to_metric_families

import exported
from cloud_records import EDGE, Kept, patch
from cloud_server import METHODS, images, serving, ticket
from documents import anchors
from running import PATIENCE_S, REPOSITORY, running
from serving import until
from tta_cloud import agreement, edges, identity, ledger, samples, steering, watching
from tta_cloud.config import Config, resolve
from tta_cloud.metrics import METRICS, Group, Moment, exposition, table
from tta_cloud.stats import Stats
from tta_cloud.watching import STALLED_S, Watching
from tta_edge.client import Client
from tta_edge.enrol import enrol
from tta_runtime.errors import AddressInUse, BadEndpoint, RemoteBindRefused
from tta_runtime.histogram import BOUNDS_S

DEPLOY = REPOSITORY / "deploy"
Labels = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported.built("resnet", METHODS).path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    identity.create(tmp_path / "cloud")
    return tmp_path / "cloud"


def parsed(text: str) -> dict[tuple[str, Labels], float]:
    """(sample name, labels) -> value, as Prometheus' own parser reads it; none occurs twice."""
    found: dict[tuple[str, Labels], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} occurs twice"
            found[key] = sample.value
    return found


def value(found: dict[tuple[str, Labels], float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def busy() -> Moment:
    """A bit of everything."""
    stats = Stats()
    stats.came("yard", "stored", 100)
    stats.came("yard", "redundant")
    stats.refused("busy")
    stats.shut_out("edges", "the key is not enrolled")
    stats.told(3)
    stats.handed_out()
    stats.learned("yard", "learned", 0.3)
    stats.judged("yard", "lost")
    stats.moved("yard", "canary")
    stats.committed(0.004)
    stats.now({"yard": 2}, {"yard": "canary"})
    groups = {"yard": Group(10, 4, 1000, 1, 7, True, 30, 40), "gate": Group()}
    return Moment("1.2.3", 5.5, 1 << 20, 4096, groups, stats.figures())


# --- names and values -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_follows_the_conventions(metric: Any) -> None:
    assert re.fullmatch(r"tta_cloud_[a-z][a-z0-9_]*[a-z0-9]", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert metric.meaning.endswith(".")
    assert not {"\n", "|"} & set(metric.meaning)
    assert set(metric.labels).isdisjoint({"edge", "key", "stream", "sample", "le"})


def test_every_definition_is_in_a_scrape_with_its_type_meaning_and_labels() -> None:
    text = exposition(busy()).decode()
    found = parsed(text)
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}\n" in text
        assert f"# HELP {metric.name} {metric.meaning}\n" in text
        name = metric.name if metric.kind != "histogram" else f"{metric.name}_count"
        labels = [dict(labels) for each, labels in found if each == name]
        assert labels, metric.name
        assert all(set(each) == set(metric.labels) for each in labels), metric.name
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert families == [metric.name for metric in METRICS]


def test_the_figures_are_those_that_were_counted() -> None:
    found = parsed(exposition(busy()).decode())
    for name, labels, expected in (
        ("edges_online", {"group": "yard"}, 2),
        ("edges_online", {"group": "gate"}, 0),
        ("samples_total", {"group": "yard", "outcome": "stored"}, 1),
        ("samples_total", {"group": "yard", "outcome": "redundant"}, 1),
        ("samples_total", {"group": "gate", "outcome": "quota"}, 0),
        ("sample_bytes_total", {"group": "yard"}, 100),
        ("store_samples", {"group": "yard"}, 10),
        ("store_waiting_samples", {"group": "yard"}, 4),
        ("store_sample_bytes", {"group": "yard"}, 1000),
        ("store_bytes", {}, 4096),
        ("rounds_total", {"group": "yard", "result": "learned"}, 1),
        ("rounds_total", {"group": "yard", "result": "refused"}, 0),
        ("gate_verdicts_total", {"group": "yard", "verdict": "lost"}, 1),
        ("gate_verdicts_total", {"group": "yard", "verdict": "passed"}, 0),
        ("patches_total", {"group": "yard", "state": "canary"}, 1),
        ("patch_seq", {"group": "yard"}, 7),
        ("patch_pinned", {"group": "yard"}, 1),
        ("rollout_stage", {"group": "yard", "stage": "canary"}, 1),
        ("rollout_stage", {"group": "yard", "stage": "group"}, 0),
        ("agreement_ratio", {"group": "yard"}, 0.75),
        ("heads_sent_total", {}, 3),
        ("patches_sent_total", {}, 1),
        ("messages_refused_total", {"code": "busy"}, 1),
        ("connections_refused_total", {"domain": "edges", "reason": "the key is not enrolled"}, 1),
        ("round_seconds_count", {"group": "yard"}, 1),
        ("store_commit_seconds_count", {}, 1),
    ):  # fmt: skip
        assert value(found, f"tta_cloud_{name}", **labels) == expected, (name, labels)
    assert ("tta_cloud_agreement_ratio", (("group", "gate"),)) not in found, "nothing was compared there"
    for bound in BOUNDS_S:
        assert value(found, "tta_cloud_store_commit_seconds_bucket", le=str(bound)) == (bound >= 0.004)


def test_a_group_may_have_any_name_that_a_label_must_escape() -> None:
    stats = Stats()
    stats.refused('a "quoted"\nline\\')
    text = exposition(Moment("1", 0, 0, 0, {}, stats.figures())).decode()
    assert value(parsed(text), "tta_cloud_messages_refused_total", code='a "quoted"\nline\\') == 1


def test_the_page_holds_the_table_of_the_definitions() -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    _, begin, rest = page.partition("<!-- cloud-metrics -->\n\n")
    written, end, _ = rest.partition("\n\n<!-- end:cloud-metrics -->")
    assert begin
    assert end
    assert written == table(), "make the table in docs/metrics.md again; the page says how"


# --- what the store has ---------------------------------------------------------------------------


def test_the_store_is_counted_by_group(tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.insert(1, 2, 3, group="yard")
        kept.call(samples.mark_used("yard", [kept.unused(1, "yard")[0]], 1))
        kept.call(edges.register(EDGE, "camera", "gate", now_ms=1))
        kept.call(edges.activate(EDGE))
        kept.call(agreement.note({EDGE: [True, False, True, True]}, 1))
        kept.call(ledger.append(patch(1, "yard")))
        kept.call(steering.pin("yard", 1, 1, ""))
        found = kept.read(watching.look)
        assert found == {
            "gate": Group(agreed=3, compared=4),
            "yard": Group(samples=3, unused=2, bytes=3 * 48, epoch=1, seq=1, pinned=True),
        }
        assert watching.store_bytes(kept.store.path) > 3 * 48


def test_progress_is_told_from_a_stall(tmp_path: Path) -> None:
    now = [100.0]
    with Kept(tmp_path / "data") as kept:
        watched = Watching(Stats(), kept.store, lambda: 100.0, lambda: True, clock=lambda: now[0])
        assert watched.alive()
        now[0] += STALLED_S
        assert not watched.alive()
        kept.store.close()
        text = watched.exposition().decode()  # a store that is closed leaves out what it holds
        assert value(parsed(text), "tta_cloud_uptime_seconds") == STALLED_S


# --- a service ------------------------------------------------------------------------------------


def test_a_service_is_scraped_while_an_edge_is_taught(store: Path, bundle: Path, tmp_path: Path) -> None:
    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a"), "probation_samples": 16}
    with serving(store, bundle, http="127.0.0.1:0") as server:

        def scrape() -> dict[tuple[str, Labels], float]:
            with urlopen(f"{server.http_endpoint}/metrics", timeout=PATIENCE_S) as response:
                assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert response.headers["Server"] == "tta-cloud"
                return parsed(response.read().decode())

        for path in ("/livez", "/readyz"):
            with urlopen(f"{server.http_endpoint}{path}", timeout=PATIENCE_S) as response:
                assert response.status == 200
        with pytest.raises(HTTPError):
            urlopen(f"{server.http_endpoint}/else", timeout=PATIENCE_S)
        enrol(ticket(server, store), tmp_path / "a")
        with (
            running(bundle, upload="all", http="127.0.0.1:0", **{**options}) as daemon,
            Client(daemon.endpoint) as client,
        ):
            seeds = iter(range(10_000))

            def base() -> str:
                found = client.status()
                assert found.cloud is not None
                if found.cloud.waiting < 64:
                    client.predict(images(next(seeds)))
                return found.bundles[0].base

            until(base)
            until(lambda: value(scrape(), "tta_cloud_edges_online", group="yard") == 1)
            found = scrape()
            with urlopen(f"{daemon.http_endpoint}/metrics", timeout=PATIENCE_S) as response:
                edge = parsed(response.read().decode())
        assert value(edge, "tta_link_up") == 1
        assert value(edge, "tta_link_uploaded_samples_total") > 0
        assert 0 <= value(edge, "tta_link_head_age_seconds") < PATIENCE_S
        assert value(edge, "tta_base_seq", bundle="default") >= 1

        assert value(found, "tta_cloud_samples_total", group="yard", outcome="stored") > 0
        assert value(found, "tta_cloud_sample_bytes_total", group="yard") > 0
        assert value(found, "tta_cloud_rounds_total", group="yard", result="learned") > 0
        assert value(found, "tta_cloud_round_seconds_count", group="yard") > 0
        assert value(found, "tta_cloud_store_commit_seconds_count") > 0
        assert value(found, "tta_cloud_store_commit_seconds_sum") > 0
        assert value(found, "tta_cloud_patches_total", group="yard", state="published") > 0
        assert value(found, "tta_cloud_patch_seq", group="yard") > 0
        assert value(found, "tta_cloud_rollout_stage", group="yard", stage="group") == 1
        assert value(found, "tta_cloud_heads_sent_total") > 0
        assert value(found, "tta_cloud_patches_sent_total") > 0
        assert 0 <= value(found, "tta_cloud_agreement_ratio", group="yard") <= 1
        verdicts = [n for (name, _), n in found.items() if name == "tta_cloud_gate_verdicts_total"]
        assert sum(verdicts) > 0

        # Everything that the dashboard and the alerts ask for is there.
        names = {name for name, _ in found} | {"up"}
        for where, expression in expressions().items():
            lacking = set(NAME.findall(expression)) - names - ONCE_IT_HAPPENS
            assert not lacking, f"{where}: {lacking}"

        stranger(server, identity.load(store).curve_public)
        until(
            lambda: scrape().get(
                (
                    "tta_cloud_connections_refused_total",
                    (("domain", "edges"), ("reason", "the key is not enrolled")),
                ),
                0,
            )
        )
    with pytest.raises(OSError, match=r"refused|reset"):
        urlopen(f"{server.http_endpoint}/livez", timeout=PATIENCE_S)


def stranger(server: Any, key: str) -> None:
    """Somebody whose key nobody knows tries to connect."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    public, secret = zmq.curve_keypair()
    socket.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.connect(server.endpoint)
    socket.send_multipart([b"x"])
    assert not socket.poll(300)
    socket.close(linger=0)
    context.term()


def test_metrics_are_off_unless_asked_for_and_stay_on_this_machine(store: Path, bundle: Path) -> None:
    assert Config().http == "off"
    with serving(store, bundle) as server:
        assert server.http_endpoint == ""
    for http, refusal in (("0.0.0.0:0", RemoteBindRefused), ("localhost", BadEndpoint)):
        with pytest.raises(refusal), serving(store, bundle, http=http):
            pass
    with serving(store, bundle, http="0.0.0.0:0", allow_remote=True) as server:
        port = server.http_endpoint.rpartition(":")[2]
    with serving(store, bundle, http=f"127.0.0.1:{port}") as server:
        identity.create(store.parent / "other")
        with pytest.raises(AddressInUse), serving(store.parent / "other", bundle, http=f"127.0.0.1:{port}"):
            pass
    chosen = resolve(flags={"http": "off"}, environment={"TTA_CLOUD_HTTP": "127.0.0.1:1"}, file=None)
    assert chosen.http == "off"


# --- dashboard and alerts -------------------------------------------------------------------------

NAME = re.compile(r"\b(?:tta_\w+|up)\b")
ONCE_IT_HAPPENS = {"tta_cloud_messages_refused_total", "tta_cloud_connections_refused_total"}
"""Counters that begin with the first of their kind."""


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "cloud-alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "tta-cloud.json").read_text())
    return found


def expressions() -> dict[str, str]:
    """Where it stands -> expression."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in dashboard()["panels"]:
        found |= {f"{panel['title']} {t['refId']}": t["expr"] for t in panel["targets"]}
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["definition"]
    return found


def test_expressions_name_labels_that_their_metrics_have() -> None:
    labels = {metric.name: set(metric.labels) for metric in METRICS}
    for where, expression in expressions().items():
        known = {"instance", "job", "le"}
        for name in NAME.findall(expression):
            known |= labels.get(re.sub(r"_(bucket|sum|count)$", "", name), labels.get(name, set()))
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
        for grouping in re.findall(r"\bby\s*\(([^)]*)\)", expression):
            used |= {label.strip() for label in grouping.split(",")}
        assert used <= known, f"{where}: {used - known}"


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for where, text in expressions().items() if " " in where for name in NAME.findall(text)}
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} | shown
    assert {metric.name for metric in METRICS} <= stems


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    board = dashboard()
    assert board["uid"] == "tta-cloud"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    page, _, heading = rule["annotations"]["runbook"].partition("#")
    assert heading in anchors(REPOSITORY / "docs" / page)
    used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    kept = {
        label.strip() for text in re.findall(r"\bby\s*\(([^)]*)\)", rule["expr"]) for label in text.split(",")
    }
    assert used <= (kept or {"instance", "job"})


def test_the_scrape_file_asks_for_the_port_of_the_documents() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "cloud-scrape.yml").read_text())
    assert scrape["rule_files"] == ["cloud-alerts.yml"]
    (job,) = scrape["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert f'http = "{target}"' in (REPOSITORY / "docs" / "cloud.md").read_text()
    assert job["job_name"] == "tta-cloud"
