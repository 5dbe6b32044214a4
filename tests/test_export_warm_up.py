"""Warm-up: what is trained, that resuming changes no bit, and what a build accepts of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from exported import options
from networks import CLASSES, NETWORKS, vit
from snapshots import unchanged
from test_export_cli import assert_one_line
from test_export_cli import run as run
from tta_adapters.network import NetworkAdapter
from tta_exporters.adapter_file import read_adapter, read_tensors, write_adapter
from tta_exporters.build import BuildOptions, InputOptions, build, prepare
from tta_exporters.errors import CheckpointMismatch, Diverged, OptionError, SourceError, WeightsDoNotFit
from tta_exporters.labelled import Labelled, load_labelled
from tta_exporters.preprocess import Preprocess
from tta_exporters.warm_up import WarmedUp, WarmUpOptions, warm_up
from tta_runtime import Model

USERS = InputOptions((3, 16, 16))
HOW = WarmUpOptions(epochs=3, batch=16, lr=3e-3, held_out=0.2, checkpoint_every=4)
SMALL = {"norm": {}, "lora": {"rank": 2.0}, "vida": {"low": 1.0, "high": 4.0}, "side": {"width": 8.0}}


def data(count: int = 100, seed: int = 0) -> Labelled:
    """Images whose class is how bright one of their channels is."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, count)
    x = generator.integers(0, 60, (count, 3, 16, 16)) + (25 * y)[:, None, None, None]
    return Labelled(x.astype(np.uint8), y.astype(np.int64), USERS)


def chosen(adapter: str) -> BuildOptions:
    return dataclasses.replace(
        options("vit", ("source", "tent")), adapter=adapter, adapter_settings=SMALL[adapter]
    )


def made(adapter: str, network: nn.Module | None = None) -> NetworkAdapter:
    return prepare(network or vit(), chosen(adapter))[0]


def trained(adapter: str, checkpoint: Path, how: WarmUpOptions = HOW, **more: object) -> WarmedUp:
    return warm_up(made(adapter), vit(), data(), how, checkpoint, **more)  # type: ignore[arg-type]


