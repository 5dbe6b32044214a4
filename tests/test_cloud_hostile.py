"""T13: one hostile edge among ten, in the service's own rounds; the benchmark's fleet, with small networks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import exported
from networks import CLASSES, SIZE
from running import REPOSITORY
from shared_data import require_shared_data
from tta_cloud.config import Config
from tta_cloud.intake import IntakeOptions, Looked, odd_ones
from tta_cloud.learner import LearnerOptions
from tta_exporters.build import BuildOptions, InputOptions, build
from tta_exporters.sources import load_network
from tta_runtime.bundle import Bundle
from tta_runtime.model import Engines


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "cloud_hostile", REPOSITORY / "benchmarks" / "cloud_hostile.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hostile = load()
SAFETY = REPOSITORY / "examples" / "safety"


# --- who is unlike the others -------------------------------------------------------------------------


def records(
    seed: int = 0, *, odd: int = 0, divergence: float = 0.5, features: float = 0.0, n: int = 16
) -> dict[str, list[Looked]]:
    """Ten edges; the first `odd` of them with other divergences or features."""
    draw = np.random.default_rng(seed)
    return {
        f"edge-{i}": [
            Looked(
                (divergence if i < odd else 0.5) * float(draw.exponential()),
                draw.normal(features if i < odd else 0.0, 1, 12).astype(np.float32),
            )
            for _ in range(n)
        ]
        for i in range(10)
    }


def test_an_edge_that_the_teacher_contradicts_is_odd() -> None:
    assert odd_ones(records(odd=1, divergence=5.0), 4.0) == {"edge-0"}
    assert odd_ones(records(odd=2, divergence=5.0), 4.0) == {"edge-0", "edge-1"}


def test_an_edge_with_features_of_its_own_is_odd() -> None:
    assert odd_ones(records(odd=1, features=4.0), 4.0) == {"edge-0"}


def test_honest_edges_are_hardly_ever_odd() -> None:
    found = [odd_ones(records(seed), 4.0) for seed in range(200)]
    assert np.mean([len(each) for each in found]) < 0.1


def test_nobody_is_told_apart_by_few_samples_or_among_few_edges_or_where_it_is_off() -> None:
    strange = records(odd=1, features=9.0)
    assert not odd_ones(records(odd=1, features=9.0, n=3), 4.0)
    assert not odd_ones(dict(list(strange.items())[:4]), 4.0)
    assert not odd_ones(strange, 0.0)


def test_an_edge_without_answers_is_odd() -> None:
    broken = records()
    broken["edge-3"] = [Looked(np.inf, each.features) for each in broken["edge-3"]]
    assert odd_ones(broken, 4.0) == {"edge-3"}


# --- the fleet ------------------------------------------------------------------------------------------


def test_a_flood_of_one_edge_gets_its_share_of_rounds_and_honest_edges_are_learned_from(
    tmp_path: Path,
) -> None:
    bundle = Bundle.open(exported.built("mlp", ("source", "distill")).path)
    engines = Engines.load(bundle, methods=["distill"])
    draw = np.random.default_rng(3)
    x = draw.random((400, 3, SIZE, SIZE), dtype=np.float32)
    y = draw.integers(0, CLASSES, 400)
    plan = hostile.Plan(calm=1, minutes=2, honest_rate=8, hostile_rate=300, fresh=8)
    config = Config(
        learner=LearnerOptions(replay=8, rounds=1), intake=IntakeOptions(max_waiting=100, oddness=0.0)
    )
    fleet = hostile.Fleet(engines, engines, hostile.Data(x, y, x[:50], y[:50]), plan, config=config)
    calm = tmp_path / "calm"
    calm.mkdir()
    fleet.calm(calm)
    networks = hostile.Networks(exported.NETWORKS["mlp"](), exported.NETWORKS["mlp"](), bundle)
    found = fleet.play(calm, hostile.ATTACKS["free-pixels"], networks)
    rounds = len(found.errors) - 1 + found.refused
    assert rounds >= 4
    assert found.sent == 600
    assert 0 < found.learned <= rounds * int(np.ceil(1.5 * 32 / 10))


def attacked(place: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Rows of the benchmark by attack, on digits under noise; student and teacher are the same network."""
    images = require_shared_data("dev", "mnist_test0000_4999.npz")
    models, weights = SAFETY / "models.py", SAFETY / "mnist_bn.safetensors"
    build(
        load_network(f"{models}:mnist_bn", weights),
        BuildOptions("mnist_bn", InputOptions((1, 28, 28)), 10, ("source", "distill")),
        place / "bundle",
    )
    bundle, rows = str(place / "bundle"), place / "rows.json"
    hostile.main(
        [
            "--student", bundle, "--teacher", bundle, "--models", str(models), "--student-network", "mnist_bn",
            "--teacher-network", "mnist_bn", "--student-weights", str(weights), "--teacher-weights", str(weights),
            "--stream", f"npz:{images}", "--shifts", "gaussian_noise:5", "--calm", "3", "--minutes", "2", "--fresh",
            "16", "--holdout", "1000", "--replay", "32", "--json", str(rows), *options,
        ]
    )  # fmt: skip
    return {row["attack"]: row for row in json.loads(rows.read_text())["rows"]}


def test_real_attacks_on_a_real_learner_do_not_pull_the_head_down(tmp_path: Path) -> None:
    """White-box attacks: no patch is half a point worse than the head before it."""
    rows = attacked(tmp_path, "--attacks", "none,invading,free-pixels", "--hostile-rate", "48")
    assert rows["none"]["patches"] > 0
    for name in ("invading", "free-pixels"):
        row = rows[name]
        assert row["worst_patch_points"] <= 0.5, row
        assert row["last_error"] <= rows["none"]["last_error"] + 0.01, row
        assert row["odd"] >= 0.8 * row["hostile_in_rounds"] > 0, row


@pytest.mark.slow
def test_without_the_defences_the_same_attack_pulls_the_head_down(tmp_path: Path) -> None:
    """The companion: the attack is one."""
    off = [
        "--max-share",
        "1",
        "--fairness",
        "100",
        "--oddness",
        "0",
        "--publish-rate",
        "1",
        "--tolerance",
        "1",
    ]
    row = attacked(tmp_path, "--attacks", "invading", "--hostile-rate", "144", *off)["invading"]
    assert row["worst_patch_points"] > 0.5, row
