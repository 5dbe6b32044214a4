"""Alignment: the moments of every normalised activation are moved back to the source's, layer after layer.

A normalisation layer gives each channel a mean and a variance that training has made the next layer expect. A shift
changes them. In BatchNorm the remedy is to replace the running statistics; LayerNorm and GroupNorm normalise each
sample by itself and leave the same shift in the channels' means and variances over samples, where an affine change of
the channel undoes it. Both are done here in one forward pass, with what earlier layers were given already in force.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tta_adapters import normalise
from tta_adapters.network import NetworkAdapter
from tta_adapters.select import SelectionError
from tta_adapters.tape import join, scale_and_shift

FLOOR = 1e-5
"""Added to variances, so that a dead channel divides nothing by zero."""
LIMIT = 6.0
"""Largest |log| by which classes may explain a variance, and largest of a shifted one: 1/20 of the contrast."""
OUTLIER = 25.0
"""Largest squared distance of one channel, in squared spreads: one channel must not speak for its layer."""


@dataclass(frozen=True)
class Layer:
    """One aligned layer.

    Attributes:
        name: path of the module.
        tracked: whether theta holds running statistics of it (BatchNorm); else theta holds its affine parameters.
        size: E, how many channels (or elements) have moments of their own.
        start: place of the first of them in a vector over all layers.
        index: place of the layer among all.
    """

    name: str
    tracked: bool
    size: int
    start: int
    index: int

    @property
    def part(self) -> slice:
        """Its place in a vector over all layers."""
        return slice(self.start, self.start + self.size)


class Moments(NamedTuple):
    """What the channels of one layer, or of all layers, look like.

    Attributes:
        mean: [E].
        var: [E], biased.
    """

    mean: Tensor
    var: Tensor


class Reference(NamedTuple):
    """The source's moments over all layers, as vectors.

    Attributes:
        mean: [E].
        var: [E].
        mean_spread: [E], variance between samples of a sample's own mean.
        var_spread: [E], variance between samples of a sample's own mean square about ``mean``, over ``var`` squared.
        class_mean: [C, E], mean where the source predicts a class.
        class_square: [C, E], mean square likewise.
        prior: [C], the source's mean prediction.
        apart: [layers], how far the class that lies furthest from the source is from it, in squared spreads.
    """

    mean: Tensor
    var: Tensor
    mean_spread: Tensor
    var_spread: Tensor
    class_mean: Tensor
    class_square: Tensor
    prior: Tensor
    apart: Tensor


class Aligned(NamedTuple):
    """One aligned pass.

    Attributes:
        logits: [batch, C].
        theta: [P].
        shift: 0-d, mean over layers of the squared distance from the source, in squared spreads of single samples.
        share: 0-d, mean over layers of the share of the shift that was undone.
    """

    logits: Tensor
    theta: Tensor
    shift: Tensor
    share: Tensor


def aligned_layers(adapter: NetworkAdapter) -> list[Layer]:
    """The layers that theta can align, BatchNorms first.

    Raises:
        SelectionError: there is none.
    """
    names = {entry.name: entry.size for entry in adapter.tensors}
    layers: list[Layer] = []
    start = 0
    running = [name for name in names if name.rpartition(".")[2] == "running_mean"]
    weights = [name for name in names if name.rpartition(".")[2] == "weight"]
    for name in (*running, *weights):
        path = name.rpartition(".")[0]
        tracked = name in running
        if not tracked and (join(path, "running_mean") in names or join(path, "bias") not in names):
            continue
        layers.append(Layer(path, tracked, names[name], start, len(layers)))
        start += names[name]
    if not layers:
        raise SelectionError(
            "theta holds neither running statistics nor weight and bias of a normalisation layer"
        )
    return layers


class _Pass:
    """Answers the normalisation calls of one forward pass; ``treat`` decides what a layer's moments become.

    Args:
        tensors: theta by name.
        layers: the aligned ones.
        treat: (layer, x [batch, E, positions], standardised where the layer is not tracked) -> what to use.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        layers: Sequence[Layer],
        treat: Callable[[Layer, Tensor], tuple[Tensor, Tensor] | None],
    ) -> None:
        self._treat = treat
        self._layer_of: dict[int, Layer] = {}
        for layer in layers:
            key = join(layer.name, "running_mean" if layer.tracked else "weight")
            self._layer_of[id(tensors[key])] = layer

    def answers(self) -> dict[Callable[..., Any], Callable[..., Tensor]]:
        """What answers which of torch's functions."""
        return {
            F.batch_norm: self._batch_norm,
            F.layer_norm: self._layer_norm,
            F.group_norm: self._group_norm,
        }

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        weight, bias = scale_and_shift(x, weight, bias)
        if running_mean is None or running_var is None:
            return normalise.batch_norm(x, weight, bias, eps)[0]
        found = self._treat(self._layer_of[id(running_mean)], x.reshape(x.shape[0], x.shape[1], -1))
        mean, var = (running_mean, running_var) if found is None else found
        return normalise.scale_shift(x, mean, var, weight, bias, eps)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        shape = list(normalized_shape)
        layer = self._layer_of.get(id(weight))
        if layer is None:
            return F.layer_norm(x, shape, weight, bias, eps)
        y = F.layer_norm(x, shape, None, None, eps)
        flat = y.reshape(x.shape[0], -1, layer.size).transpose(1, 2)
        return self._affine(layer, y, flat, weight, bias, shape)

    def _group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        layer = self._layer_of.get(id(weight))
        if layer is None:
            return normalise.group_norm(x, num_groups, weight, bias, eps)
        y = normalise.group_norm(x, num_groups, None, None, eps)
        flat = y.reshape(x.shape[0], layer.size, -1)
        return self._affine(layer, y, flat, weight, bias, normalise.channel_shape(x))

    def _affine(
        self,
        layer: Layer,
        y: Tensor,
        flat: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: list[int],
    ) -> Tensor:
        found = self._treat(layer, flat)
        if found is not None:
            weight, bias = found
        if weight is None or bias is None:
            raise SelectionError(f"{layer.name} is called without its weight or bias")
        return y * weight.reshape(shape) + bias.reshape(shape)


