"""Malicious samples: a stream whose honest samples suffer from those of an attacker in the same batch.

A method that looks at the batch lets its samples act on each other. Whoever owns some of them can choose their pixels
so that the others are misclassified (Wu et al., Uncovering Adversarial Risks of Test-Time Adaptation, ICML 2023,
https://arxiv.org/abs/2301.12576: the distribution invading attack). This is that attack in its single-level form:
projected gradient ascent on the cross-entropy of the honest samples, through whatever couples them to the attacker's:

- `statistics`: the batch statistics of BatchNorm layers;
- `step`: one step of entropy minimisation on the whole batch, for networks without BatchNorm.

The attacker knows network, labels and batch. That is the worst case, and what a guard should be measured against.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tta_adapters.tape import join
from tta_exporters.build import InputOptions
from tta_exporters.errors import NetworkRefused, OptionError
from tta_exporters.labelled import Labelled

Route = Literal["statistics", "step"]
ROUTES: tuple[Route, ...] = ("statistics", "step")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
STEP_LR = 1e-3
"""Of the step that is differentiated through. Ascent takes signs of gradients, so it hardly matters."""

Progress = Callable[[int, int], None]
"""Told how many batches of how many are done."""


@dataclass(frozen=True)
class AttackOptions:
    """How to attack.

    Attributes:
        share: of each batch that is the attacker's, above 0 and below 1.
        batch: samples that arrive together.
        epsilon: largest change of a pixel, in units of the whole range; 1 leaves the attacker free.
        steps: of gradient ascent.
        seed: of the order, and of which samples are the attacker's.
        route: through what the attack works; None: `statistics` where there is BatchNorm, else `step`.

    Raises:
        OptionError: a value out of its range.
    """

    share: float = 0.2
    batch: int = 64
    epsilon: float = 1.0
    steps: int = 20
    seed: int = 0
    route: Route | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OptionError(f"share is {self.share:g}", "Give a share above 0 and below 1")
        if not 0 < self.epsilon <= 1:
            raise OptionError(f"epsilon is {self.epsilon:g}", "Give a number above 0, at most 1")
        if self.batch < 2 or self.steps < 1:
            raise OptionError(
                f"batch is {self.batch} and steps is {self.steps}",
                "Give 2 or more samples and 1 or more steps",
            )
        if self.route not in (None, *ROUTES):
            raise OptionError(f"route is {self.route!r}", f"Give {' or '.join(ROUTES)}")


@dataclass(frozen=True, eq=False)
class Attacked:
    """A stream with malicious samples.

    Attributes:
        x: uint8 [n, height, width, channels], in order of arrival.
        y: int64 [n]; the attacker's samples keep the labels of the images they were made from.
        malicious: bool [n].
        route: through what the attack works.
        before: error on the honest samples of the batches as they were, under the route.
        after: the same with the attacker's samples in them.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    malicious: NDArray[np.bool_]
    route: Route
    before: float
    after: float


def attack(
    network: nn.Module, data: Labelled, options: AttackOptions, progress: Progress | None = None
) -> Attacked:
    """Make a stream of all images with a share of malicious ones in every batch.

    Args:
        network: [batch, ...] -> logits [batch, classes]; it is copied.
        data: uint8 images and labels; their order is drawn from the seed.
        options: how to attack.
        progress: told after each batch.

    Raises:
        OptionError: the data are no images, or fewer than two.
        NetworkRefused: nothing in the network couples the samples of a batch on this route.
    """
    if data.x.dtype != np.uint8 or data.x.ndim != 4 or len(data) < 2:
        raise OptionError(
            f"x is {data.x.dtype} {list(data.x.shape)}, an attack needs two or more uint8 images",
            "Give uint8 images [n, height, width, channels]",
        )
    victim = Victim(network, data.options, options.route)
    rng = np.random.Generator(np.random.Philox(key=options.seed))
    order = rng.permutation(len(data))
    malicious = np.zeros(len(data), dtype=np.bool_)
    pixels = np.ascontiguousarray(data.x[order]).astype(np.uint8)
    labels = data.y[order]
    wrong_before = wrong_after = 0
    starts = range(0, len(order), options.batch)
    for number, start in enumerate(starts):
        batch = slice(start, min(start + options.batch, len(order)))
        size = batch.stop - batch.start
        own = np.zeros(size, dtype=np.bool_)
        own[rng.permutation(size)[: math.floor(options.share * size + 0.5)]] = True
        truth = torch.from_numpy(labels[batch])
        clean = torch.from_numpy(pixels[batch])
        wrong_before += victim.wrong(clean, own, truth)
        if own.any() and not own.all():
            pixels[batch] = ascend(victim, clean, own, truth, options).numpy()
        wrong_after += victim.wrong(torch.from_numpy(pixels[batch]), own, truth)
        malicious[batch] = own
        if progress is not None:
            progress(number + 1, len(starts))
    honest = max(1, int((~malicious).sum()))
    return Attacked(
        np.ascontiguousarray(np.moveaxis(pixels, 1, -1)),
        labels,
        malicious,
        victim.route,
        wrong_before / honest,
        wrong_after / honest,
    )


