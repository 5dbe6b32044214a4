"""Random views beside torchvision's transforms, and the methods that use them beside eager references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eager_methods import EagerCotta, EagerRoid, View
from networks import group_norm, resnet
from tta_adapters import NormAdapter, make_method
from tta_adapters.augment import COTTA, PARAMETERS, ROID, Views, augment, between, normal_field, shift_hue
from tta_adapters.base import Batch, Step, init_state
from tta_exporters.sources import load_torchvision

LR = 1e-3


def published(x: Tensor, u: Tensor, views: Views) -> Tensor:
    """The view by torchvision's own functions, without noise."""
    load_torchvision()
    import torchvision.transforms.functional as T
    from torchvision.transforms import InterpolationMode

    draw = [float(value) for value in u]
    size = x.shape[3]
    x = T.adjust_brightness(x.clamp(0, 1), between(draw[0], views.brightness))
    x = T.adjust_contrast(x, between(draw[1], views.contrast))
    x = T.adjust_saturation(x, between(draw[2], views.saturation))
    x = T.adjust_hue(x, between(draw[3], (-views.hue, views.hue)))
    x = T.adjust_gamma(x.clamp(1e-8, 1), between(draw[4], views.gamma))
    x = T.pad(x, [size // 2], padding_mode="reflect" if views.reflect else "edge")
    move = [2 * size * between(draw[k], (-views.shift, views.shift)) for k in (6, 7)]
    x = T.affine(
        x,
        angle=between(draw[5], (-views.degrees, views.degrees)),
        translate=move,
        scale=between(draw[8], views.scale),
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    if views.blur is not None:
        sigma = between(draw[9], views.blur)
        x = T.gaussian_blur(x, [5, 5], [sigma, sigma])
    x = T.center_crop(x, [size, size])
    return x.flip(3) if draw[10] < 0.5 else x


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("views", [COTTA, ROID], ids=["cotta", "roid"])
def test_a_view_is_the_published_one(views: Views, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, u = torch.rand([2, 3, 32, 32], generator=generator), torch.rand(PARAMETERS, generator=generator)
    found = augment(x, u, views, torch.zeros(3, 32, 32))
    expected = published(x, u, views)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - x).abs().max() > 0.1, "a view that is the image shows nothing"


def test_grey_images_have_views_too() -> None:
    x, u = torch.rand(2, 1, 16, 16), torch.full((PARAMETERS,), 0.5)
    assert augment(x, u, ROID).shape == x.shape


def test_hue_turns_a_whole_circle() -> None:
    x = torch.rand(1, 3, 4, 4)
    turned = x
    for _ in range(6):
        turned = shift_hue(turned, torch.tensor(1 / 6))
    torch.testing.assert_close(turned, x, atol=1e-5, rtol=0)
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    green = shift_hue(red, torch.tensor(1 / 3)).flatten()
    torch.testing.assert_close(green, torch.tensor([0.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_normal_fields_are_normal() -> None:
    field = normal_field(torch.rand(40_000, generator=torch.Generator().manual_seed(0)), (2, 100, 100))
    assert abs(float(field.mean())) < 0.03
    assert abs(float(field.std()) - 1) < 0.03
    assert torch.isfinite(normal_field(torch.zeros(8), (2, 2))).all()


def sharp(network: nn.Module) -> nn.Module:
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    heads[-1].weight.data *= 12
    return network


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((12, 3, 16, 16), dtype=np.float32)


def view(u: Tensor, views: Views, normal: Tensor | None = None) -> View:
    return lambda x: augment(x, u, views, normal)


class Ours:
    def __init__(self, name: str, network: nn.Module, **options: Any) -> None:
        self.method = make_method(name, NormAdapter(network, input_shape=(3, 16, 16)), options)
        self.theta = self.method.adapter.source_theta()
        self.state = init_state(self.method.spec, self.theta)

    def step(self, x: np.ndarray, rand: Tensor) -> Step:
        spec = self.method.spec
        out = self.method.step(
            Batch(torch.from_numpy(x), torch.ones(len(x))),
            self.theta,
            self.state,
            self.method.anchor(),
            spec.default_hyper(),
            rand,
        )
        self.theta, self.state = out.theta, out.state
        return out

    def rand(self, seed: int) -> Tensor:
        return torch.rand(self.method.spec.rand, generator=torch.Generator().manual_seed(seed))


NETWORKS = {"resnet": resnet, "group_norm": group_norm}


@pytest.mark.parametrize("network", NETWORKS)
def test_roid_beside_its_reference(network: str) -> None:
    source = sharp(NETWORKS[network]())
    mine, reference = Ours("roid", source, lr=LR), EagerRoid(source, lr=LR)
    trained, start = mine.method.adapter.trained, reference.theta()
    for seed in range(6):
        rand = mine.rand(seed)
        reference.view = view(rand, ROID)
        found, expected = mine.step(batch(seed), rand).logits.numpy(), reference.step(batch(seed))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        moved, wanted = mine.theta[:trained].numpy() - start, reference.theta() - start
        assert np.abs(moved - wanted).max() <= 1e-2 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("confidence", [0.0, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_cotta_beside_its_reference(network: str, confidence: float, symmetric: bool) -> None:
    source = sharp(NETWORKS[network]())
    options = {"confidence": confidence, "restore": 0.2, "decay": 0.9, "loss": "sce" if symmetric else "ce"}
    # Not Adam: where student and teacher still agree, the gradient is rounding noise that it would blow up.
    mine = Ours("cotta", source, lr=LR, views=2.0, optimizer="sgd", nesterov=False, **options)
    reference = EagerCotta(source, lr=LR, confidence=confidence, decay=0.9, symmetric=symmetric)
    trained, start = mine.method.adapter.trained, reference.theta()
    for seed in range(5):
        rand = mine.rand(seed)
        draws = rand[trained : trained + 2 * PARAMETERS].reshape(2, PARAMETERS)
        field = normal_field(rand[trained + 2 * PARAMETERS :], (3, 16, 16))
        reference.views = [view(draws[k], COTTA, field.roll((3 * k, 7 * k), dims=(1, 2))) for k in range(2)]
        reference.restored = rand[:trained] < 0.2
        found, expected = mine.step(batch(seed), rand).logits.numpy(), reference.step(batch(seed))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        moved, wanted = mine.theta[:trained].numpy() - start, reference.theta() - start
        assert np.abs(moved - wanted).max() <= 1e-2 * max(np.abs(wanted).max(), LR)
        teacher = mine.state["teacher"][:trained].numpy() - start
        slow = reference.teacher.theta() - start
        assert np.abs(teacher - slow).max() <= 1e-2 * np.abs(slow).max() + 1e-6
    assert reference.used_views == (5 if confidence else 0)


def test_cotta_refuses_views_of_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="needs images"):
        make_method("cotta", NormAdapter(resnet(), input_shape=(9,)), {"views": 2.0})
    make_method("cotta", NormAdapter(resnet(), input_shape=(9,)), {"views": 0.0})
