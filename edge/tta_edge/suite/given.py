"""Ready-made streams with malicious samples, as `tta-export attack` writes them.

An npz file with `x` (uint8 images in order of arrival), `y` (labels), `malicious` (bool, one for each image) and
`batch` (samples that arrive together).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.npz import array_names, as_images, as_labels, read_array
from tta_edge.streams.source import Images
from tta_edge.suite.errors import GivenMalformed
from tta_edge.suite.images import Pool, make_pool
from tta_edge.suite.order import Order, ready_made

FAMILY = "malicious"
ARRAYS = ("x", "y", "malicious", "batch")
MAX_BATCH = 1024
_AGAIN = "Make it again with tta-export attack"


@dataclass(frozen=True, eq=False)
class Given:
    """A ready-made stream.

    Attributes:
        name: of the stream.
        pool: its images and labels, in order of arrival.
        malicious: [n] bool.
        order: batches, and which samples count.
    """

    name: str
    pool: Pool
    malicious: NDArray[np.bool_]
    order: Order


def read_given(path: Path, classes: int) -> Given:
    """The stream that a file holds.

    Args:
        path: the npz file.
        classes: of the model.

    Raises:
        SourceMissing: there is no such file.
        SourceMalformed, SourceTooLarge: it is not a good npz file of images and labels.
        GivenMalformed: it lacks an array, or the arrays do not make a stream.
    """
    names = array_names(path)
    for name in ARRAYS:
        if name not in names:
            raise GivenMalformed(f"{path} has no array `{name}`, it holds {', '.join(sorted(names))}", _AGAIN)
    images: Images = as_images(read_array(path, "x"), f"`x` of {path}")
    labels = as_labels(read_array(path, "y"), len(images), f"`y` of {path}")
    malicious, batch = read_array(path, "malicious"), read_array(path, "batch")
    if malicious.dtype != np.bool_ or malicious.shape != labels.shape:
        raise GivenMalformed(
            f"`malicious` of {path} is {malicious.dtype} {list(malicious.shape)}, expected bool [{len(labels)}]",
            _AGAIN,
        )
    if batch.dtype.kind not in "iu" or batch.shape != () or not 1 <= int(batch) <= MAX_BATCH:
        raise GivenMalformed(
            f"`batch` of {path} is {batch.dtype} {list(batch.shape)}, expected a whole number from 1 to {MAX_BATCH}",
            _AGAIN,
        )
    if malicious.all() or int(labels.max()) >= classes:
        found = "no honest sample" if malicious.all() else f"the label {int(labels.max())}"
        raise GivenMalformed(f"{path} holds {found}; the model's classes are 0..{classes - 1}", _AGAIN)
    return Given(
        f"{FAMILY}/{path.stem}",
        make_pool(images, labels),
        malicious,
        ready_made(~malicious, batch=int(batch)),
    )
