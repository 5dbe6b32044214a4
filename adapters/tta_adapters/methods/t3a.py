"""T3A: the classifier's rows are replaced by means of confident test features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, MethodSpec, State, StateSpec, Step
from tta_adapters.losses import entropy
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import whole
from tta_adapters.select import SelectionError

EMPTY = 1e4
"""Entropy of a place that holds no support; larger than any real one and finite, as everything in a state must be."""


class T3a:
    """Keeps for each class the ``supports`` features with the lowest entropies and classifies by their normalised mean.

    Supports begin as the classifier's weight rows, labelled and ranked by the network's own prediction on them. A
    batch's features join under their pseudo-labels, the surplus with the highest entropies is dropped, then
    z_c = f . normalise(sum of normalised supports of class c). Theta stays the source's.

    Trained: nothing. Forwards / backwards per sample: 1 / 0. Needs source data: no. Returns logits of the prototypes,
    this batch's features among them.

    Defaults: 20 supports for any architecture; others take up to 100. No threshold, no learning rate.

    Source: Iwasawa and Matsuo, Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization,
    NeurIPS 2021, eq. 4 to 6.
    """

    def __init__(self, adapter: NetworkAdapter, *, supports: float = 20.0) -> None:
        self._supports = whole("t3a.supports", supports)
        weight = adapter.head_weight()
        if weight is None:
            raise SelectionError("t3a replaces a linear classifier and this network ends with none")
        self.adapter = adapter
        self._weight, self._bias = weight
        classes, width = self._weight.shape
        places = classes * self._supports
        self.spec = MethodSpec(
            "t3a",
            f"prototypes of the {self._supports} most certain features of each class, nothing learned",
            state=(
                StateSpec("features", (places, width)),
                StateSpec("entropies", (places,)),
                StateSpec("known", ()),
            ),
            report=("entropy", "accepted", "filled"),
            trains=False,
            forwards=1.0,
            backwards=0.0,
        )

    def anchor(self) -> dict[str, Tensor]:
        """``t3a.features`` [C * K, F] and ``t3a.entropies`` [C * K]: the supports before the first batch."""
        with torch.no_grad():
            logits = self._weight @ self._weight.t() + self._bias
            empty = torch.full((self._weight.shape[0] * self._supports,), EMPTY)
            features, entropies = self._keep(
                self._weight.new_zeros((len(empty), self._weight.shape[1])),
                empty.to(self._weight.dtype),
                self._weight,
                entropy(logits),
                logits.argmax(1),
            )
        return {"t3a.features": features.to(torch.float32), "t3a.entropies": entropies.to(torch.float32)}

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        """One pass, the supports' turnover, prototypes; theta is returned as it came."""
        with torch.no_grad():
            out = self.adapter.forward(self.adapter.unpack(theta), batch.x)
            known = state["known"] > 0
            features = torch.where(known, state["features"], anchor["t3a.features"])
            entropies = torch.where(known, state["entropies"], anchor["t3a.entropies"])
            # A refused sample is ranked behind every place, so it is never kept.
            rank = torch.where(
                batch.weight > 0, entropy(out.logits), torch.full_like(batch.weight, 2 * EMPTY)
            )
            features, entropies = self._keep(features, entropies, out.features, rank, out.logits.argmax(1))
            filled = (entropies < EMPTY).to(theta.dtype)
            unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-12)
            classes = self._weight.shape[0]
            sums = (unit * filled[:, None]).reshape(classes, self._supports, -1).sum(1)
            prototypes = sums / (torch.linalg.vector_norm(sums, dim=1, keepdim=True) + 1e-12)
            logits = out.features @ prototypes.t()
            seen = batch.weight.sum() > 0
            moved: State = {
                "features": torch.where(seen, features, state["features"]),
                "entropies": torch.where(seen, entropies, state["entropies"]),
                "known": torch.where(seen, torch.ones_like(state["known"]), state["known"]),
            }
            report = torch.stack(
                [entropy(logits).mean(), (batch.weight > 0).to(theta.dtype).mean(), filled.mean()]
            )
        return Step(logits, theta, moved, report)

    def _keep(
        self, features: Tensor, entropies: Tensor, new: Tensor, rank: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The K lowest entropies of each class among its K places and the new features of that label.

        Args:
            features: [C * K, F], the places, class by class.
            entropies: [C * K], ``EMPTY`` where a place is free.
            new: [batch, F].
            rank: [batch], entropies.
            labels: [batch], pseudo-labels.
        """
        classes, places = self._weight.shape[0], self._supports
        mine = labels[None, :] == torch.arange(classes)[:, None]  # [C, batch]
        candidates = torch.cat(
            [
                entropies.reshape(classes, places),
                torch.where(mine, rank[None, :], torch.full_like(rank, 2 * EMPTY)[None, :]),
            ],
            dim=1,
        )
        kept, index = torch.topk(candidates, places, dim=1, largest=False)
        # Candidate j of class c is place c * K + j of the pool, or new feature j - K behind all places.
        first = torch.arange(classes)[:, None] * places
        index = torch.where(index < places, first + index, classes * places + index - places)
        pool = torch.cat([features, new])
        return pool[index.reshape(-1)], kept.reshape(-1)
