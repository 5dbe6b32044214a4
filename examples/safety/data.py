"""The images of the safety suite, from a directory as README.md describes it, in the forms that the commands take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tta_edge.streams import ops
from tta_edge.streams.shifts import corrupt

MOSAIC_ROWS, MOSAIC_COLUMNS, SIDE = 25, 40, 32
SOURCE_IMAGES = 640
"""Unlabelled training images that are packed into bundles for methods that need facts of the source."""

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def labelled(path: Path) -> Arrays:
    """Images uint8 [n, height, width, channels] and labels of an npz file; grey images get their channel."""
    with np.load(path, allow_pickle=False) as archive:
        x, y = archive["x"], archive["y"]
    return (x[..., None] if x.ndim == 3 else x), y.astype(np.int64)


def cifar_train(data: Path) -> Arrays:
    """The 40,000 training images: mosaics of 1,000 images, and their labels."""
    tiles = []
    for file in sorted((data / "train_pool" / "cifar10_lossless_webp").glob("*.webp")):
        with Image.open(file) as opened:
            mosaic = np.asarray(opened.convert("RGB"))
        cut = mosaic.reshape(MOSAIC_ROWS, SIDE, MOSAIC_COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4)
        tiles.append(cut.reshape(-1, SIDE, SIDE, 3))
    labels = np.load(data / "train_pool" / "cifar10_labels_00000_39999.npy", allow_pickle=False)
    return np.concatenate(tiles), labels.astype(np.int64)


def resized(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Grey images [n, height, width, 1] brought to another size, bilinearly."""
    planes = ops.from_uint8(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    return np.moveaxis(ops.to_uint8(ops.linear_resize(planes, side, side)), 1, -1)


def write(path: Path, x: NDArray[np.uint8], y: NDArray[np.int64]) -> Path:
    """Images and labels as an npz file, whole or not at all."""
    part = path.with_name(f"{path.stem}.part.npz")
    np.savez_compressed(part, x=x, y=y)
    part.replace(path)
    return path


def noisy(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """The images under gaussian_noise of severity 5."""
    return corrupt(images, "gaussian_noise", 5, seed)
