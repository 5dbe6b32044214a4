"""RoTTA: its memory and its steps beside a reference with lists, and what it is for: single images, sorted streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eager_rotta import EagerRotta, Item, ListMemory
from networks import group_norm, resnet
from tta_adapters import Method, NormAdapter, make_method
from tta_adapters.augment import COTTA, PARAMETERS, augment, normal_field
from tta_adapters.base import Batch, State, Step, init_state, initial
from tta_adapters.memory import BalancedMemory

CLASSES = 7
LR = 0.05  # steps far above the rounding of theta


def sharp(network: nn.Module) -> nn.Module:
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    heads[-1].weight.data *= 12
    return network


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the memory -----------------------------------------------------------------------------------


def held(state: State) -> list[tuple[float, float, float, float]]:
    """(image, label, uncertainty, age) of each place that is filled, in order."""
    rows = torch.stack(
        [state["memory_image"].flatten(), *(state[f"memory_{k}"] for k in ("label", "uncertainty", "age"))], 1
    )
    return sorted(tuple(row) for row in rows[state["memory_filled"] > 0].tolist())


@pytest.mark.parametrize("sizes", [[1] * 60, [7, 1, 16, 3, 40], [64, 64]])
@pytest.mark.parametrize("classes", [2, 5, 30])
@pytest.mark.parametrize("skew", [1.0, 4.0])
def test_the_memory_keeps_what_lists_keep(classes: int, sizes: list[int], skew: float) -> None:
    memory, lists = BalancedMemory(16, classes, ()), ListMemory(16, classes)
    state = initial(memory.state(), torch.zeros(0))
    number = 0
    for round_, size in enumerate(sizes):
        generator = noise(round_)
        label = (classes * torch.rand(size, generator=generator) ** skew).long()
        uncertainty = torch.rand(size, generator=generator) * np.log(classes)
        x = torch.arange(number, number + size).float()
        number += size
        state = memory.after(state, x, label, uncertainty, torch.ones(size) > 0)
        for image, c, u in zip(x, label.tolist(), uncertainty.tolist(), strict=True):
            lists.add(Item(image, c, u))
        expected = sorted((float(i.image), float(i.label), i.uncertainty, float(i.age)) for i in lists.all())
        np.testing.assert_allclose(held(state), expected, rtol=1e-6)
    assert lists.evicted > 0, "nothing was evicted: the comparison shows little"


def test_a_refused_sample_leaves_no_trace_in_the_memory() -> None:
    memory = BalancedMemory(4, 2, ())
    state = initial(memory.state(), torch.zeros(0))
    some = torch.tensor([True, False, True, False])
    label, u = torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.1)
    mixed = memory.after(state, torch.arange(4.0), label, u, some)
    alone = memory.after(state, torch.arange(4.0)[some], label[some], u[some], torch.ones(2) > 0)
    assert all(torch.equal(mixed[key], alone[key]) for key in mixed)
    nothing = memory.after(mixed, torch.arange(4.0), label, u, torch.zeros(4) > 0)
    assert all(torch.equal(mixed[key], nothing[key]) for key in mixed)


def test_a_sorted_stream_fills_no_more_than_a_classs_share() -> None:
    memory = BalancedMemory(16, 4, ())
    state = initial(memory.state(), torch.zeros(0))
    for c in range(4):
        for k in range(50):
            state = memory.after(
                state,
                torch.tensor([float(k)]),
                torch.tensor([c]),
                torch.tensor([0.3]),
                torch.ones(1) > 0,
            )
        counts = [int(((state["memory_label"] == j) & (state["memory_filled"] > 0)).sum()) for j in range(4)]
        assert counts == [4 if j <= c else 0 for j in range(4)]


# --- the steps ------------------------------------------------------------------------------------


class Ours:
    def __init__(self, network: nn.Module, shape: tuple[int, ...] = (3, 16, 16), **options: Any) -> None:
        self.method: Method = make_method("rotta", NormAdapter(network, input_shape=shape), options)
        self.theta = self.method.adapter.source_theta()
        self.state = init_state(self.method.spec, self.theta)

    def step(self, x: np.ndarray, rand: Tensor, weight: Tensor | None = None) -> Step:
        weight = torch.ones(len(x)) if weight is None else weight
        out = self.method.step(
            Batch(torch.from_numpy(x), weight),
            self.theta,
            self.state,
            {},
            self.method.spec.default_hyper(),
            rand,
        )
        self.theta, self.state = out.theta, out.state
        self.report = dict(zip(self.method.spec.report, out.report.tolist(), strict=True))
        return out

    def rand(self, seed: int) -> Tensor:
        return torch.rand(self.method.spec.rand, generator=noise(seed))


def images(seed: int, count: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    contrast = generator.uniform(0.1, 2.0, size=(count, 1, 1, 1)).astype(np.float32)
    return contrast * generator.random((count, 3, 16, 16), dtype=np.float32)


@pytest.mark.parametrize("size", [12, 4, 1])
@pytest.mark.parametrize("network", [resnet, group_norm])
def test_steps_beside_the_reference(network: Any, size: int) -> None:
    source = sharp(network()).eval()
    # Not Adam: where student and teacher still agree, the gradient is rounding noise that it would blow up.
    mine = Ours(source, memory=12.0, lr=LR, follow=0.2, optimizer="sgd", nesterov=False)
    reference = EagerRotta(source, lr=LR, classes=CLASSES, follow=0.2, capacity=12, adam=False)
    trained, start = mine.method.adapter.trained, reference.theta()
    learned = 0.0
    for seed in range(60 // size):
        rand = mine.rand(seed)
        field = normal_field(rand[PARAMETERS:], (3, 16, 16))
        reference.view = lambda x, rand=rand, field=field: augment(x, rand, COTTA, field)
        x = images(seed, size)
        found, expected = mine.step(x, rand).logits.numpy(), reference.step(x)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), f"logits, step {seed + 1}"
        for mine_now, theirs in (
            (mine.theta[:trained].numpy(), reference.theta()),
            (mine.state["teacher"][:trained].numpy(), reference.teacher_theta()),
        ):
            moved, wanted = mine_now - start, theirs - start
            assert np.abs(moved - wanted).max() <= 1e-2 * np.abs(wanted).max() + 1e-6, f"theta, {seed + 1}"
        learned += mine.report["learned"]
    assert learned == reference.updates == 5
    assert np.abs(reference.teacher_theta() - start).max() > 1e-4
    assert reference.memory.evicted > 0


@pytest.mark.parametrize(("option", "value"), [("lr", 1.1 * LR), ("ema", 0.06), ("follow", 0.22)])
def test_the_comparison_objects_to_another_setting(option: str, value: float) -> None:
    source = sharp(resnet()).eval()
    options = {"lr": LR, "follow": 0.2, option: value}
    mine = Ours(source, memory=12.0, optimizer="sgd", nesterov=False, **options)
    reference = EagerRotta(source, lr=LR, classes=CLASSES, follow=0.2, capacity=12, adam=False)
    trained, start = mine.method.adapter.trained, reference.theta()
    for seed in range(2):
        rand = mine.rand(seed)
        field = normal_field(rand[PARAMETERS:], (3, 16, 16))
        reference.view = lambda x, rand=rand, field=field: augment(x, rand, COTTA, field)
        mine.step(images(seed, 12), rand)
        reference.step(images(seed, 12))
    moved, wanted = mine.state["teacher"][:trained].numpy() - start, reference.teacher_theta() - start
    assert np.abs(moved - wanted).max() > 1e-2 * np.abs(wanted).max() + 1e-6


def test_nothing_moves_before_the_memory_is_due() -> None:
    mine = Ours(sharp(resnet()), memory=12.0)
    theta, teacher = mine.theta, mine.state["teacher"]
    mine.step(images(0, 11), mine.rand(0))
    assert torch.equal(mine.theta, theta)
    assert torch.equal(mine.state["teacher"], teacher)
    assert (mine.report["learned"], mine.report["update_norm"], mine.report["loss"]) == (0, 0, 0)
    refused = mine.step(images(1, 4), mine.rand(1), torch.zeros(4))
    assert torch.equal(refused.theta, theta)
    mine.step(images(2, 1), mine.rand(2))
    assert mine.report["learned"] == 1
    assert not torch.equal(mine.theta, theta)
    assert float(mine.state["count"]) == 0


def test_a_large_batch_is_one_step_and_the_rest_counts_on() -> None:
    mine = Ours(sharp(resnet()), memory=12.0)
    mine.step(images(0, 30), mine.rand(0))
    assert mine.report["learned"] == 1
    assert float(mine.state["count"]) == 6


def test_an_image_that_was_never_there_counts_nowhere() -> None:
    """One class only: two of twelve places are filled, and the step is that of a memory of these two."""
    network = sharp(resnet())
    network[-1].bias.data[3] += 1e3
    mine = Ours(network, memory=12.0)
    rand, x = mine.rand(0), images(0, 12)
    out = mine.step(x, rand)
    assert float(mine.state["memory_filled"].sum()) == 2
    adapter = mine.method.adapter
    kept = mine.state["memory_image"][mine.state["memory_filled"] > 0]
    recorded = adapter.forward(adapter.unpack(adapter.source_theta()), kept, statistics="batch").statistics
    first = next(iter(recorded))
    entry = next(e for e in adapter.tensors if e.name == f"{first}.running_mean")
    place = slice(entry.offset, entry.offset + entry.size)
    expected = 0.95 * adapter.source_theta()[place] + 0.05 * recorded[first][0]
    torch.testing.assert_close(mine.state["teacher"][place], expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(out.theta).all()


@pytest.mark.parametrize("memory", [1.0, 2.5, -3.0, float("nan"), float("inf")])
def test_a_memory_of_no_whole_number_is_refused(memory: float) -> None:
    with pytest.raises(ValueError, match="memory"):
        Ours(resnet(), memory=memory)


@pytest.mark.parametrize("shape", [(9,), (4, 16, 16), None])
def test_what_is_no_image_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="images of 1 or 3"):
        Ours(resnet(), shape=shape)
