"""Alert rules and dashboard: whatever they ask for is in a scrape of a daemon that really runs."""

from __future__ import annotations

import json
import re
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import tiny_bundle
import tiny_text
from documents import anchors
from enrolled import enrol_with_nobody
from running import PATIENCE_S, REPOSITORY, running
from tta_edge.client import Client
from tta_edge.config import BundleConfig, resolve
from tta_edge.metrics import METRICS
from tta_runtime.errors import WrongShape

DEPLOY = REPOSITORY / "deploy"
X, _ = tiny_bundle.samples(32, seed=2, shift=0.5)

FROM_PROMETHEUS = {"up"}
TARGET_LABELS = {"instance", "job"}
FREE_LABELS = {"bundle", "reason", "action", "message", "model", "digest", "version"}
"""Labels whose values depend on what happens; all others have values that a scrape shows at once."""

NAME = re.compile(r"\b(?:tta_\w+|up)\b")
SELECTOR = re.compile(r"\b(tta_\w+|up)\s*\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|group_left|without)\s*\(([^)]*)\)")


def rules():
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return group["rules"]


def dashboard():
    return json.loads((DEPLOY / "grafana" / "tta-edge.json").read_text())


def expressions():
    """Where it stands -> expression."""
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["definition"]
    return found


EXPRESSIONS = expressions()


@pytest.fixture(scope="module")
def scrape(tmp_path_factory):
    """Sample name -> the labels of each of its series, of a daemon on which everything happened once."""
    folder = tmp_path_factory.mktemp("scraped")
    tiny_bundle.build(folder / "bundle")
    enrol_with_nobody(folder / "state", folder / "cloud")
    tiny_text.build(folder / "lm")
    lm = {"lm": BundleConfig(path=str(folder / "lm"))}
    settings = {"http": "127.0.0.1:0", "state_dir": str(folder / "state"), "mode": "both", "bundles": lm}
    with running(folder / "bundle", **settings) as server:
        with Client(server.endpoint, timeout_s=PATIENCE_S) as client:
            client.predict(X, stream="camera-1", compare=True)
            client.rollback("camera-1")
            client.reset("camera-1")
            client.predict(X, stream="camera-1", compare=True)
            with pytest.raises(WrongShape):
                client.predict(X[:, :4])
            client.absorb("a text", "session", "lm")
            assert list(client.generate("a text", "session", "lm", max_tokens=3))
        with urlopen(f"{server.http_endpoint}/metrics", timeout=PATIENCE_S) as response:
            text = response.read().decode()
    found = {name: [] for name in FROM_PROMETHEUS}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def names(expression):
    return set(NAME.findall(expression))


def unknown(expression, scrape):
    """What an expression asks for and a scrape does not have, in words."""
    found = names(expression)
    wrong = [f"no metric {name}" for name in found if name not in scrape]
    labels = {label for name in found for series in scrape.get(name, []) for label in series}
    for name, matchers in SELECTOR.findall(expression):
        for label, operator, text in MATCHER.findall(matchers):
            values = {series[label] for series in scrape.get(name, []) if label in series}
            if label not in TARGET_LABELS and not values:
                wrong.append(f"{name} has no label {label}")
            elif label not in TARGET_LABELS | FREE_LABELS and operator == "=" and text not in values:
                wrong.append(f"{name} has no {label} {text!r}")
    for group in GROUPING.findall(expression):
        used = {label.strip() for label in group.split(",")}
        wrong += [f"no label {label}" for label in used - labels - TARGET_LABELS]
    return wrong


# --- against a scrape ---------------------------------------------------------------------------------