class Stop:
    """Interrupts a run after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapter", SMALL)
def test_the_held_out_part_is_classified_better(adapter: str, tmp_path: Path) -> None:
    how = dataclasses.replace(HOW, epochs=12, lr=1e-2)
    result = trained(adapter, tmp_path / "c", how)
    assert result.steps == 12 * 5
    assert result.before.loss is not None
    assert result.after.loss is not None
    assert result.after.loss < 0.97 * result.before.loss
    assert set(result.tensors) == {entry.name for entry in made(adapter).tensors if entry.trained}


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    network = vit()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    warm_up(made("lora", network), network, data(), HOW, tmp_path / "c")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("stop", [1, 4, 7, 15])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole = trained("lora", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained("lora", tmp_path / "c", progress=Stop(stop))
    resumed = trained("lora", tmp_path / "c")
    assert resumed.resumed_from == stop
    assert all(torch.equal(resumed.tensors[name], value) for name, value in whole.tensors.items())
    assert resumed.after == whole.after


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, steps: int, loss: float) -> None:
        if step == 11:
            raise Killed

    with pytest.raises(Killed):
        trained("side", tmp_path / "c", progress=kill)
    assert trained("side", tmp_path / "c").resumed_from == 8
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_the_seed_decides_alone(tmp_path: Path) -> None:
    one, other = trained("lora", tmp_path / "a"), trained("lora", tmp_path / "b")
    third = trained("lora", tmp_path / "d", dataclasses.replace(HOW, seed=1))
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert any(not torch.equal(one.tensors[name], third.tensors[name]) for name in one.tensors)


OTHER_RUNS: dict[str, Callable[[Path], object]] = {
    "another lr": lambda c: trained("lora", c, dataclasses.replace(HOW, lr=1e-4)),
    "another seed": lambda c: trained("lora", c, dataclasses.replace(HOW, seed=9)),
    "another adapter": lambda c: trained("side", c),
    "other data": lambda c: warm_up(made("lora"), vit(), data(seed=3), HOW, c),
    "another network": lambda c: warm_up(made("lora", changed()), changed(), data(), HOW, c),
}


def changed() -> nn.Module:
    network = vit()
    network.head.weight.data += 1e-3
    return network


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained("lora", tmp_path / "c", progress=Stop(2))
    with unchanged(tmp_path), pytest.raises(CheckpointMismatch, match="belongs to another run"):
        OTHER_RUNS[name](tmp_path / "c")


def test_checkpoints_may_come_more_often_than_before(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained("lora", tmp_path / "c", progress=Stop(2))
    trained("lora", tmp_path / "c", dataclasses.replace(HOW, checkpoint_every=1))


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "no facts", "other arrays"])
def test_a_damaged_checkpoint_is_refused(spoil: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        trained("lora", file, progress=Stop(2))
    whole = file.read_bytes()
    tensors, facts = read_tensors(file)
    if spoil == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif spoil == "empty":
        file.write_bytes(b"")
    elif spoil == "text":
        file.write_text("hello")
    elif spoil == "no facts":
        save_file(tensors, file)
    else:
        save_file({**tensors, "theta": torch.zeros(3)}, file, facts)
    with unchanged(tmp_path), pytest.raises(CheckpointMismatch):
        trained("lora", file)


def test_a_run_that_diverges_says_when_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"at step \d+ of 15"):
        trained("lora", tmp_path / "c", dataclasses.replace(HOW, lr=1e38))


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with unchanged(tmp_path), pytest.raises(OptionError, match="8 training samples for batches of 16"):
        warm_up(made("lora"), vit(), data(10), HOW, tmp_path / "c")


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"held_out": 1.0},
        {"checkpoint_every": 0},
    ],
)
def test_bad_options_are_refused_with_their_value(bad: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))} is"):
        WarmUpOptions(**bad)  # type: ignore[arg-type]


def test_without_held_out_data_nothing_is_judged(tmp_path: Path) -> None:
    assert trained("lora", tmp_path / "c", dataclasses.replace(HOW, held_out=0.0)).after.accuracy is None


# --- the file, and the build that starts from it ----------------------------------------------------


@pytest.mark.parametrize("adapter", SMALL)
def test_a_bundle_starts_where_the_warm_up_ended(adapter: str, tmp_path: Path) -> None:
    network = vit()
    result = trained(adapter, tmp_path / "c")
    write_adapter(tmp_path / "a.safetensors", result.tensors, adapter, network, {"steps": result.steps})
    start = read_adapter(tmp_path / "a.safetensors", adapter, network)
    wanted = dataclasses.replace(
        chosen(adapter), methods=("source",), adapter_weights=start.tensors, provenance=start.provenance
    )
    built = build(network, wanted, tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle")
    named = {
        entry.name: model.theta[entry.offset : entry.offset + entry.size] for entry in built.adapter.tensors
    }
    for name, value in result.tensors.items():
        assert np.array_equal(named[name], value.flatten().numpy()), name
    x = np.random.default_rng(0).random((4, 3, 16, 16), dtype=np.float32)
    with torch.no_grad():
        theta = built.adapter.source_theta()
        expected = built.adapter.forward(built.adapter.unpack(theta), torch.from_numpy(x)).logits.numpy()
    np.testing.assert_allclose(model.predict(x).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.manifest.adapter == adapter
    assert len(model.manifest.provenance["adapter.weights.digest"]) == 64


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    start = trained("lora", tmp_path / "c").tensors
    wider = dataclasses.replace(chosen("lora"), adapter_settings={"rank": 3.0}, adapter_weights=start)
    with pytest.raises(WeightsDoNotFit, match=r"lora_down is \[2, .*has \[3, "):
        build(vit(), wider, tmp_path / "bundle")
    fewer = dataclasses.replace(chosen("lora"), include=["blocks.*"], adapter_weights=start)
    with pytest.raises(WeightsDoNotFit, match="2 unknown"):
        build(vit(), fewer, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_weights_of_another_adapter_or_network_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(file, trained("lora", tmp_path / "c").tensors, "lora", vit(), {})
    with pytest.raises(WeightsDoNotFit, match="is of adapter lora, this bundle has side"):
        read_adapter(file, "side", vit())
    with pytest.raises(WeightsDoNotFit, match="was warmed up on network"):
        read_adapter(file, "lora", changed())


def test_files_that_are_no_warm_up_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(SourceError, match="cannot be read"):
        read_adapter(file, "lora", vit())
    file.write_text("hello")
    with pytest.raises(SourceError, match="cannot be read"):
        read_adapter(file, "lora", vit())
    save_file({"w": torch.zeros(2)}, file)
    with pytest.raises(WeightsDoNotFit, match="not the result of a warm-up"):
        read_adapter(file, "lora", vit())


# --- labelled data ----------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.arange(6) % 3


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_labelled_images_arrive_as_users_send_theirs(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=IMAGES, y=LABELS)
    users = InputOptions((3, 5, 4), dtype, Preprocess(high=255.0 if dtype == "uint8" else 1.0))
    x, y = load_labelled(tmp_path / "d.npz", users, 3).batch(torch.tensor([4, 1]))
    expected = IMAGES[[4, 1]].transpose(0, 3, 1, 2)
    torch.testing.assert_close(
        x, torch.from_numpy(expected if dtype == "uint8" else expected.astype(np.float32) / 255)
    )
    assert y.tolist() == [1, 1]


def test_vectors_arrive_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((6, 7), dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=LABELS.astype(np.uint8))
    found = load_labelled(tmp_path / "d.npz", InputOptions((7,)), 3)
    assert torch.equal(found.batch(torch.arange(6))[0], torch.from_numpy(x))


BAD_DATA: dict[str, tuple[dict[str, object] | None, str]] = {
    "missing": (None, "no labelled data"),
    "no y": ({"x": IMAGES}, "no labelled data"),
    "pickled": ({"x": IMAGES, "y": np.array([{}], dtype=object)}, "no labelled data"),
    "shape": ({"x": IMAGES[:, :4], "y": LABELS}, r"\[6, 4, 4, 3\], expected uint8"),
    "doubles": ({"x": np.zeros((6, 3, 5, 4)), "y": LABELS}, "float64"),
    "NaN": ({"x": np.full((6, 3, 5, 4), np.nan, np.float32), "y": LABELS}, "NaN"),
    "none": ({"x": IMAGES[:0], "y": LABELS[:0]}, "expected uint8"),
    "count": ({"x": IMAGES, "y": LABELS[:5]}, "for 6 samples"),
    "one-hot": ({"x": IMAGES, "y": np.eye(6)}, "one integer|for 6 samples"),
    "class": ({"x": IMAGES, "y": LABELS + 1}, "from 1 to 3, the classes from 0 to 2"),
    "negative": ({"x": IMAGES, "y": LABELS - 1}, "from -1 to 1"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_labelled_data_is_refused(name: str, tmp_path: Path) -> None:
    arrays, says = BAD_DATA[name]
    if arrays is not None:
        np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=says):
        load_labelled(tmp_path / "d.npz", InputOptions((3, 5, 4)), 3)


# --- the command ------------------------------------------------------------------------------------

MODEL = "import sys; sys.path.insert(0, {tests!r}); from networks import vit"
COMMON = ("--input", "3x16x16", "--classes", str(CLASSES), "--adapter", "lora", "--adapter-set", "rank=2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL.format(tests=str(Path(__file__).parent)))
    sample = data()
    np.savez(tmp_path / "d.npz", x=sample.x, y=sample.y)
    return tmp_path


def command(folder: Path, *more: object) -> list[object]:
    out = folder / "a.safetensors"
    data = folder / "d.npz"
    return ["warm-up", f"{folder}/model.py:vit", *COMMON, "--data", data, "-o", out, "--batch", 16, *more]


def test_the_command_leaves_a_file_that_build_takes(folder: Path, run) -> None:
    done = run(*command(folder, "--json"))
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    assert printed["steps"] == 3 * 5
    assert printed["values"] == sum(
        value.numel() for value in read_tensors(folder / "a.safetensors")[0].values()
    )
    assert not (folder / "a.safetensors.checkpoint").exists()
    built = run(
        "build", f"{folder}/model.py:vit", *COMMON, "--methods", "tent", "--parity", "2",
        "--adapter-weights", folder / "a.safetensors", "-o", folder / "bundle",
    )  # fmt: skip
    assert built.status == 0, built.err
    manifest = Model.open(folder / "bundle").manifest
    assert manifest.provenance["adapter.weights.digest"] == printed["digest"]
    assert manifest.provenance["adapter.rank"] == "2"
    assert "adapter lora" in run("info", folder / "bundle").out


def test_the_command_resumes_after_an_interruption(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tta_exporters.warm_up as module

    train = module.warm_up

    def stopped(*arguments: object) -> WarmedUp:
        return train(*arguments[:5], progress=Stop(6))  # type: ignore[arg-type]

    monkeypatch.setattr(module, "warm_up", stopped)
    done = run(*command(folder))
    assert done.status == 130
    assert "Run the same command" in assert_one_line(done.err, "interrupted")
    assert not (folder / "a.safetensors").exists()
    monkeypatch.setattr(module, "warm_up", train)
    done = run(*command(folder, "--json"))
    assert json.loads(done.out)["resumed_from"] == 6


FAILURES: dict[str, tuple[tuple[object, ...], int, str]] = {
    "lr": (("--lr", "0"), 2, "option"),
    "rank": (("--adapter-set", "rank=0"), 2, "option"),
    "form": (("--adapter-set", "rank"), 2, "option"),
    "adapter": (("--adapter", "loar"), 2, "option"),
    "data": (("--data", "nothing.npz"), 2, "option"),
    "directory": (("-o", "nowhere/a.safetensors"), 2, "output-unwritable"),
    "diverged": (("--lr", "1e38"), 1, "diverged"),
    "weights": (("--weights", "nothing.safetensors"), 4, "model-source"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_command_fails_in_one_line_with_its_exit_code(name: str, folder: Path, run) -> None:
    more, status, code = FAILURES[name]
    with unchanged(folder):
        done = run(*command(folder, *more))
    assert done.status == status, done.err
    assert_one_line(done.err, code)


def test_an_existing_file_is_not_overwritten(folder: Path, run) -> None:
    (folder / "a.safetensors").write_text("mine")
    with unchanged(folder):
        done = run(*command(folder))
    assert (done.status, "exists" in assert_one_line(done.err, "output-exists")) == (2, True)


def test_every_small_network_can_be_warmed_up(tmp_path: Path) -> None:
    for name, network in NETWORKS.items():
        for adapter in ("lora", "side"):
            wanted = dataclasses.replace(
                options(name, ("source",)), adapter=adapter, adapter_settings=SMALL[adapter]
            )
            how = dataclasses.replace(HOW, epochs=1)
            warm_up(prepare(network(), wanted)[0], network(), data(), how, tmp_path / f"{name}.{adapter}")
