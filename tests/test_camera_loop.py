"""The camera loop against the real daemon: a folder, a video, and a daemon that dies meanwhile."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from running import PATIENCE_S, REPOSITORY, daemon, process_environment, running
from tta_edge.builtin import builtin_bundle, builtin_digits
from tta_edge.client import Client
from tta_edge.wire import InputInfo

SCRIPT = REPOSITORY / "examples" / "camera_loop" / "camera_loop.py"
SINGLE_FRAMES = ("--policy", "always", "--step-batch", "16")
FRAME = re.compile(r"^frame (\d+): (\d), entropy (\d\.\d\d)", re.M)


def load():
    spec = importlib.util.spec_from_file_location("camera_loop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


camera_loop = load()


def digits(count):
    """Images of 80x80 pixels, and what they show."""
    data = np.load(builtin_digits())
    return [
        Image.fromarray(x).resize((80, 80), Image.Resampling.NEAREST) for x in data["x"][:count, :, :, 0]
    ], data["y"][:count].tolist()


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=process_environment(),
        check=False,
    )


def share_right(output, labels):
    found = {int(number): int(name) for number, name, _ in FRAME.findall(output)}
    assert sorted(found) == list(range(len(labels)))
    return np.mean([found[number] == label for number, label in enumerate(labels)])


def wait_for_a_step(endpoint):
    with Client(endpoint, timeout_s=30) as client:
        ends_s = time.monotonic() + PATIENCE_S
        while True:
            (stream,) = (stream for stream in client.status().streams if stream.id == "camera")
            if stream.steps:
                return
            assert time.monotonic() < ends_s, "no step"


def test_a_folder_of_images_one_by_one(tmp_path):
    images, labels = digits(64)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    with daemon(*SINGLE_FRAMES) as process:
        first = run(tmp_path, process.endpoint)
        assert first.returncode == 0, first.stderr
        assert share_right(first.stdout, labels) > 0.95
        assert "  theta: 0 steps, distance 0.0000" in first.stdout
        wait_for_a_step(process.endpoint)  # single frames are adapted on in the background
        second = run(tmp_path, process.endpoint)
        assert re.search(r"theta: [1-9]\d* steps, distance 0\.0*[1-9]", second.stdout), second.stdout
        assert share_right(second.stdout, labels) > 0.95


def test_a_video_file(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'tta-runtime[video]'")
    images, labels = digits(40)
    file = tmp_path / "digits.avi"
    video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 80))
    for image in images:
        video.write(np.repeat(np.asarray(image)[..., None], 3, axis=2))
    video.release()
    with daemon(*SINGLE_FRAMES) as process:
        done = run(file, process.endpoint)
    assert done.returncode == 0, done.stderr
    assert share_right(done.stdout, labels) > 0.95


def test_colours_of_a_video_come_in_the_order_of_pillow(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'tta-runtime[video]'")
    file = tmp_path / "red.avi"
    video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 32))
    video.write(np.full((32, 32, 3), (0, 0, 255), np.uint8))
    video.release()
    (image,) = camera_loop.frames(str(file))
    red, green, blue = np.asarray(image).reshape(-1, 3).mean(axis=0)
    assert red > 200 > 50 > max(green, blue)


@pytest.mark.parametrize("source", ["no-such-file.mp4", "99"])
def test_a_source_that_is_none_is_named(source):
    with running(builtin_bundle()) as server:
        done = run(source, server.endpoint)
    assert done.returncode == 1
    assert source in done.stderr
    assert "Traceback" not in done.stderr


def test_without_arguments_it_says_how_it_is_called():
    done = run()
    assert done.returncode == 1
    assert "camera_loop.py SOURCE [ENDPOINT]" in done.stderr


def test_it_goes_on_when_the_daemon_is_killed_and_restarted(tmp_path):
    images, labels = digits(60)
    state = ("--state-dir", tmp_path / "state", "--checkpoint-steps", "1")
    second = threading.Event()

    def restart(endpoint):
        with daemon(*SINGLE_FRAMES, *state, bind=endpoint) as process:
            assert process.endpoint, process.log
            second.set()
            assert seen.wait(PATIENCE_S)
            assert process.stop() == 0

    def source():
        for number, image in enumerate(images):
            if number == 30:
                first.stop(signal.SIGKILL)
                restarting.start()  # the loop finds nobody for a while
            yield image

    seen = threading.Event()
    with daemon(*SINGLE_FRAMES, *state) as first:
        restarting = threading.Thread(target=restart, args=(first.endpoint,))
        with Client(first.endpoint, timeout_s=5.0, retry=camera_loop.PATIENCE) as client:
            lines = list(camera_loop.watch(client, source()))
    seen.set()
    restarting.join(PATIENCE_S)
    assert second.is_set()
    assert share_right("\n".join(lines), labels) > 0.95


def test_a_frame_that_was_open_when_the_daemon_hung_is_skipped():
    images, _ = digits(3)

    def source():
        yield images[0]
        process.process.send_signal(signal.SIGSTOP)
        yield images[1]
        process.process.send_signal(signal.SIGCONT)
        yield images[2]

    with (
        daemon(*SINGLE_FRAMES) as process,
        Client(process.endpoint, timeout_s=0.5, retry=camera_loop.PATIENCE) as client,
    ):
        lines = [line for line in camera_loop.watch(client, source()) if line.startswith("frame")]
    assert [line.split(",")[0].split(":")[0] for line in lines] == ["frame 0", "frame 1", "frame 2"]
    assert "no answer" in lines[1]
    assert FRAME.match(lines[2])


@pytest.mark.parametrize(
    ("wanted", "shape", "low", "high"),
    [
        (InputInfo("float32", ["batch", 3, 4, 6], 0.0, 1.0), (1, 3, 4, 6), 0.0, 1.0),
        (InputInfo("float32", ["batch", 1, 4, 6], -1.0, 1.0), (1, 1, 4, 6), -1.0, 1.0),
        (InputInfo("uint8", ["batch", 3, 4, 6], 0.0, 255.0), (1, 3, 4, 6), 0, 255),
        (InputInfo("float32", ["batch", 3, "height", "width"], 0.0, 1.0), (1, 3, 20, 10), 0.0, 1.0),
    ],
)
def test_frames_become_what_the_bundle_takes(wanted, shape, low, high):
    for value, expected in ((0, low), (255, high)):
        image = Image.new("RGBA", (10, 20), (value, value, value, 255))
        x = camera_loop.to_input(image, wanted)
        assert (x.shape, x.dtype.name) == (shape, wanted.dtype)
        assert (x == expected).all()


def test_it_is_about_forty_lines():
    body = SCRIPT.read_text().split("\ndef ", 1)[1]
    code = [line for line in body.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 45
