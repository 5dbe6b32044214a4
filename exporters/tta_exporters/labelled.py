"""Labelled data of the source, for the warm-up of an adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta_exporters.build import InputOptions
from tta_exporters.errors import OptionError, in_one_line
from tta_exporters.source_images import as_users_send, channels_first


@dataclass(frozen=True)
class Labelled:
    """Samples and their classes.

    Attributes:
        x: [n, *shape], uint8 images or float32 as users send them.
        y: [n] int64, from 0.
        options: what users send.
    """

    x: NDArray[np.generic]
    y: NDArray[np.int64]
    options: InputOptions

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(x as users send it [b, *shape], y [b] int64) of the given samples."""
        chosen = indices.numpy()
        return as_users_send(self.x[chosen], self.options), torch.from_numpy(self.y[chosen])

    def digest(self) -> str:
        """SHA-256 of samples and classes."""
        sha = hashlib.sha256(f"{self.x.dtype}{self.x.shape}".encode())
        sha.update(np.ascontiguousarray(self.x).tobytes())
        sha.update(self.y.tobytes())
        return sha.hexdigest()


def load_labelled(file: Path, options: InputOptions, classes: int) -> Labelled:
    """Reads samples and classes of an npz file.

    Args:
        file: with ``x``, uint8 images [n, height, width, channels] or [n, channels, height, width], or float32
            [n, *options.shape] as users send them; and ``y`` [n], integers from 0.
        options: what users send.
        classes: length of the logits.

    Raises:
        OptionError: the file cannot be read, lacks one of the arrays, or they do not fit the input, the classes or each
            other.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            x, y = archive["x"], archive["y"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise OptionError(
            f"no labelled data in {file}: {in_one_line(error)}", "Give an npz file with arrays x and y"
        ) from error
    if x.dtype == np.uint8:
        x = channels_first(x, options.shape)
    fits = x.dtype == np.uint8 or (x.dtype == np.float32 and options.dtype == "float32")
    if not fits or x.shape[1:] != options.shape or not len(x):
        raise OptionError(
            f"x in {file} is {x.dtype} {list(x.shape)}, expected uint8 images or {options.dtype} of "
            f"{list(options.shape)}",
            "Give samples as users send them",
        )
    if x.dtype == np.float32 and not np.isfinite(x).all():
        raise OptionError(f"x in {file} holds NaN or Inf", "Leave these samples out")
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise OptionError(
            f"y in {file} is {y.dtype} {list(y.shape)} for {len(x)} samples",
            "Give one integer for each sample",
        )
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise OptionError(
            f"y in {file} goes from {int(y.min())} to {int(y.max())}, the classes from 0 to {classes - 1}",
            "Correct --classes or the labels",
        )
    return Labelled(x, y.astype(np.int64), options)
