"""A loop over the samples of a batch that compiles: one node of the graph, however many samples there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Carry = tuple[Tensor, ...]


def fold(body: Callable[[Carry, Carry], Carry], carry: Carry, samples: Carry) -> Carry:
    """``carry = body(carry, sample)`` for one sample after the other.

    Args:
        body: pure, without a gradient; returns arrays of the shapes and dtypes it was given as ``carry``.
        carry: the arrays before the first sample.
        samples: arrays [batch, ...]; the body gets their slices [...].

    Returns:
        The arrays after the last sample.
    """
    if get_proxy_mode() is None:
        for index in range(len(samples[0])):
            carry = body(carry, tuple(array[index] for array in samples))
        return carry

    # A loop over a symbolic number of samples is beyond tracing, but torch has an operator for it, and ONNX has too.
    def step(before: Carry, sample: Carry) -> tuple[Carry, tuple[Tensor]]:
        after = body(before, sample)
        return after, (torch.zeros(()),)

    last: Carry = scan(step, carry, samples)[0]
    return last
