"""The norm adapter: theta is the affine parameters and running statistics of normalisation layers.

No module of the user's network is replaced. While the adapter runs the network, calls of torch's normalisation (and
attention) functions are answered by those of :mod:`tta_adapters.normalise` and :mod:`tta_adapters.attention`, so
subclasses that wrap them (activation fused, channels last, ...) keep working.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tta_adapters import normalise
from tta_adapters.attention import attention
from tta_adapters.base import Forward, Statistics, ThetaTensor
from tta_adapters.select import Selected, SelectionError, describe, select_modules

NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class NormAdapter:
    """Theta = weight and bias of the selected normalisation layers, then running mean and variance of all BatchNorms.

    The affine parameters come first and are trained; the statistics follow, so that an edge that only serves still
    carries everything its BatchNorms need and works at batch 1. Statistics belong to theta for *every* BatchNorm,
    selected or not: a shift reaches all layers.

    Args:
        model: the network, [batch, ...] -> logits [batch, classes]; it is copied, put in eval mode and frozen.
        include: shell patterns of module paths whose affine parameters are trained.
        exclude: shell patterns to leave out, e.g. "layer4*".
        preprocess: applied to the input before the network, e.g. from 0..255 to the network's own normalisation.
        head: path of the classifier, whose input is reported as features; by default the last nn.Linear.
        classes: C, the length of the logits; by default the outputs of the classifier.
        input_range: smallest and largest value that users send.
        input_shape: of one input, without the batch; None where it is not known.

    Raises:
        SelectionError: the patterns select no normalisation layer, or ``head`` does not exist.
    """

    name = "norm"

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preprocess: Callable[[Tensor], Tensor] | None = None,
        head: str | None = None,
        classes: int | None = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        self._preprocess = preprocess
        self._input_range = input_range
        self.input_shape = input_shape
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        floating = [value.dtype for value in self.module.parameters() if value.is_floating_point()]
        self.dtype = floating[0] if floating else torch.float32
        self.selection: list[Selected] = select_modules(
            self.module, NORM_TYPES, include=include, exclude=exclude
        )
        self._head = _find_head(self.module, head)
        self._classes = classes or getattr(self._head, "out_features", None)
        self._batch_norms = {
            name: module for name, module in self.module.named_modules() if isinstance(module, _BATCH_NORMS)
        }
        self._source: dict[str, Tensor] = {}
        self.tensors: list[ThetaTensor] = []
        for item in self.selection:
            for kind in ("weight", "bias"):
                self._add(item.name, kind, getattr(item.module, kind, None), trained=True)
        if not self.tensors:
            raise SelectionError("the selected normalisation layers have no affine parameters to train")
        # All means, then all variances: following the batch is then one operation on one contiguous piece.
        for kind, attribute in (("mean", "running_mean"), ("var", "running_var")):
            for name, module in self._batch_norms.items():
                self._add(name, kind, getattr(module, attribute), trained=False)

    def _add(self, prefix: str, kind: str, value: Tensor | None, *, trained: bool) -> None:
        if value is None:
            return
        attribute = {"mean": "running_mean", "var": "running_var"}.get(kind, kind)
        name = f"{prefix}.{attribute}" if prefix else attribute
        self.tensors.append(ThetaTensor(name, tuple(value.shape), kind, trained, self.size))
        self._source[name] = value.detach().to(torch.float32).clone()

    @property
    def size(self) -> int:
        """P, the length of theta."""
        return sum(entry.size for entry in self.tensors)

    @property
    def trained(self) -> int:
        """Length of the leading, trained part of theta."""
        return sum(entry.size for entry in self.tensors if entry.trained)

    @property
    def classes(self) -> int:
        """C, the length of the logits.

        Raises:
            SelectionError: the network has no linear classifier and ``classes`` was not given.
        """
        if self._classes is None:
            raise SelectionError("the number of classes is unknown: give `classes`, or the `head`")
        return int(self._classes)

    def to_unit(self, x: Tensor) -> Tensor:
        """What users send as floating point numbers in 0..1."""
        low, high = self._input_range
        return (x.to(self.dtype) - low) * (1.0 / (high - low))

    def from_unit(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`to_unit`, but for the dtype."""
        low, high = self._input_range
        return low + (high - low) * x

    def head_weight(self) -> tuple[Tensor, Tensor] | None:
        """Weight [C, F] and bias [C] (zeros where it has none) of the linear classifier; None if there is none."""
        if not isinstance(self._head, nn.Linear):
            return None
        bias = self._head.bias
        return self._head.weight, bias if bias is not None else torch.zeros(len(self._head.weight))

    @property
    def has_running_statistics(self) -> bool:
        """Whether theta holds running statistics (the network has BatchNorm layers that track them)."""
        return any(entry.kind == "mean" for entry in self.tensors)

    def describe(self) -> str:
        """The selection as a printable table."""
        return describe(self.selection)

    def source_theta(self) -> Tensor:
        """[P] float32, the values the network was trained with."""
        return torch.cat([self._source[entry.name].reshape(-1) for entry in self.tensors])

    def unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """Slices of theta [P] by name, in their own shapes; trained ones are leaves that require a gradient."""
        slices: dict[str, Tensor] = {}
        pieces = torch.split(theta, [entry.size for entry in self.tensors])
        for entry, piece in zip(self.tensors, pieces, strict=True):
            value = piece.reshape(entry.shape)
            slices[entry.name] = value.detach().requires_grad_(True) if entry.trained else value
        return slices

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`unpack`: [P] float32."""
        return torch.cat([tensors[entry.name].reshape(-1) for entry in self.tensors])

    def forward(
        self, tensors: Mapping[str, Tensor], x: Tensor, *, statistics: Statistics = "running"
    ) -> Forward:
        """Runs the network with theta given by name; see :class:`tta_adapters.base.Forward`.

        Args:
            tensors: what :meth:`unpack` returned.
            x: [batch, ...].
            statistics: see :data:`tta_adapters.base.Statistics`; layers that never tracked running statistics
                always use the batch's.
        """
        tape = _NormTape(tensors, self._batch_norms, statistics)
        features: list[Tensor] = []
        hooks = []
        if self._head is not None:
            hooks.append(
                self._head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1)))
            )
        if self._preprocess is not None:
            x = self._preprocess(x)
        # A network in float64 is the oracle of parity checks; its inputs arrive as users send them.
        x = x.to(self.dtype)
        try:
            with tape:
                logits = torch.func.functional_call(self.module, dict(tensors), (x,))
        finally:
            for hook in hooks:
                hook.remove()
        return Forward(logits, features[-1] if features else logits, tape.recorded)

    def batch_statistics(self, recorded: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The batch's statistics in the order of theta's untrained part, [P - T] float32.

        Args:
            recorded: ``Forward.statistics`` of a pass that computed batch statistics.
        """
        tracked = [name for name, module in self._batch_norms.items() if module.running_mean is not None]
        return torch.cat([recorded[name][index] for index in (0, 1) for name in tracked])


