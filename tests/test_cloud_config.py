"""The cloud's configuration: what wins over what, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tta_cloud.config import Config, resolve
from tta_runtime.errors import BadValue, UnknownKey


def written(path: Path, text: str) -> Path:
    file = path / "cloud.toml"
    file.write_text(text)
    return file


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, 'bind = "tcp://127.0.0.1:1"\nthreads = 2\nmax_samples = 5\n')
    found = resolve(
        flags={"bind": "tcp://127.0.0.1:3", "threads": None},
        environment={"TTA_CLOUD_BIND": "tcp://127.0.0.1:2", "TTA_CLOUD_THREADS": "7", "TTA_BIND": "x"},
        file=file,
    )
    assert (found.bind, found.threads, found.max_samples) == ("tcp://127.0.0.1:3", 7, 5)
    assert resolve(flags={}, environment={}, file=None) == Config()
    named = resolve(flags={}, environment={"TTA_CLOUD_CONFIG": str(file)}, file=None)
    assert named.max_samples == 5


def test_tables_configure_the_parts_and_paths_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    text = 'student = "s"\nteacher = "big"\nstore = "/var/x"\n[learner]\nrounds = 5\n[gate]\ntrim = 0.1\n'
    found = resolve(flags={}, environment={}, file=written(tmp_path, text))
    assert (found.student, found.teacher, found.store) == (
        str(tmp_path / "s"),
        str(tmp_path / "big"),
        "/var/x",
    )
    assert (found.learner.rounds, found.learner.new, found.gate.trim) == (5, 32, 0.1)
    assert resolve(flags={}, environment={}, file=written(tmp_path, 'teacher = "timm:x"')).teacher == "timm:x"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('studnet = "x"', "`student`"),
        ("[learner]\nround = 3", "`rounds`"),
        ("[gates]\ntrim = 0.1", "`gate`"),
    ],
)
def test_a_key_that_there_is_not_is_refused_with_the_nearest(tmp_path: Path, text: str, hint: str) -> None:
    with pytest.raises(UnknownKey, match=f"did you mean {hint}"):
        resolve(flags={}, environment={}, file=written(tmp_path, text))


def test_a_misspelt_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownKey, match="did you mean `threads`"):
        resolve(flags={}, environment={"TTA_CLOUD_THREAD": "1"}, file=None)


@pytest.mark.parametrize(
    "text",
    [
        'threads = "two"',
        "threads = 0",
        "learner = 3",
        "head_every_s = -1.0",
        "[learner]\nnew = 0",
        "[gate]\ntrim = 0.5",
        "[rollout]\ncanary_share = 1.5",
        "[intake]\nmax_share = -0.1",
        "[intake]\nfairness = 0.0",
        "[intake]\nmax_waiting = 0",
        "[learner]\npublish_rate = 1.5",
        "threads = = 1",
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadValue):
        resolve(flags={}, environment={}, file=written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="No such file"):
        resolve(flags={}, environment={}, file=tmp_path / "none.toml")
