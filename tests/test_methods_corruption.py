"""Every compiled method over a whole corruption, beside a reference in eager torch that shares no code with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eager_methods import EagerCotta, EagerRoid, EagerT3a, lame
from eager_rotta import EagerRotta
from shared_data import require_shared_data
from tta_adapters import NormAdapter
from tta_adapters.augment import COTTA, PARAMETERS, ROID, augment, normal_field
from tta_exporters.build import BuildOptions, InputOptions, build
from tta_exporters.sources import load_network
from tta_runtime import Model
from tta_runtime.numerics import uniforms

IMAGES, BATCH, CLASSES = 5000, 64, 10
LIMIT = 1e-3
VIEWS = 4  # of CoTTA: the eighth of the published 32 makes the comparison no weaker
SHAPE = (3, 32, 32)

Answer = Callable[[NDArray[np.float32], Tensor], NDArray[np.float32]]
"""What a reference answers to a batch, given the random numbers that the compiled step was given."""


@functools.cache
def network() -> nn.Module:
    return load_network(
        f"{require_shared_data('weights', 'models.py')}:resnet8_bn",
        require_shared_data("weights", "cifar10_resnet8_bn.safetensors"),
    )


@functools.cache
def images() -> NDArray[np.float32]:
    from tta_edge.streams.shifts import corrupt

    data = np.load(require_shared_data("dev", "cifar10_train40000_44999.npz"))
    x = corrupt(data["x"][:IMAGES], "gaussian_noise", 5, 0)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32) / 255


def roid() -> Answer:
    reference = EagerRoid(network(), lr=2.5e-4)

    def answer(x: NDArray[np.float32], rand: Tensor) -> NDArray[np.float32]:
        reference.view = lambda images: augment(images, rand, ROID)
        return reference.step(x)

    return answer


def cotta() -> Answer:
    reference = EagerCotta(network(), lr=1e-3, confidence=0.92, adam=True)
    trained = len(reference.theta())

    def answer(x: NDArray[np.float32], rand: Tensor) -> NDArray[np.float32]:
        end = trained + VIEWS * PARAMETERS
        draws, field = rand[trained:end].reshape(VIEWS, -1), normal_field(rand[end:], SHAPE)
        reference.views = [
            lambda images, k=k: augment(images, draws[k], COTTA, field.roll((3 * k, 7 * k), dims=(1, 2)))
            for k in range(VIEWS)
        ]
        reference.restored = rand[:trained] < 0.01
        return reference.step(x)

    return answer


def rotta() -> Answer:
    reference = EagerRotta(network(), lr=1e-3, classes=CLASSES)

    def answer(x: NDArray[np.float32], rand: Tensor) -> NDArray[np.float32]:
        field = normal_field(rand[PARAMETERS:], SHAPE)
        reference.view = lambda images: augment(images, rand, COTTA, field)
        return reference.step(x)

    return answer


def source(x: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Logits and features of the network as it is, in eager torch."""
    found: list[Tensor] = []
    head = [module for module in network().modules() if isinstance(module, nn.Linear)][-1]
    hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        logits = network().eval()(torch.from_numpy(x))
    hook.remove()
    return logits, found[0]


def smoothed() -> Answer:
    def answer(x: NDArray[np.float32], rand: Tensor) -> NDArray[np.float32]:
        logits, features = source(x)
        return lame(logits.numpy(), features.numpy())

    return answer


def t3a() -> Answer:
    weight, bias = NormAdapter(network()).head_weight() or (torch.zeros(0), torch.zeros(0))
    reference = EagerT3a(weight.detach(), bias.detach())

    def answer(x: NDArray[np.float32], rand: Tensor) -> NDArray[np.float32]:
        logits, features = source(x)
        return reference.step(features, logits).numpy()

    return answer


METHODS: dict[str, tuple[Callable[[], Answer], dict[str, Any]]] = {
    "cotta": (cotta, {"views": str(VIEWS)}),
    "roid": (roid, {}),
    "rotta": (rotta, {}),
    "lame": (smoothed, {}),
    "t3a": (t3a, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_over_a_whole_corruption_the_predictions_agree(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """5,000 images of gaussian noise at severity 5, batch 64, resnet8_bn: fewer than 0.1 % differ."""
    make, settings = METHODS[name]
    wanted = BuildOptions("resnet8_bn", InputOptions(SHAPE), CLASSES, (name,), settings={name: settings})
    build(network(), wanted, tmp_path / "bundle")
    model, reference = Model.open(tmp_path / "bundle", seed=3), make()
    untouched, _ = source(images()[:BATCH])
    differ = 0
    for step, begin in enumerate(range(0, IMAGES, BATCH)):
        x = images()[begin : begin + BATCH]
        rand = torch.from_numpy(uniforms(3, step, model.spec.rand).copy())
        found = model.adapt(x).logits.argmax(1)
        differ += int((found != reference(x, rand).argmax(1)).sum())
        if step == 0:
            assert name == "rotta" or (found != untouched.numpy().argmax(1)).any(), (
                "the method changes nothing"
            )
    record_property("predictions that differ", differ)
    assert differ / IMAGES < LIMIT, f"{differ} of {IMAGES} predictions differ"
