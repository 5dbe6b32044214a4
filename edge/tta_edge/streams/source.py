"""What a source is: images by index, with labels where there are any, and the shifts it holds ready made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import InputMismatch, ShiftNotGiven
from tta_edge.streams.shifts import COMMON, NAMES, Shift, parse_shifts, prepare
from tta_runtime.errors import did_you_mean

Images = NDArray[np.uint8]
Reader = Callable[[NDArray[np.intp]], Images]
Shifted = Callable[[NDArray[np.intp], int], Images]
"""(indices, place in the stream of the first) -> the images at those indices, shifted."""

SEVERITIES = 5


@dataclass(frozen=True, eq=False)
class Source:
    """Images by index, with labels where there are any.

    Attributes:
        name: as the user wrote it.
        count: how many images.
        shape: (height, width, channels) of each; channels 1 or 3.
        read: indices -> uint8 [len(indices), height, width, channels]; images on disk are decoded only here.
        labels: [count], or None.
        class_names: what the labels mean, by label; None where the source does not say.
        given: the shifts that the source holds ready made. A source with such shifts has no unshifted images.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Reader
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    given: Mapping[Shift, Reader] = field(default_factory=dict)

    @property
    def sorted_by_class(self) -> bool:
        """Whether the images of one class all come before those of the next, as folders give them."""
        return (
            self.labels is not None
            and self.labels[0] != self.labels[-1]
            and bool((np.diff(self.labels) >= 0).all())
        )

    def parse(self, text: str | None) -> tuple[Shift | None, ...]:
        """The shifts of a command line for this source; None stands for the images as they are.

        Without a text a source is taken as it is: unshifted, or all its ready-made shifts. `all` is the
        fifteen common corruptions; of a source with ready-made shifts, those of the fifteen that it holds.

        Raises:
            UnknownShift, BadSeverity: a misspelt item.
            ShiftNotGiven: the source has ready-made shifts, and not this one.
        """
        if not self.given:
            return (None,) if text is None else parse_shifts(text)
        if text is None:
            return tuple(self.given)
        held = {shift.name for shift in self.given}
        common = [name for name in COMMON if name in held]
        shifts = parse_shifts(text, names=tuple(dict.fromkeys((*held, *NAMES))), common=common)
        for shift in shifts:
            self._given(shift)
        if not shifts:
            raise ShiftNotGiven(f"{self.name} holds none of the fifteen common corruptions", _holds(held))
        return shifts

    def shifted(self, shift: Shift | None, seed: int) -> Shifted:
        """How to get the images under a shift: ready made where the source holds it, computed otherwise.

        Args:
            shift: None for the images as they are.
            seed: of the computed shift.

        Raises:
            ShiftNotGiven: the source has ready-made shifts, and not this one.
            StreamError: what `prepare` raises.
        """
        if self.given:
            reader = self._given(shift)
            return lambda indices, _: reader(indices)
        if shift is None:
            return lambda indices, _: self.read(indices)
        corruption = prepare(shift, self.shape, seed)
        return lambda indices, first: corruption(self.read(indices), first)

    def _given(self, shift: Shift | None) -> Reader:
        if shift is None or shift not in self.given:
            held = {each.name for each in self.given}
            asked = "no unshifted images" if shift is None else f"no {shift}"
            raise ShiftNotGiven(f"{self.name} holds {asked}", _holds(held))
        return self.given[shift]


def _holds(names: set[str]) -> str:
    return f"It holds {', '.join(sorted(names))}, severities 1 to {SEVERITIES}"


def align_labels(source: Source, classes: int, class_names: Sequence[str] | None) -> NDArray[np.int64] | None:
    """The source's labels as the model counts its classes.

    Folders are matched with the model's classes by name, or by number when all folders are numbers; a source
    without names, or a model without names and with as many classes as the source, is taken in order.

    Args:
        source: labels and names.
        classes: how many the model has.
        class_names: the model's, or None.

    Returns:
        [count], each below `classes`; None if the source has no labels.

    Raises:
        InputMismatch: the names or the labels do not fit.
    """
    if source.labels is None:
        return None
    labels = source.labels
    names = source.class_names
    if names is not None and class_names is not None and set(names) <= set(class_names):
        labels = np.array([list(class_names).index(name) for name in names], dtype=np.int64)[labels]
    elif names is not None and all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        labels = np.array([int(name) for name in names], dtype=np.int64)[labels]
    elif names is not None and class_names is not None:
        strange = next(name for name in names if name not in class_names)
        raise InputMismatch(
            f"{source.name} has the class `{strange}`, which the model does not know"
            + did_you_mean(strange, class_names),
            "Name the folders after the model's classes, or number them from 0",
        )
    elif names is not None and len(names) != classes:
        raise InputMismatch(
            f"{source.name} has {len(names)} classes, the model has {classes} and does not name them",
            "Number the folders from 0 in the model's order",
        )
    highest = int(labels.max())
    if highest >= classes:
        raise InputMismatch(
            f"{source.name} has the label {highest}, the model's classes are 0..{classes - 1}",
            "Use the labels that the model was trained with",
        )
    return labels


def rows(images: Images, indices: NDArray[np.intp]) -> Images:
    """The images at the indices: a reader for `Source.read` with the array bound."""
    return np.ascontiguousarray(images[indices])


def image_shape(images: Images) -> tuple[int, int, int]:
    """(height, width, channels) of uint8 images [n, height, width, channels]."""
    height, width, channels = images.shape[1:]
    return height, width, channels
