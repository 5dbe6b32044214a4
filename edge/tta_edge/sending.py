"""Which answered samples go to the cloud: a filter for each stream, a limit for all. For the answering thread."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tta_edge.base import Base
from tta_edge.spool_file import Sample
from tta_edge.upload import FILTERS, Filter, RateLimit
from tta_runtime import jpeg
from tta_runtime.jpeg import ImageForm
from tta_runtime.manifest import InputSpec
from tta_runtime.numerics import entropy

UploadKind = Literal["off", "budgeted", "cema", "released", "random", "all"]
UploadEncoding = Literal["lossless", "jpeg"]
KNOWN_STREAMS = 4096
"""Streams whose filter is remembered; beyond it the one that was not heard of for the longest begins anew."""


@dataclass(frozen=True)
class Jpeg:
    """How images become JPEG files.

    Attributes:
        form: of the images that the model takes.
        quality: 1 to 100.
    """

    form: ImageForm
    quality: int


def encoder(encoding: UploadEncoding, quality: int, spec: InputSpec) -> Jpeg | None:
    """How samples are encoded; None: as they are.

    Args:
        encoding: that is asked for.
        quality: of JPEG files.
        spec: of the model's input.

    Raises:
        NotAnImage: the input cannot be sent as JPEG.
        ImagesExtraMissing: Pillow is not installed.
    """
    if encoding == "lossless":
        return None
    form = jpeg.form_of(spec)
    jpeg.needs_pillow()
    return Jpeg(form, quality)


class Sender:
    """Chooses samples and hands them on.

    Args:
        kind: of the filter; `off` sends nothing.
        share: of a stream that may be sent.
        samples_per_minute: of the daemon; 0: no limit.
        bytes_per_minute: likewise.
        send: takes what was chosen.
        seed: of what is left to chance.
        encoder: makes JPEG files of them; without it they go as they are.

    Attributes:
        chosen: how many were sent.
        seen: how many were looked at.
    """

    def __init__(
        self,
        kind: UploadKind,
        *,
        share: float,
        samples_per_minute: int,
        bytes_per_minute: int,
        send: Callable[[list[Sample]], None],
        seed: int,
        encoder: Jpeg | None = None,
    ) -> None:
        self._kind: UploadKind = kind
        self._share = share
        self._send = send
        self._draw = np.random.default_rng(seed)
        self._limit = RateLimit(samples_per_minute, bytes_per_minute)
        self._encoder = encoder
        self._filters: OrderedDict[str, Filter] = OrderedDict()
        self.chosen = 0
        self.seen = 0

    def answered(self, stream: str, x: NDArray[Any], logits: NDArray[np.float32], base: Base) -> None:
        """Look at samples that were answered.

        Args:
            stream: that answered.
            x: [batch, ...] as the model takes it.
            logits: [batch, C].
            base: that the answers rest on.
        """
        if self._kind == "off":
            return
        filter_ = self._filters.pop(stream, None) or FILTERS[self._kind](self._share)
        choice, self._filters[stream] = filter_.choose(logits, self._draw.random(len(logits)))
        while len(self._filters) > KNOWN_STREAMS:
            self._filters.popitem(last=False)
        self.seen += len(logits)
        h, uploads = entropy(logits), []
        for i in np.flatnonzero(choice.keep):
            now_s = time.monotonic()
            if not self._limit.take(1, now_s)[0]:
                continue  # what cannot be sent at all need not be encoded
            sample = self._sample(stream, x[i], base.seq, float(h[i]))
            allowed, self._limit = self._limit.take(len(sample.data), now_s)
            if allowed:
                uploads.append(sample)
        self.chosen += len(uploads)
        if uploads:
            self._send(uploads)

    def _sample(self, stream: str, x: NDArray[Any], seq: int, h: float) -> Sample:
        now_ms = int(time.time() * 1000)
        if self._encoder is None:
            return Sample.of(np.ascontiguousarray(x), stream=stream, taken_ms=now_ms, seq=seq, entropy=h)
        form = self._encoder.form
        data = jpeg.encode(x, form, self._encoder.quality)
        return Sample(stream, now_ms, seq, h, "uint8", form.shape, data, "jpeg")
