"""Unlabelled images of the source, for methods that need facts of it once, when a bundle is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta_exporters.errors import OptionError, in_one_line

if TYPE_CHECKING:
    from tta_exporters.build import InputOptions


def load_source_images(file: Path, options: InputOptions, limit: int) -> Tensor:
    """Images of an npz file in the form in which users will send theirs.

    Args:
        file: with an array ``x``, uint8, [n, height, width, channels] or [n, channels, height, width].
        options: what users send.
        limit: most images; the first ones are taken.

    Returns:
        [n, *options.shape] of the input's dtype, over its range.

    Raises:
        OptionError: the file cannot be read, has no such array, or its images have another shape.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            x = archive["x"][:limit]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise OptionError(
            f"no source images in {file}: {in_one_line(error)}", "Give an npz file with an array x"
        ) from error
    x = channels_first(x, options.shape)
    if x.dtype != np.uint8 or x.shape[1:] != options.shape or not len(x):
        raise OptionError(
            f"x in {file} is {x.dtype} {list(x.shape)}, expected uint8 images of {list(options.shape)}",
            "Give images as they are before any normalisation",
        )
    return as_users_send(x, options)


def channels_first(x: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Images [n, height, width, channels], or grey ones without channels, as [n, *shape] where they fit it."""
    if x.ndim == len(shape) and len(shape) == 3 and shape[0] == 1:
        x = x[:, None]
    if x.ndim == 4 and x.shape[1:] != shape and (x.shape[3], *x.shape[1:3]) == shape:
        x = x.transpose(0, 3, 1, 2)
    return x


def as_users_send(x: NDArray[np.generic], options: InputOptions) -> Tensor:
    """uint8 images [n, *shape] in the dtype and range of the input; float32 as they are."""
    images = torch.from_numpy(np.ascontiguousarray(x))
    if options.dtype == "uint8" or images.dtype != torch.uint8:
        return images
    low, high = options.preprocess.low, options.preprocess.high
    return low + (high - low) * images.to(torch.float32) / 255
