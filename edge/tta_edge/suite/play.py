"""A player against a stream: what was wrong, what it cost, whether the predictions lost their variety."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tta_edge.monitor import diversity
from tta_edge.streams.preprocess import Preprocess
from tta_edge.streams.source import Images
from tta_edge.suite.images import render, truth
from tta_edge.suite.order import Labels, Order
from tta_edge.suite.players import Player

LAST = 4
"""Collapse is looked for in the last of so many parts of a stream."""


@dataclass(frozen=True, eq=False)
class Played:
    """How a player answered a stream.

    Attributes:
        wrong: [counted samples] bool, in order of arrival.
        forwards: cost of the whole stream in forward-equivalents; None where it is not known.
        adapted: batches that changed theta.
        refused: batches of which something was thrown away.
        diversity: entropy of the distribution of predicted classes over the counted samples of the last quarter, as a
            fraction of ln C.
        true_diversity: the same of the true classes.
    """

    wrong: NDArray[np.bool_]
    forwards: float | None
    adapted: int
    refused: int
    diversity: float
    true_diversity: float


def play(
    order: Order,
    images: Mapping[str, Images],
    labels: Labels,
    player: Player,
    to_input: Preprocess,
    *,
    classes: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Played:
    """Let a player, as new, answer a stream from its beginning to its end.

    Args:
        order: the stream.
        images: domain -> uint8 [images, height, width, channels].
        labels: domain -> [images].
        player: answers.
        to_input: from images to the model's input.
        classes: of the model.
        seed: of frames of noise.
        progress: told of the samples of each batch.

    Raises:
        TtaError: what the player raises.
    """
    player.reset()
    predictions = np.empty(order.samples, dtype=np.int64)
    forwards: float | None = 0.0
    adapted = refused = start = 0
    for size in order.sizes:
        stop = start + int(size)
        answered = player.answer(render(order, images, start, stop, to_input, seed))
        predictions[start:stop] = predicted_classes(answered.logits)
        forwards = None if forwards is None or answered.forwards is None else forwards + answered.forwards
        adapted += answered.adapted
        refused += answered.refused
        start = stop
        if progress is not None:
            progress(int(size))
    true = truth(order, labels)
    wrong = (predictions != true)[order.counted]
    last = slice(-max(1, len(wrong) // LAST), None)
    return Played(
        wrong,
        forwards,
        adapted,
        refused,
        variety(predictions[order.counted][last], classes),
        variety(true[order.counted][last], classes),
    )


def predicted_classes(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """[batch], the class of each sample; -1, which is wrong, where the logits are not all finite."""
    classes: NDArray[np.int64] = np.nan_to_num(logits, nan=0.0).argmax(axis=1)
    classes[~np.isfinite(logits).all(axis=1)] = -1
    return classes


def variety(values: NDArray[np.int64], classes: int) -> float:
    """Entropy of the distribution of classes, as a fraction of ln C; values outside count for none.

    Args:
        values: [n].
        classes: C.

    Returns:
        0 for one class or no value, 1 for all classes equally often.
    """
    counts = np.bincount(values[values >= 0], minlength=classes).astype(np.float64)
    return diversity(counts) if counts.sum() else 0.0
