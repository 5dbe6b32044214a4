"""How the methods of an evaluation compare with the frozen source model. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tta_edge.evaluate import NO_SHIFT, Evaluation, Row
from tta_edge.streams.measures import gap_recovered

CLEAR = 2.0
"""A difference is called clear from so many standard errors on."""

Sign = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Difference:
    """An error minus that of the frozen source on the same images, as fractions: negative is better.

    Attributes:
        value: the difference.
        standard_error: over the images, paired; None for a single image, which says nothing about the spread.
    """

    value: float
    standard_error: float | None

    @property
    def sign(self) -> Sign:
        """Better or worse where the difference is clear (see `CLEAR`)."""
        if self.standard_error is None or abs(self.value) <= CLEAR * self.standard_error:
            return "unclear"
        return "better" if self.value < 0 else "worse"


@dataclass(frozen=True)
class Cell:
    """One method under one shift.

    Attributes:
        row: the evaluation's row.
        difference: to the frozen source; None for itself, and where it was not evaluated.
        gap_recovered: see `measures.gap_recovered`; None without a clean row, for that row, and where the shift
            took nothing.
        best: no method has a lower error under this shift.
    """

    row: Row
    difference: Difference | None
    gap_recovered: float | None
    best: bool


@dataclass(frozen=True)
class MethodSummary:
    """One method over the whole evaluation.

    Attributes:
        name: the method's.
        error: mean over the shifts; of the stream as it is where there is no shift.
        clean: error on the stream as it is; None where that was not evaluated.
        difference: of `error` to that of the frozen source; None as in a cell.
        gap_recovered: mean over the shifts that have one; None if none has.
        cells: for each shift, in order.
    """

    name: str
    error: float
    clean: float | None
    difference: Difference | None
    gap_recovered: float | None
    cells: tuple[Cell, ...]

    @property
    def adapted(self) -> int:
        """Batches that changed theta."""
        return sum(cell.row.adapted for cell in self.cells)

    @property
    def refused(self) -> int:
        """Steps that were thrown away."""
        return sum(cell.row.refused for cell in self.cells)


def compare(evaluation: Evaluation) -> tuple[MethodSummary, ...]:
    """The methods in the plan's order, each against the frozen source on the same images."""
    return tuple(_summary(evaluation, method) for method in evaluation.plan.methods)


def paired_difference(wrong: Sequence[NDArray[np.bool_]], source: Sequence[NDArray[np.bool_]]) -> Difference:
    """Mean difference of two errors over the same images, with its paired standard error.

    The images are the sample: what one image gives under several shifts is averaged first, because those values
    depend on each other. Standard error: the standard deviation of that mean difference over the images, with
    n - 1 in the denominator, divided by the root of n.

    Args:
        wrong: for each shift [n], whether each prediction of the method was wrong.
        source: the same of the frozen source, image by image.
    """
    each = np.mean(np.stack(wrong).astype(np.float64) - np.stack(source), axis=0)
    n = len(each)
    return Difference(float(each.mean()), float(each.std(ddof=1)) / math.sqrt(n) if n > 1 else None)


def _summary(evaluation: Evaluation, method: str) -> MethodSummary:
    frozen = evaluation.frozen
    counted = evaluation.shifted_rows_of(method)
    difference = None
    if frozen is not None and method != frozen:
        source = evaluation.shifted_rows_of(frozen)
        difference = paired_difference([row.wrong for row in counted], [row.wrong for row in source])
    cells = tuple(_cell(evaluation, k, row) for k, row in enumerate(evaluation.rows_of(method)))
    gaps = [cell.gap_recovered for cell in cells if cell.gap_recovered is not None]
    return MethodSummary(
        method,
        sum(row.error for row in counted) / len(counted),
        _clean(evaluation, method),
        difference,
        sum(gaps) / len(gaps) if gaps else None,
        cells,
    )


def _cell(evaluation: Evaluation, k: int, row: Row) -> Cell:
    """The cell of the row, which belongs to shift number k."""
    rivals = [evaluation.rows_of(method)[k] for method in evaluation.plan.methods]
    best = row.error == min(rival.error for rival in rivals)
    if evaluation.frozen is None or row.method == evaluation.frozen:
        return Cell(row, None, None, best)
    source = evaluation.rows_of(evaluation.frozen)[k]
    clean = _clean(evaluation, evaluation.frozen)
    gap = None
    if clean is not None and row.shift != NO_SHIFT:
        gap = gap_recovered(1 - clean, 1 - source.error, 1 - row.error)
    return Cell(row, paired_difference([row.wrong], [source.wrong]), gap, best)


def _clean(evaluation: Evaluation, method: str) -> float | None:
    """The method's error on the stream as it is."""
    return next((row.error for row in evaluation.rows_of(method) if row.shift == NO_SHIFT), None)