def test_the_daemon_scraped_shows_every_metric_there_is(scrape):
    for metric in METRICS:
        if metric.name.startswith(
            "tta_text_"
        ):  # of a language model, which test_edge_text.py serves and scrapes
            continue
        assert (metric.name if metric.kind != "histogram" else f"{metric.name}_bucket") in scrape


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_an_expression_asks_only_for_what_is_there(where, scrape):
    assert names(EXPRESSIONS[where])
    assert unknown(EXPRESSIONS[where], scrape) == []


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("sum(rate(tta_stepz_total[5m]))", "no metric tta_stepz_total"),
        ('tta_streams{status="frozen"}', "tta_streams has no label status"),
        ('tta_streams{state="frosted"}', "tta_streams has no state 'frosted'"),
        ("sum by (bundel) (tta_streams)", "no label bundel"),
        ("tta_step_duration_seconds > 1", "no metric tta_step_duration_seconds"),
    ],
)
def test_a_wrong_expression_would_be_seen(expression, says, scrape):
    assert says in unknown(expression, scrape)


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_the_brackets_of_an_expression_match(where):
    open_ = []
    for character in re.sub(r'"[^"]*"', "", EXPRESSIONS[where]):
        if character in "([{":
            open_.append(character)
        elif character in ")]}":
            assert open_.pop() + character in ("()", "[]", "{}")
    assert open_ == []


def test_what_is_counted_for_ever_is_only_used_as_a_rate():
    absolute = {"TtaStateSetAside", "Bundles A"}  # since the start, on purpose
    counters = {metric.name for metric in METRICS if metric.kind == "counter"}
    for where, expression in EXPRESSIONS.items():
        bare = re.sub(r"\b(?:rate|increase)\(tta_\w+(?:\{[^}]*\})?\[[^\]]+\]\)", "", expression)
        assert where in absolute or not names(bare) & counters, where


# --- the alert rules ----------------------------------------------------------------------------------


def test_alerts_have_names_of_their_own():
    alerts = [rule["alert"] for rule in rules()]
    assert len(set(alerts)) == len(alerts)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_is_and_where_to_read_on(rule):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert "$labels.instance" in rule["annotations"]["summary"]
    page, _, heading = rule["annotations"]["runbook"].partition("#")
    assert page == "operations.md"
    assert heading in anchors(REPOSITORY / "docs" / page)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_summary_names_only_labels_that_its_expression_keeps(rule):
    used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    kept = {label.strip() for group in GROUPING.findall(rule["expr"]) for label in group.split(",")}
    assert used <= (kept or TARGET_LABELS)


def test_the_scrape_file_asks_where_the_daemon_listens():
    scrape_file = yaml.safe_load((DEPLOY / "prometheus" / "scrape.yml").read_text())
    assert scrape_file["rule_files"] == ["alerts.yml"]
    (job,) = scrape_file["scrape_configs"]
    assert job["job_name"] == "tta-edge"
    assert job["static_configs"] == [{"targets": [resolve(file=DEPLOY / "edge.toml").config.http]}]


# --- the dashboard ------------------------------------------------------------------------------------


def test_the_dashboard_can_be_found_and_chosen_from():
    board = dashboard()
    assert board["uid"] == "tta-edge"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert set(variables) == {"datasource", "instance", "bundle"}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")


def test_panels_have_ids_of_their_own_a_title_and_the_chosen_data_source():
    panels = dashboard()["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    for panel in panels:
        assert panel["title"]
        sources = [panel.get("datasource"), *(target["datasource"] for target in panel.get("targets", []))]
        assert all(source in (None, {"type": "prometheus", "uid": "${datasource}"}) for source in sources)
        assert (panel["type"] == "row") == (not panel.get("targets"))


def test_panels_do_not_overlap_and_stay_within_the_grid():
    taken = {}
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_an_expression_uses_only_variables_of_the_dashboard():
    known = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    text = json.dumps(dashboard())
    assert set(re.findall(r"\$\{?(\w+)", text)) <= known | {"__all"}


def test_every_metric_that_says_how_well_it_goes_is_on_the_dashboard():
    shown = {
        name for where, text in EXPRESSIONS.items() if not where.startswith("Tta") for name in names(text)
    }
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} | shown
    assert {metric.name for metric in METRICS} - stems <= {"tta_requests_total"}
