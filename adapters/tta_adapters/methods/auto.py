"""Auto: the moments of every layer are moved back to the source's, as far as evidence goes; nothing by gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tta_adapters.align import Reference, align, aligned_layers, measure
from tta_adapters.base import Batch, Hyper, MethodSpec, State, Step
from tta_adapters.losses import entropy
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import whole

ANCHORS = Reference._fields


class Auto:
    """Aligns the channels of every normalisation layer with the source's; ``docs/auto.md`` says how.

    A step takes a window of recent samples that the host keeps, balanced by predicted class, and as ``target`` what
    each of them was last predicted as. BatchNorm gets other running statistics; LayerNorm and GroupNorm, which have
    none, get the affine parameters that do the same. How much of a shift is undone follows from how far it is
    beyond what chance and an uneven window explain. When to step, when to rest and when to start over is the host's to
    decide. The same defaults serve BatchNorm, GroupNorm and LayerNorm: no entropy is compared with anything, so
    nothing scales with ln C, and there is no learning rate.

    Trained: norm affine or running statistics, in closed form. Forwards / backwards per sample: 1 / 0. Needs source
    data: a few hundred unlabelled images, once, when the bundle is built. Returns the logits of theta *after* the
    update.

    Source: this project's own, docs/auto.md; parts: Schneider et al., NeurIPS 2020 (moments of BatchNorm), James and
    Stein, 1961 (how much of a shift to believe).
    """

    def __init__(
        self, adapter: NetworkAdapter, *, window: float = 128.0, caution: float = 1.0, even: float = 0.025
    ) -> None:
        samples = whole("auto.window", window, 16)
        self.adapter = adapter
        self._layers = aligned_layers(adapter)
        self._reference: Reference | None = None
        self.spec = MethodSpec(
            "auto",
            "moments of every layer moved back to the source's as far as evidence goes, no gradient",
            hyper=(
                Hyper("caution", caution, "distance that an uneven window is trusted to make by itself", 0.0),
                Hyper(
                    "even", even, "unevenness, in units of ln C, up to which classes are not looked at", 0.0
                ),
            ),
            report=("entropy", "accepted", "shift", "share", "update_norm"),
            logits="after",
            min_batch=2,
            target=True,
            window=samples,
            forwards=1.0,
            backwards=0.0,
        )

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measures the source's moments.

        Args:
            batches: x [batch, ...] each, unlabelled.

        Raises:
            ValueError: there is no batch.
        """
        self._reference = measure(self.adapter, self._layers, list(batches))

    def anchor(self) -> dict[str, Tensor]:
        """``theta0`` [P] and the source's moments over all layers: vectors [E], by class [C, E], the prior [C].

        Raises:
            ValueError: `calibrate` was not called.
        """
        if self._reference is None:
            raise ValueError("auto needs source images to take moments from")
        named = zip(ANCHORS, self._reference, strict=True)
        return {
            "theta0": self.adapter.source_theta(),
            **{f"auto.{name}": value.to(torch.float32) for name, value in named},
        }

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        """One pass over the window.

        Raises:
            ValueError: there is no target.
        """
        if batch.target is None:
            raise ValueError("auto needs what its samples were predicted as: give the batch a target")
        setting = self.spec.unpack_hyper(hyper)
        with torch.no_grad():
            present = (batch.weight > 0).to(theta.dtype)
            seen = present.sum() > 0
            counted = torch.where(seen, present, torch.ones_like(present))
            out = align(
                self.adapter,
                self._layers,
                theta,
                anchor["theta0"],
                batch.x,
                counted,
                batch.target.softmax(1),
                Reference(*(anchor[f"auto.{name}"] for name in ANCHORS)),
                setting["caution"],
                setting["even"],
            )
            proposed = torch.where(seen, out.theta, theta)
            report = torch.stack(
                [
                    entropy(out.logits).mean(),
                    present.mean(),
                    out.shift,
                    out.share,
                    torch.linalg.vector_norm(proposed - theta),
                ]
            )
        return Step(out.logits, proposed, {}, report)
