"""A step's profile: the engine measures when asked to, and the benchmark reads operators from it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from exported import built
from tta_runtime import Bundle, EngineOptions, OrtEngine, errors

ROOT = Path(__file__).resolve().parent.parent


def step_cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_cost", ROOT / "benchmarks" / "step_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_an_engine_writes_its_profile_where_it_was_told(tmp_path: Path) -> None:
    bundle = Bundle.open(built("mlp").path)
    engine = OrtEngine(bundle, "forward", EngineOptions(threads=1, profile=str(tmp_path / "forward")))
    x = np.zeros((2, *[int(n) for n in bundle.manifest.input.shape[1:]]), dtype=np.float32)
    engine.run({"x": x, "theta": bundle.theta0})
    file = engine.end_profiling()
    assert file.parent == tmp_path
    assert file.name.startswith("forward")
    events = json.loads(file.read_text())
    assert any(event["name"] == "model_run" for event in events)


def test_an_engine_without_profile_has_none_to_end() -> None:
    engine = OrtEngine(Bundle.open(built("mlp").path), "forward", EngineOptions(threads=1))
    with pytest.raises(errors.BadValue, match="without profiling"):
        engine.end_profiling()


def test_the_benchmark_names_the_operators_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.symlink_to(built("resnet").path)
    line = step_cost().profile(path, batch=3, rounds=1)
    assert "Conv " in line
    assert " ms (" in line
