"""The lockstep benchmark: whose statistics an edge serves with, and what it sends."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

import exported
from cloud_server import METHODS, images
from running import REPOSITORY
from tta_runtime.bundle import Bundle


@pytest.fixture(scope="module")
def lockstep() -> Any:
    path = REPOSITORY / "benchmarks" / "cloud_lockstep.py"
    spec = importlib.util.spec_from_file_location("cloud_lockstep", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def played(lockstep: Any, *flags: str) -> tuple[Any, dict[str, Any]]:
    bundle = str(exported.built("resnet", METHODS).path)
    given = ["--student", bundle, "--teacher", bundle, "--stream", "none", "--method", "source", "--batch", "16",
             "--filter", "all", "--probation", "16", "--gate-samples", "999", *flags]  # fmt: skip
    one = lockstep.Lockstep(lockstep.arguments(given))
    served: list[np.ndarray] = []
    made = one.served
    one.served = lambda theta: served.append(made(theta)) or served[-1]
    x = np.concatenate([images(seed) for seed in range(6)])
    return served, one.play(x, np.zeros(len(x), np.int64))


@pytest.mark.parametrize(("whose", "moves"), [("edge", True), ("cloud", True), ("source", False)])
def test_the_statistics_are_those_that_were_asked_for(lockstep: Any, whose: str, moves: bool) -> None:
    manifest = Bundle.open(exported.built("resnet", METHODS).path)
    trained = manifest.manifest.theta.trained
    served, found = played(lockstep, "--statistics", whose)
    assert len(served) == found["patches"] >= 2
    assert not np.array_equal(served[-1][:trained], manifest.theta0[:trained])
    assert np.array_equal(served[-1][trained:], manifest.theta0[trained:]) is not moves


def test_where_they_are_not_its_own_the_edge_changes_nothing(lockstep: Any) -> None:
    given = [
        "--student",
        "s",
        "--teacher",
        "t",
        "--stream",
        "none",
        "--statistics",
        "cloud",
        "--method",
        "auto",
    ]
    bundle = str(exported.built("resnet", METHODS).path)
    args = lockstep.arguments([*given, "--student", bundle, "--teacher", bundle])
    assert lockstep.Lockstep(args).method == "source", "`auto` is not even in the bundle"


def test_jpegs_are_counted_as_sent_and_a_run_repeats(lockstep: Any) -> None:
    _, raw = played(lockstep)
    served, found = played(lockstep, "--encoding", "jpeg", "--quality", "60")
    again, same = played(lockstep, "--encoding", "jpeg", "--quality", "60")
    assert raw["bytes_per_sample"] == images(0)[0].nbytes
    assert 100 < found["bytes_per_sample"] < raw["bytes_per_sample"] / 3
    assert found == same
    np.testing.assert_array_equal(served[-1], again[-1])