def measure(adapter: NetworkAdapter, layers: Sequence[Layer], batches: Sequence[Tensor]) -> Reference:
    """The source's moments, from unlabelled source samples.

    Args:
        adapter: at its source theta.
        layers: from `aligned_layers`.
        batches: x [batch, ...] each.

    Raises:
        ValueError: there is no sample.
        SelectionError: a layer is not called, or twice, or is no normalisation layer.
    """
    if not batches:
        raise ValueError("alignment needs source images to take moments from")
    tensors = adapter.unpack(adapter.source_theta().to(adapter.dtype))
    means: list[Tensor] = []
    squares: list[Tensor] = []
    predictions: list[Tensor] = []
    with torch.no_grad():
        for x in batches:
            seen: dict[str, tuple[Tensor, Tensor]] = {}

            def note(layer: Layer, flat: Tensor, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> None:
                if layer.name in seen:
                    raise SelectionError(f"{layer.name} is called twice: its moments are two, theta has one")
                seen[layer.name] = flat.mean(2), (flat * flat).mean(2)

            logits = adapter.answered(tensors, x, _Pass(tensors, layers, note).answers()).logits
            for layer in layers:
                if layer.name not in seen:
                    raise SelectionError(
                        f"theta holds {layer.name}, but no normalisation by it was seen; auto needs an adapter of "
                        "normalisation layers that are called"
                    )
            means.append(torch.cat([seen[layer.name][0] for layer in layers], 1))
            squares.append(torch.cat([seen[layer.name][1] for layer in layers], 1))
            predictions.append(logits.softmax(1))
        own, square, p = torch.cat(means), torch.cat(squares), torch.cat(predictions)
        mean = own.mean(0)
        var = square.mean(0) - mean * mean
        for layer in layers:  # what BatchNorm was trained with is known better than any sample tells
            if layer.tracked:
                mean[layer.part] = tensors[join(layer.name, "running_mean")].to(mean.dtype)
                var[layer.part] = tensors[join(layer.name, "running_var")].to(var.dtype)
        about = square - 2 * mean * own + mean * mean
        mean_spread = own.var(0, correction=0) + FLOOR
        var_spread = about.var(0, correction=0) / (var + FLOOR).square() + FLOOR
        weight = p / (p.sum(0) + 1e-6)
        class_mean, class_square = weight.T @ own, weight.T @ square
        change = torch.log((_variance(class_mean, class_square) + FLOOR) / (var + FLOOR)).clamp(-LIMIT, LIMIT)
        far = _squared(class_mean - mean, change, mean_spread, var_spread)
        apart = torch.stack([far[:, layer.part].mean(1).amax() for layer in layers])
        return Reference(mean, var, mean_spread, var_spread, class_mean, class_square, p.mean(0), apart)


def align(
    adapter: NetworkAdapter,
    layers: Sequence[Layer],
    theta: Tensor,
    theta0: Tensor,
    x: Tensor,
    weight: Tensor,
    classes: Tensor,
    reference: Reference,
    caution: Tensor,
    even: Tensor,
) -> Aligned:
    """One forward pass in which every layer's moments are moved to the source's, and the theta that does the same.

    For each layer, with samples weighted by w: m, v = mean and variance of the channel; m_ref, v_ref = the source's
    under a mixture of classes; pi = the samples' mean class probabilities. What the classes of the samples explain is
    taken away, m_c = m + t (m_ref(prior) - m_ref(pi)), v_c = v (v_ref(prior) / v_ref(pi))^t. The distance
    d = mean over channels of ((m_c - m_0)^2 / spread_m + log(v_c / v_0)^2 / spread_v) / 2 is compared with what
    chance and wrong classes give without any shift, A = 1 / n + caution * KL(pi || prior) / ln C * D, with D the
    distance of the class that lies furthest from the source by itself: the positive-part James-Stein factor
    a = max(0, 1 - A / d) is the share of the shift that is undone. t = min(1, D / d at t = 0): where the samples are
    farther off than any class is, classes are not why, and what they are predicted as tells little. Where KL / ln C is
    at most ``even``, pi is taken to be the prior, for the same reason.

    Args:
        adapter: whose network runs.
        layers: from `aligned_layers`.
        theta: [P]; what is not aligned is taken from here.
        theta0: [P], the source theta.
        x: [batch, ...].
        weight: [batch], > 0 for samples that count; not all 0.
        classes: [batch, C], what each sample was last predicted as.
        reference: of the source.
        caution: 0-d, see above.
        even: 0-d, see above.

    Source: the estimator is James and Stein, Estimation with Quadratic Loss, 1961, in its positive-part form; moments
    of one layer: Schneider et al., NeurIPS 2020 (BatchNorm); the correction for classes and the affine form for
    LayerNorm and GroupNorm are this project's own, see docs/auto.md.
    """
    tensors = adapter.unpack(theta)
    source = adapter.unpack(theta0)
    w = (weight > 0).to(reference.mean.dtype)
    w = w / w.sum()
    pi = w @ classes
    uneven = _divergence(pi, reference.prior) / math.log(max(2, pi.shape[0]))
    is_even = uneven <= even
    pi = torch.where(is_even, reference.prior, pi)
    chance = (w * w).sum()
    doubt = caution * torch.where(is_even, torch.zeros_like(uneven), uneven)
    here = _mixture(pi, reference)
    usual = _mixture(reference.prior, reference)
    explained = torch.log((usual.var + FLOOR) / (here.var + FLOOR)).clamp(-LIMIT, LIMIT)
    moved: dict[str, Tensor] = {}
    distances: list[Tensor] = []
    shares: list[Tensor] = []

    def treat(layer: Layer, flat: Tensor) -> tuple[Tensor, Tensor]:
        part = layer.part
        mean = w @ flat.mean(2)
        centred = flat - mean[:, None]
        var = w @ (centred * centred).mean(2)
        mean0, var0 = reference.mean[part], reference.var[part]
        offset, change = mean - mean0, torch.log((var + FLOOR) / (var0 + FLOOR))
        spreads = reference.mean_spread[part], reference.var_spread[part]
        plain = _squared(offset, change.clamp(-LIMIT, LIMIT), *spreads).mean()
        outermost = reference.apart[layer.index]
        trust = torch.minimum(outermost / (plain + 1e-12), torch.ones_like(plain))
        offset = offset + trust * (usual.mean - here.mean)[part]
        change = (change + trust * explained[part]).clamp(-LIMIT, LIMIT)
        distance = _squared(offset, change, *spreads).mean()
        share = torch.relu(1 - (chance + doubt * outermost) / (distance + 1e-12))
        distances.append(distance)
        shares.append(share)
        mean, ratio = mean0 + share * offset, torch.exp(share * change)
        if layer.tracked:
            var = torch.relu((var0 + FLOOR) * ratio - FLOOR)
            moved[join(layer.name, "running_mean")] = mean
            moved[join(layer.name, "running_var")] = var
            return mean, var
        name_weight, name_bias = join(layer.name, "weight"), join(layer.name, "bias")
        scale = torch.rsqrt(ratio)
        new = source[name_weight].reshape(-1) * scale
        bias = source[name_bias].reshape(-1) + source[name_weight].reshape(-1) * mean0 - new * mean
        moved[name_weight] = new.reshape(source[name_weight].shape)
        moved[name_bias] = bias.reshape(source[name_bias].shape)
        return new, bias

    out = adapter.answered(tensors, x, _Pass(tensors, layers, treat).answers())
    proposed = adapter.pack({**tensors, **moved})
    return Aligned(out.logits, proposed, torch.stack(distances).mean(), torch.stack(shares).mean())


def _squared(offset: Tensor, change: Tensor, mean_spread: Tensor, var_spread: Tensor) -> Tensor:
    """Squared distances of channels from the source, [..., E], in squared spreads of single samples.

    Args:
        offset: [..., E], of the mean.
        change: [..., E], of the log variance.
        mean_spread: [E], of the source.
        var_spread: [E], likewise.
    """
    squares = offset * offset / mean_spread, change * change / var_spread
    first, second = (torch.minimum(each, torch.full_like(each, OUTLIER)) for each in squares)
    return 0.5 * (first + second)


def _variance(mean: Tensor, square: Tensor) -> Tensor:
    """From mean and mean square, not below 0."""
    return torch.relu(square - mean * mean)


def _mixture(pi: Tensor, reference: Reference) -> Moments:
    """The source's moments if classes came in these proportions."""
    mean = pi @ reference.class_mean
    return Moments(mean, _variance(mean, pi @ reference.class_square))


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two distributions [C], in nats, 0-d."""
    return (p * torch.log((p + 1e-12) / (q + 1e-12))).sum()
