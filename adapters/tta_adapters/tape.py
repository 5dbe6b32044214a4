"""Answers to calls of torch's functions while a network runs.

No module of the user's network is replaced. While an adapter runs the network, calls of torch's normalisation (and
attention) functions are answered by those of :mod:`tta_adapters.normalise` and :mod:`tta_adapters.attention`, so
subclasses that wrap them (activation fused, channels last, ...) keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tta_adapters import normalise
from tta_adapters.attention import attention
from tta_adapters.base import Blend, Statistics


def join(prefix: str, attribute: str) -> str:
    """The name of a module's tensor: path and attribute joined, where there is a path."""
    return f"{prefix}.{attribute}" if prefix else attribute


def scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift of x [batch, C, ...], [C] each: 1 and 0 for a normalisation that has none."""
    channels = x.shape[1]
    return (
        torch.ones(channels, dtype=x.dtype) if weight is None else weight,
        torch.zeros(channels, dtype=x.dtype) if bias is None else bias,
    )


class Tape(TorchFunctionMode):
    """Answers normalisation calls of one forward pass and records the batch statistics of each BatchNorm.

    Args:
        tensors: theta by name.
        batch_norms: the network's BatchNorms by path.
        statistics: see :data:`tta_adapters.base.Statistics`.
        answers: further functions of torch and what answers their calls.

    Attributes:
        recorded: by path of the BatchNorm, mean [C] and biased variance [C] of the batch.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        batch_norms: Mapping[str, nn.Module],
        statistics: Statistics,
        answers: Mapping[Callable[..., Any], Callable[..., Tensor]],
    ) -> None:
        super().__init__()
        self.recorded: dict[str, tuple[Tensor, Tensor]] = {}
        self._statistics = statistics
        # A call is matched to its layer by the identity of a tensor that functional_call put there: running mean
        # where tracked, else the weight.
        self._layer_of: dict[int, str] = {}
        for name in batch_norms:
            for attribute in ("running_mean", "weight"):
                tensor = tensors.get(join(name, attribute))
                if tensor is not None:
                    self._layer_of[id(tensor)] = name
        self._answers: dict[Callable[..., Any], Callable[..., Tensor]] = {
            F.batch_norm: self._batch_norm,
            F.layer_norm: self._layer_norm,
            F.group_norm: self._group_norm,
            F.rms_norm: self._rms_norm,
            F.scaled_dot_product_attention: self._attention,
            **answers,
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
        weight, bias = scale_and_shift(x, weight, bias)
        if running_mean is None or running_var is None:
            return normalise.batch_norm(x, weight, bias, eps)[0]
        if isinstance(self._statistics, str) and self._statistics == "running":
            return normalise.scale_shift(x, running_mean, running_var, weight, bias, eps)
        layer = self._layer_of[id(running_mean)]
        if isinstance(self._statistics, str):
            if self._statistics == "batch":
                y, mean, var = normalise.batch_norm(x, weight, bias, eps)
            else:
                y, mean, var = normalise.renorm(x, running_mean, running_var, weight, bias, eps)
            self.recorded[layer] = (mean, var)
            return y
        blend = self._statistics
        share, samples = blend if isinstance(blend, Blend) else (blend, None)
        if samples is not None or _wants_gradient(x, weight, bias):
            y, mean, var = normalise.blended_norm(
                x, running_mean, running_var, weight, bias, share, eps, samples
            )
            self.recorded[layer] = (mean, var)
            return y
        mean, var = normalise.moments(x)
        self.recorded[layer] = (mean.detach(), var.detach())
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
