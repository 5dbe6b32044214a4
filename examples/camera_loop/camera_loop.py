"""Frames of a camera, a video file or a folder of images, one by one, to a daemon that adapts to them.

Run it with `python examples/camera_loop/camera_loop.py SOURCE [ENDPOINT]`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tta_edge.client import DEFAULT_ENDPOINT, Client, Retry
from tta_edge.errors import ConnectionLost, DeadlineExceeded
from tta_edge.wire import InputInfo

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}
PATIENCE = Retry(attempts=100, wait_s=0.2, max_wait_s=2.0)  # a daemon may take minutes to come back


def frames(source: str) -> Iterator[Image.Image]:
    """The images of a folder in the order of their names, or the frames of a video file or camera number."""
    if Path(source).is_dir():
        yield from (Image.open(f) for f in sorted(Path(source).iterdir()) if f.suffix.lower() in IMAGES)
        return
    try:
        import cv2
    except ImportError:
        raise SystemExit(f"{source} is no folder; for videos: pip install 'tta-runtime[video]'") from None
    video = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not video.isOpened():
        raise SystemExit(f"{source} is neither a folder nor a video or camera that can be opened")
    while (got := video.read())[0]:
        yield Image.fromarray(np.ascontiguousarray(got[1][:, :, ::-1]))  # OpenCV's order is blue, green, red


def to_input(image: Image.Image, wanted: InputInfo) -> NDArray[Any]:
    """A batch of one, [1, channels, height, width], of the size, dtype and range that the bundle takes."""
    channels, *size = wanted.shape[1:]
    height, width = (s if isinstance(s, int) else own for s, own in zip(size, image.size[::-1], strict=True))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((width, height)))
    x = np.atleast_3d(pixels).transpose(2, 0, 1)[None]
    return x if wanted.dtype == "uint8" else np.float32(wanted.low + x * ((wanted.high - wanted.low) / 255))


def watch(client: Client, images: Iterable[Image.Image]) -> Iterator[str]:
    """A line for each frame, and one for each change of the stream's theta."""
    info, before = client.info(), ""
    for number, image in enumerate(images):
        try:
            reply = client.predict(to_input(image, info.input), stream="camera")
        except (
            ConnectionLost,
            DeadlineExceeded,
        ) as error:  # it may have been carried out: the next one, please
            yield f"frame {number}: no answer, {error.cause}"
            continue
        best = int(reply.logits[0].argmax())
        name = info.class_names[best] if info.class_names else str(best)
        yield f"frame {number}: {name}, entropy {reply.entropy[0]:.2f}, {reply.latency_ms:.1f} ms"
        state = f"{reply.steps} steps, distance {reply.distance:.4f} {reply.reason}".rstrip()
        if state != before:
            yield f"  theta: {state}"
        before = state


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    with Client(*(sys.argv[2:] or [DEFAULT_ENDPOINT]), timeout_s=5.0, retry=PATIENCE) as connected:
        for line in watch(connected, frames(sys.argv[1])):
            print(line, flush=True)
