"""examples/cloud_fleet: the one command, which repeats, and what it is told wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exported
from networks import CLASSES, NETWORKS, SIZE
from running import PATIENCE_S, REPOSITORY, process_environment
from shared_data import require_shared_data
from tta_exporters.build import build

RUN = REPOSITORY / "examples" / "cloud_fleet" / "run.py"
METHODS = ("source", "tent", "auto", "distill")
SAMPLES = 200
ACCURACIES = ("source", "local", "auto", "cloud", "cloud_batch1")
ROW = {"edge", "shift", *ACCURACIES, "upload_ratio", "bytes_up", "bytes_down"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    wanted = replace(exported.options("mlp", METHODS), source_images=torch.rand(160, 3, SIZE, SIZE))
    return build(NETWORKS["mlp"](), wanted, tmp_path_factory.mktemp("bundle") / "mlp").path


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("stream") / "images.npz"
    x = draw.integers(0, 256, (SAMPLES, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(path, x=x, y=draw.integers(0, CLASSES, SAMPLES))
    return path


def example(*words: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(RUN), *map(str, words)], capture_output=True, text=True, timeout=10 * PATIENCE_S,
        env=process_environment(OMP_NUM_THREADS="1", **environment), check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done


def played(bundle: Path, stream: Path, folder: Path, *words: object) -> dict[str, Any]:
    file = folder / "fleet.json"
    given = (
        "--student",
        bundle,
        "--teacher",
        bundle,
        "--stream",
        f"npz:{stream}",
        "--upload",
        "all",
        "-o",
        folder,
    )
    done = example(*given, "--json", file, *words)
    assert "edge-1" in done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_lockstep_repeats_to_the_last_answer(bundle: Path, stream: Path, tmp_path: Path) -> None:
    """Daemons and sockets are real, and two runs answer alike all the same."""
    words = ("--shifts", "fog:5,contrast:5", "--batch", "40", "--no-batch1")
    first, again = (played(bundle, stream, tmp_path, *words) for _ in range(2))
    assert [each["shift"] for each in first["rows"]] == ["fog:5", "contrast:5"]
    for one, other in zip(first["rows"], again["rows"], strict=True):
        assert set(one) >= ROW
        for name in ("source", "local", "auto", "cloud"):
            assert one[name] == other[name], name
            assert 0 <= one[name] <= 1
        assert one["cloud_batch1"] is None
        assert (one["upload_ratio"], one["bytes_up"]) == (1.0, SAMPLES * 3 * SIZE * SIZE * 4)
        assert (one["answers"], one["lessons"]) == (other["answers"], other["lessons"])
        assert one["patches"] == other["patches"] >= 4
        assert one["serves"] == other["serves"] >= 2
        assert first["patch_bytes"] < one["bytes_down"] <= one["patches"] * first["patch_bytes"]
    assert 0 < first["publish_to_staged_ms"]["p50"] <= first["publish_to_staged_ms"]["p99"]


def test_in_real_time_nobody_waits(bundle: Path, stream: Path, tmp_path: Path) -> None:
    found = played(bundle, stream, tmp_path, "--mode", "realtime", "--rate", "400", "--batch", "20")
    (row,) = found["rows"]
    assert row["shift"] == f"npz:{stream}"
    assert row["samples"] == SAMPLES
    assert row["upload_ratio"] == 1.0
    assert row["patches"] >= 4, "what was sent is waited for at the end"
    assert row["batch1"]["upload_ratio"] == 1.0
    assert 0 <= row["cloud_batch1"] <= 1
    assert row["gap_recovered"]["cloud"] is None, "nobody knows what these images are without a shift"


def test_what_cannot_be_played_is_said(bundle: Path, stream: Path, tmp_path: Path) -> None:
    nothing = example("-o", tmp_path, "--student", bundle, status=2, TTA_SHARED_DATA=str(tmp_path / "none"))
    assert "there are no images: give --data" in nothing.stderr
    given = ("--student", bundle, "--teacher", bundle, "-o", tmp_path, "--shifts", "fog:5,snow:5,frost:5")
    three = example(*given, "--stream", f"npz:{stream}", "--stream", f"npz:{stream}", status=1)
    assert "there are 2 streams and 3 shifts" in three.stderr


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    data = require_shared_data()
    require_shared_data("weights", "cifar10_resnet26w32_bn.safetensors")
    file = tmp_path / "fleet.json"
    example(
        "--data", data, "--json", file, "-o", tmp_path, "--samples", "640", "--share", "0.3", "--no-batch1"
    )
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 4
    assert found["mean"]["cloud"] > found["mean"]["source"] + 0.2
