"""Samples that go to the cloud as JPEG: counted, kept and learned from as sent, refused by name where they are bad."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_bundle
from cloud_server import images, serving, ticket
from clouds import Edge, look
from networks import SIZE
from running import running
from serving import until
from snapshots import snapshot
from tta_cloud import identity, samples
from tta_cloud.doctor import check_images
from tta_cloud.intake import Intake, IntakeOptions
from tta_cloud.reading import read
from tta_edge.base import Base, own
from tta_edge.client import Client
from tta_edge.enrol import enrol
from tta_edge.sending import Sender, encoder
from tta_edge.spool_directory import batches, read_batch
from tta_edge.spool_file import Sample
from tta_runtime import jpeg
from tta_runtime.bundle import Bundle
from tta_runtime.checks import Verdict
from tta_runtime.errors import ImagesExtraMissing, NotAnImage
from tta_runtime.manifest import InputSpec
from tta_runtime.model import Engines

SPEC = InputSpec(dtype="float32", shape=["batch", 3, SIZE, SIZE], low=0.0, high=1.0)
FORM = jpeg.form_of(SPEC)
NOTHING = np.zeros((16, 10), np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    identity.create(tmp_path / "cloud")
    return tmp_path / "cloud"


def file(data: bytes) -> Sample:
    """A sample that says of itself that it is a JPEG file."""
    return Sample("s", 1, 0, 0.5, "uint8", FORM.shape, data, "jpeg")


def stored(store: Path) -> list[tuple[str, str, str, int]]:
    query = "SELECT encoding, dtype, shape, length(x) FROM samples ORDER BY number"
    return read(store, lambda db: db.execute(query).fetchall())


def spooled(directory: Path) -> list[Sample]:
    """What waits in the files of a spool."""
    return [each.sample for _, path, _ in batches(directory) for each in read_batch(path)[0]]


# --- what the edge sends ----------------------------------------------------------------------------------


def sender(send: Any, base: Base, **options: Any) -> None:
    found = Sender(
        "all", share=1.0, send=send, seed=0,
        **{"samples_per_minute": 0, "bytes_per_minute": 0, "encoder": encoder("jpeg", 90, SPEC), **options},
    )  # fmt: skip
    found.answered("s", images(1), NOTHING, base)


def test_budgets_count_the_bytes_that_are_sent(bundle: Bundle) -> None:
    sent: list[Sample] = []
    base = own(bundle)
    sender(sent.extend, base)
    size = sum(len(each.data) for each in sent)
    assert len(sent) == 16
    assert size * 3 < images(1).nbytes
    fewer: list[Sample] = []
    sender(fewer.extend, base, bytes_per_minute=size // 2)
    assert 6 <= len(fewer) <= 9
    assert sum(len(each.data) for each in fewer) <= size // 2
    as_they_are: list[Sample] = []
    sender(as_they_are.extend, base, bytes_per_minute=size // 2, encoder=None)
    assert len(as_they_are) == size // 2 // images(1)[0].nbytes
    few: list[Sample] = []
    sender(few.extend, base, samples_per_minute=3)
    assert len(few) == 3


def test_an_edge_does_not_start_where_its_samples_cannot_be_jpegs(
    bundle: Bundle, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tmp_path / "tiny"
    tiny_bundle.build(tiny)
    with serving(store, bundle.path) as server:
        enrol(ticket(server, store), tmp_path / "a")
    asked = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a"), "upload_encoding": "jpeg"}
    before = snapshot(tmp_path / "a")
    with pytest.raises(NotAnImage, match="flat"), running(tiny, upload="all", **asked):
        pass
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImagesExtraMissing), running(bundle.path, upload="all", **asked):
        pass
    assert snapshot(tmp_path / "a") == before, "what is refused leaves nothing behind"
    with running(tiny, **asked):
        pass  # nothing is sent, so nothing is encoded


def test_an_edge_spools_and_sends_jpegs_and_is_taught_by_them(
    store: Path, bundle: Bundle, tmp_path: Path
) -> None:
    options = {
        "mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a"), "probation_samples": 16,
        "upload": "all", "upload_encoding": "jpeg", "upload_jpeg_quality": 80,
    }  # fmt: skip
    with serving(store, bundle.path) as server:
        enrol(ticket(server, store), tmp_path / "a")
        port = server.endpoint
    with running(bundle.path, **options) as daemon, Client(daemon.endpoint) as client:
        client.predict(images(1))
        # The cloud is away: they wait on disk, as they will be sent.
        kept = look(lambda: spooled(tmp_path / "a" / "spool"), lambda found: len(found) == 16)
        assert {each.encoding for each in kept} == {"jpeg"}
        back = np.stack([jpeg.decode(each.data, FORM) for each in kept])
        assert np.abs(back - images(1)).mean() < 0.1
        seeds = iter(range(2, 10_000))

        def base() -> str:
            client.predict(images(next(seeds)))
            return client.status().bundles[0].base

        with serving(store, bundle.path, bind=port):
            until(base)
            until(lambda: client.status().cloud.waiting, lambda n: not n)  # type: ignore[union-attr]
            found = client.status().cloud
            assert found is not None
            assert (found.refused, found.patches_refused) == (0, 0)
    rows = stored(store)
    assert {row[:3] for row in rows} == {("jpeg", "uint8", f"3,{SIZE},{SIZE}")}
    assert [row[3] for row in rows[:16]] == [len(each.data) for each in kept]
    assert read(store, lambda db: samples.totals(db, "yard")).bytes == sum(row[3] for row in rows)


# --- what the cloud takes -----------------------------------------------------------------------------------


def test_bad_jpegs_are_refused_by_name_and_harm_nobody(store: Path, bundle: Bundle, tmp_path: Path) -> None:
    good = jpeg.encode(images(1)[0], FORM, 90)
    at = good.index(b"\xff\xc0")
    grey = jpeg.encode(images(1)[0][:1], jpeg.form_of(InputSpec(dtype="float32", shape=["batch", 1, SIZE, SIZE],
                                                                low=0.0, high=1.0)), 90)  # fmt: skip
    bad = {
        "jpeg-malformed": [b"\xff", b"GIF89a" + bytes(100), good + b"more", good[:2] + good[at:]],
        "jpeg-truncated": [good[: len(good) // 2], good[:-2]],
        "jpeg-wrong-size": [good[: at + 5] + b"\xff\xff\xff\xff" + good[at + 9 :]],
        "jpeg-wrong-mode": [grey],
        "jpeg-not-baseline": [good[:at] + b"\xff\xc2" + good[at + 2 :]],
    }
    with serving(store, bundle.path) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with Edge(tmp_path / "a", bundle) as edge:
            wanted = {name: len(each) for name, each in bad.items()}
            edge.send([file(each) for files in bad.values() for each in files] + [file(good)])
            edge.settled(sum(wanted.values()) + 1)
            answers = [edge.acknowledged[key] for key in edge.kept.keys]
            assert answers.pop() == (True, "")
            assert [reason for _, reason in answers] == [name for name, n in wanted.items() for _ in range(n)]
            assert not any(kept for kept, _ in answers)
            assert not edge.given_up
        assert [row[0] for row in stored(store)] == ["jpeg"]
        look(lambda: read(store, lambda db: samples.refusals(db, "yard")), lambda found: found == wanted)


def test_a_jpeg_for_a_model_without_images_is_refused(store: Path, tmp_path: Path) -> None:
    """The intake alone: no bundle of the tests has `distill` and takes no images."""
    tiny_bundle.build(tmp_path / "tiny")
    engines = Engines.load(Bundle.open(tmp_path / "tiny"), methods=["source"])
    intake = Intake(engines, IntakeOptions())
    data = np.frombuffer(jpeg.encode(images(1)[0], FORM, 90), np.uint8)
    assert intake.form is None
    assert intake.refused("yard", "a", data, "jpeg") == "bad-encoding"


def test_a_cloud_without_pillow_lets_jpegs_wait_and_says_why(
    store: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = jpeg.encode(images(1)[0], FORM, 90)
    raw = Sample.of(images(2)[0], stream="s", taken_ms=1, seq=0, entropy=0.5)
    with serving(store, bundle.path) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with Edge(tmp_path / "a", bundle) as edge, monkeypatch.context() as without:
            without.setitem(sys.modules, "PIL.Image", None)
            edge.send([file(good)])
            look(lambda: edge.problem, lambda text: "images-extra-missing" in text)
            assert not edge.acknowledged
            assert len(edge.kept) == 1
            without.undo()
            edge.send([raw])
            edge.settled(2)
            assert set(edge.acknowledged.values()) == {(True, "")}
    assert sorted(row[0] for row in stored(store)) == ["jpeg", "raw"]


def test_the_doctor_says_that_pillow_is_missing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines.load(bundle, methods=["distill"])
    assert check_images(engines).verdict is Verdict.OK
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    found = check_images(engines)
    assert found.verdict is Verdict.WARN
    assert "tta-runtime[images]" in found.fix
    assert check_images(None).verdict is Verdict.OK, "the check of the student says what is wrong with it"