class Victim:
    """The network as a method that looks at the batch sees it.

    Args:
        network: copied; its parameters are not trained.
        users: what users send.
        route: see `AttackOptions`.

    Attributes:
        route: the chosen one.

    Raises:
        NetworkRefused: the network has no BatchNorm (`statistics`) or no normalisation layer (`step`).
    """

    def __init__(self, network: nn.Module, users: InputOptions, route: Route | None) -> None:
        self._network = copy.deepcopy(network).eval().requires_grad_(False)
        self._users = users
        norms = {name: module for name, module in self._network.named_modules() if isinstance(module, NORMS)}
        batch_norms = [module for module in norms.values() if isinstance(module, BATCH_NORMS)]
        self.route: Route = route or ("statistics" if batch_norms else "step")
        self._affine: dict[str, Tensor] = {
            join(name, kind): parameter
            for name, module in norms.items()
            for kind, parameter in module.named_parameters(recurse=False)
        }
        if not (batch_norms if self.route == "statistics" else self._affine):
            kind = "BatchNorm" if self.route == "statistics" else "normalisation layer with parameters"
            raise NetworkRefused(
                f"the network has no {kind}, so the samples of a batch do not act on each other on the route "
                f"{self.route}",
                "Take the other --route, or no attack of this kind is possible",
            )
        for module in batch_norms:
            module.train()
            module.momentum = (
                0.0  # the statistics of the batch are used, those that are kept stay as they are
            )

    def logits(self, pixels: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """[batch, classes] of pixels float [batch, C, H, W] in 0..1."""
        preprocess = self._users.preprocess
        x = preprocess(preprocess.low + (preprocess.high - preprocess.low) * pixels)
        logits: Tensor = functional_call(self._network, dict(parameters or {}), (x,))
        return logits

    def coupled(self, pixels: Tensor) -> Tensor:
        """The logits that the whole batch has a part in, [batch, classes]; differentiable in the pixels."""
        if self.route == "statistics":
            return self.logits(pixels)
        affine = {name: value.detach().requires_grad_() for name, value in self._affine.items()}
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            p = F.log_softmax(self.logits(pixels, affine), dim=1)
        loss = -(p.exp() * p).sum(dim=1).mean()
        gradients = torch.autograd.grad(loss, list(affine.values()), create_graph=True)
        stepped = {
            name: value - STEP_LR * gradient
            for (name, value), gradient in zip(affine.items(), gradients, strict=True)
        }
        return self.logits(pixels, stepped)

    def wrong(self, images: Tensor, own: NDArray[np.bool_], truth: Tensor) -> int:
        """Honest samples of uint8 images that are misclassified."""
        predicted = self.coupled(images.to(torch.float32) / 255).argmax(dim=1)
        return int((predicted != truth)[torch.from_numpy(~own)].sum())


def ascend(
    victim: Victim, clean: Tensor, own: NDArray[np.bool_], truth: Tensor, options: AttackOptions
) -> Tensor:
    """The batch with the attacker's samples changed, the others as they were.

    Args:
        victim: what is attacked.
        clean: uint8 [batch, C, H, W].
        own: bool [batch], which samples are the attacker's.
        truth: int64 [batch], labels.
        options: bound and steps.

    Returns:
        uint8 [batch, C, H, W], at most epsilon of the range away from `clean`.
    """
    mine, others = torch.from_numpy(own), torch.from_numpy(~own)
    start = clean[mine].to(torch.float32) / 255
    # Whole grey levels inside the bound, so that rounding at the end does not leave it.
    bound = math.floor(options.epsilon * 255) / 255
    low, high = (start - bound).clamp(min=0), (start + bound).clamp(max=1)
    # Long enough to cross the whole interval with half of the steps.
    length = max(4 * bound / options.steps, 1 / 255)
    base = clean.to(torch.float32) / 255
    changed = start
    for _ in range(options.steps):
        changed = changed.detach().requires_grad_()
        pixels = base.index_put((mine,), changed)
        loss = F.cross_entropy(victim.coupled(pixels)[others], truth[others])
        (gradient,) = torch.autograd.grad(loss, changed)
        changed = torch.minimum(torch.maximum(changed + length * gradient.sign(), low), high)
    result = clean.clone()
    result[mine] = (changed.detach() * 255).round().to(torch.uint8)
    return result
