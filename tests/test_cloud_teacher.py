"""Opening students and teachers: what is refused, and a network that is compiled once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny_bundle
from bad_bundles import flip_byte
from exported import options as build_options
from snapshots import unchanged
from tta_cloud.errors import StudentUnfit, TeacherRefused
from tta_cloud.learner import METHOD, Learner, LearnerOptions
from tta_cloud.teacher import open_student, open_teacher
from tta_exporters.build import InputOptions, build
from tta_exporters.sources import load_network
from tta_runtime import errors
from tta_runtime.model import Engines, Model

CLASSES = 3
CODE = """
import torch
from torch import nn

def small():
    torch.manual_seed({seed})
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, {classes}))
"""


def write(path: Path, seed: int = 0, classes: int = CLASSES) -> str:
    path.write_text(CODE.format(seed=seed, classes=classes))
    return f"{path}:small"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    network = load_network(write(folder / "net.py"))
    settings = replace(build_options("small", (METHOD,)), input=InputOptions((3, 2, 2)), classes=CLASSES)
    build(network, settings, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def student(bundle: Path) -> Engines:
    return open_student(bundle)


@pytest.fixture
def without(tmp_path: Path) -> Path:
    tiny_bundle.build(tmp_path / "without")
    return tmp_path / "without"


def test_bundles_are_opened_for_distillation_alone(bundle: Path, student: Engines, tmp_path: Path) -> None:
    with unchanged(bundle):
        teacher = open_teacher(str(bundle), student, tmp_path / "cache")
        assert student.methods == teacher.methods == (METHOD,)
        Learner(student, teacher, LearnerOptions())
    assert not (tmp_path / "cache").exists()


def test_bundles_without_distill(without: Path, student: Engines, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        with pytest.raises(StudentUnfit, match="source, tent, teacher, no `distill`") as caught:
            open_student(without)
        assert "distill" in caught.value.fix
        with pytest.raises(TeacherRefused, match="source, tent, teacher, no `distill`"):
            open_teacher(str(without), student, tmp_path / "cache")
        with pytest.raises(errors.BundleError):
            open_student(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "weights", "says"),
    [
        ("nowhere", None, "is no directory and names no network"),
        ("", None, "names no network"),
        ("absent.py:small", None, "there is no file"),
        ("keras:resnet", None, "unknown kind"),
        ("small:", None, "no model source"),
        ("timm:resnet18", None, "random weights"),
        ("torchvision:resnet18", None, "random weights"),
        ("timm:resnet18", "absent.pt", "weights .*absent.pt are no file"),
        ("absent.py:small", ".", "are no file"),
    ],
)
def test_what_is_no_teacher(
    student: Engines, tmp_path: Path, source: str, weights: str | None, says: str
) -> None:
    given = None if weights is None else tmp_path / weights
    with pytest.raises(TeacherRefused, match=says) as caught:
        open_teacher(source, student, tmp_path / "cache", weights=given)
    assert caught.value.fix
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_network_of_other_classes_is_refused(student: Engines, tmp_path: Path) -> None:
    source = write(tmp_path / "net.py", classes=5)
    with pytest.raises(TeacherRefused, match=r", 5\], expected logits"):
        open_teacher(source, student, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_free_dimension_is_refused_by_name(student: Engines, tmp_path: Path) -> None:
    import msgspec

    manifest = student.bundle.manifest
    spec = msgspec.structs.replace(manifest.input, shape=["batch", 3, "height", "width"])
    free = SimpleNamespace(bundle=SimpleNamespace(manifest=msgspec.structs.replace(manifest, input=spec)))
    with pytest.raises(TeacherRefused, match="fixed lengths only"):
        open_teacher(write(tmp_path / "net.py"), free, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(student: Engines, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(TeacherRefused, match="cannot be put into"):
        open_teacher(write(tmp_path / "net.py"), student, tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == b"a file"


def test_a_network_is_compiled_once_and_anew_when_it_changes(student: Engines, tmp_path: Path) -> None:
    cache, source = tmp_path / "cache", write(tmp_path / "net.py")
    said: list[str] = []

    def opened(**more: Any) -> tuple[Engines, int]:
        said.clear()
        found = open_teacher(source, student, cache, progress=said.append, **more)
        return found, sum("this is done once" in line for line in said)

    first, compiled = opened()
    assert compiled == 1
    assert len(list(cache.iterdir())) == 1
    Learner(student, first, LearnerOptions())
    x = np.random.default_rng(0).random((4, 3, 2, 2), dtype=np.float32)
    with torch.no_grad():
        expected = load_network(source)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Model(first, METHOD).predict(x).logits, expected, rtol=1e-4, atol=1e-5)

    with unchanged(cache):
        again, compiled = opened()
        assert (compiled, said) == (0, [])
        assert again.bundle.digest == first.bundle.digest

    # A compilation that was cut off, before and in the middle of writing; and a bundle that the disk has spoilt.
    name = first.bundle.path.name
    (cache / f"{name}.new").mkdir()
    (cache / f"{name}.new" / "forward.onnx").write_bytes(b"half")
    (cache / f".{name}.new.abc").mkdir()
    assert opened()[1] == 0
    flip_byte(first.bundle.path, "theta.safetensors")
    assert opened()[1] == 1
    assert "damaged" in said[0]
    assert [path.name for path in cache.iterdir()] == [name]
    assert opened()[1] == 0

    save_file(load_network(write(tmp_path / "other.py", seed=9)).state_dict(), tmp_path / "w.safetensors")
    weighted, compiled = opened(weights=tmp_path / "w.safetensors")
    assert compiled == 1
    assert opened(weights=tmp_path / "w.safetensors")[1] == 0
    write(tmp_path / "net.py", seed=1)
    changed, compiled = opened()
    assert compiled == 1
    assert len({engines.bundle.path for engines in (first, weighted, changed)}) == 3
    assert len(list(cache.iterdir())) == 3