def statistics_gap(running: Tensor, observed: Tensor) -> Tensor:
    """How far a batch lies from the running statistics: mean over channels of |difference of means| / std.

    It tells how different the normalisation a step learned under is from the one that serves between steps.

    Args:
        running: [2 M] float32, M means then M variances, as in theta's untrained part.
        observed: [2 M] float32, the batch's, in the same order.

    Returns:
        0-d, in units of the running standard deviation.
    """
    half = running.shape[0] // 2
    # The offset only keeps a dead channel (variance 0) from dividing by zero.
    return ((observed[:half] - running[:half]).abs() * torch.rsqrt(running[half:] + 1e-5)).mean()


def _join(prefix: str, attribute: str) -> str:
    return f"{prefix}.{attribute}" if prefix else attribute


def _find_head(module: nn.Module, head: str | None) -> nn.Module | None:
    """The classifier: the module named, else the last nn.Linear, else None (features are then the logits)."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if head is not None:
        if head not in modules:
            raise SelectionError(
                f"head {head!r} is no module of the network; modules end with {list(modules)[-3:]}"
            )
        return modules[head]
    linears = [value for value in modules.values() if isinstance(value, nn.Linear)]
    return linears[-1] if linears else None


class _NormTape(TorchFunctionMode):
    """Answers normalisation calls of one forward pass and records the batch statistics of each BatchNorm."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        batch_norms: Mapping[str, nn.Module],
        statistics: Statistics,
    ) -> None:
        super().__init__()
        self.recorded: dict[str, tuple[Tensor, Tensor]] = {}
        self._statistics = statistics
        # A call is matched to its layer by the identity of a tensor that functional_call put there: running mean
        # where tracked, else the weight.
        self._layer_of: dict[int, str] = {}
        for name in batch_norms:
            for attribute in ("running_mean", "weight"):
                tensor = tensors.get(_join(name, attribute))
                if tensor is not None:
                    self._layer_of[id(tensor)] = name
        self._answers: dict[Callable[..., Any], Callable[..., Tensor]] = {
            F.batch_norm: self._batch_norm,
            F.layer_norm: self._layer_norm,
            F.group_norm: self._group_norm,
            F.rms_norm: self._rms_norm,
            F.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        answer = self._answers.get(func)
        return answer(*args, **(kwargs or {})) if answer else func(*args, **(kwargs or {}))

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
        channels = x.shape[1]
        weight = torch.ones(channels) if weight is None else weight
        bias = torch.zeros(channels) if bias is None else bias
        if running_mean is None or running_var is None:
            return normalise.batch_norm(x, weight, bias, eps)[0]
        if isinstance(self._statistics, str) and self._statistics == "running":
            return normalise.scale_shift(x, running_mean, running_var, weight, bias, eps)
        layer = self._layer_of[id(running_mean)]
        if isinstance(self._statistics, str):
            y, mean, var = normalise.batch_norm(x, weight, bias, eps)
            self.recorded[layer] = (mean, var)
            return y
        mean, var = normalise.moments(x)
        self.recorded[layer] = (mean.detach(), var.detach())
        share = self._statistics
        mean, var = (1 - share) * running_mean + share * mean, (1 - share) * running_var + share * var
        return normalise.scale_shift(x, mean, var, weight, bias, eps)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa or not _wants_gradient(query, key, value):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        if not _wants_gradient(x, weight, bias):
            return F.layer_norm(x, list(normalized_shape), weight, bias, eps)
        return normalise.layer_norm(x, len(normalized_shape), weight, bias, eps)

    def _group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        return normalise.group_norm(x, num_groups, weight, bias, eps)

    def _rms_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        epsilon = torch.finfo(x.dtype).eps if eps is None else eps
        return normalise.layer_norm(x, len(normalized_shape), weight, None, epsilon, centred=False)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
