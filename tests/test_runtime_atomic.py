"""Atomic writes: the old file or the new one, whatever happens on the way; and reading with limits."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from snapshots import files, unchanged
from tta_runtime.atomic import write_atomic
from tta_runtime.files import open_regular, read_at_most

RUNTIME = str(Path(__file__).parents[1] / "runtime")


def test_new_file_and_replaced_file(tmp_path):
    file = tmp_path / "state"
    write_atomic(file, b"one")
    assert files(tmp_path).keys() == {"state"}
    write_atomic(file, [b"tw", b"", b"o"])
    assert file.read_bytes() == b"two"
    assert files(tmp_path).keys() == {"state"}


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
        write_atomic(tmp_path / "b", b"", mode=0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600


def test_a_link_is_replaced_and_its_target_is_not_written(tmp_path):
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "link").symlink_to("target")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"keep"
    assert not (tmp_path / "link").is_symlink()


def test_a_directory_in_the_way(tmp_path):
    (tmp_path / "state").mkdir()
    with unchanged(tmp_path), pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "state", b"x")


def test_no_directory(tmp_path):
    with unchanged(tmp_path), pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "state", b"x")


def test_no_space(tmp_path):
    """A real short write: the process may write 1000 bytes to a file, the data has 5000."""
    file = tmp_path / "state"
    write_atomic(file, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with unchanged(tmp_path), pytest.raises(OSError, match="File too large"):
            write_atomic(file, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == b"old"


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """A process that writes without end is killed; every version it wrote is one repeated byte."""
    code = (
        f"import sys, itertools; sys.path.insert(0, {RUNTIME!r})\n"
        "from tta_runtime.atomic import write_atomic\n"
        "for i in itertools.count():\n"
        "    write_atomic(sys.argv[1], bytes([i % 256]) * 200_000)\n"
        "    print(i, flush=True)\n"
    )
    file = tmp_path / "state"
    for rounds in (1, 2, 5):
        with subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(rounds):
                writer.stdout.readline()
            writer.kill()
        data = file.read_bytes()
        assert len(data) == 200_000
        assert len(set(data)) == 1


def test_readers_never_see_a_mix(tmp_path):
    file = tmp_path / "state"
    write_atomic(file, bytes(100_000))
    seen: list[set[int]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(set(file.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        write_atomic(file, bytes([i % 2]) * 100_000)
    done.set()
    reader.join()
    assert seen
    assert all(values in ({0}, {1}) for values in seen)


def test_reading_with_a_limit(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    assert read_at_most(tmp_path / "f", 5) == b"12345"
    assert read_at_most(tmp_path / "f", 3) == b"1234"
    assert read_at_most(tmp_path / "f", 100) == b"12345"


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(special)
