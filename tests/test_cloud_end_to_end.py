"""An edge and the cloud over real sockets: enrolled, taught, shut out; and what neither takes from a stranger."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zmq

import exported
from cloud_server import METHODS, images, serving, ticket
from documents import blocks
from running import PATIENCE_S, REPOSITORY, daemon, process_environment, running
from serving import until
from tta_cloud import control, identity, ledger
from tta_cloud.control import ShutOut
from tta_cloud.reading import fleet, read
from tta_edge.client import Client
from tta_edge.enrol import enrol, load
from tta_edge.errors import CloudUnreachable, EnrolmentRefused, NotEnrolled
from tta_runtime.enrolment import Ticket, encode_ticket
from tta_runtime.link import Hello, Ping, encode_message


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported.built("resnet", METHODS).path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    identity.create(tmp_path / "cloud")
    return tmp_path / "cloud"


# --- enrolment ------------------------------------------------------------------------------------


def test_a_ticket_lets_one_edge_in_once(store: Path, bundle: Path, tmp_path: Path) -> None:
    with serving(store, bundle) as server:
        token = ticket(server, store)
        made = enrol(token, tmp_path / "a")
        assert (made.link.name, made.link.group, made.root.version) == ("camera", "yard", 1)
        assert made.link.endpoint == server.endpoint
        assert load(tmp_path / "a").public == made.public
        with pytest.raises(EnrolmentRefused, match="enrolled already"):
            enrol(token, tmp_path / "a")
        with pytest.raises(EnrolmentRefused, match="another edge"):
            enrol(token, tmp_path / "b")
    for path in (tmp_path / "a" / "cloud").iterdir():
        assert path.stat().st_mode & 0o077 == 0
    assert [(row["name"], row["state"]) for row in fleet(store)] == [("camera", "active")]
    assert not list((store / "control").glob("*.note"))


def test_a_note_that_was_taken_twice_does_not_let_a_used_token_in_again(
    store: Path, bundle: Path, tmp_path: Path
) -> None:
    """As after a kill between taking a command's note and deleting it."""
    with serving(store, bundle) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with pytest.raises(EnrolmentRefused, match="another edge"):
            enrol(ticket(server, store), tmp_path / "b")


def test_a_token_that_was_never_issued_or_is_too_old_is_refused(
    store: Path, bundle: Path, tmp_path: Path
) -> None:
    with serving(store, bundle) as server:
        key = identity.load(store).curve_public
        never = encode_ticket(Ticket(door=server.door, server_key=key, secret="x" * 20, name="camera"))
        with pytest.raises(EnrolmentRefused, match="no such token"):
            enrol(never, tmp_path / "a")
        with pytest.raises(EnrolmentRefused, match="was good until"):
            enrol(ticket(server, store, expires_ms=1), tmp_path / "a")
        enrol(ticket(server, store, name="other"), tmp_path / "a")  # the directory is none the worse


def test_an_edge_does_not_talk_to_a_cloud_with_another_key(store: Path, bundle: Path, tmp_path: Path) -> None:
    with serving(store, bundle) as server:
        key = zmq.curve_keypair()[0].decode()
        wrong = encode_ticket(Ticket(door=server.door, server_key=key, secret="x" * 20, name="camera"))
        with pytest.raises(CloudUnreachable, match="another key stays silent"):
            enrol(wrong, tmp_path / "a", wait_s=0.5)


def test_without_an_enrolment_the_modes_that_need_one_do_not_start(bundle: Path, tmp_path: Path) -> None:
    for state_dir in (None, str(tmp_path)):
        with pytest.raises(NotEnrolled), running(bundle, mode="cloud", method="source", state_dir=state_dir):
            pass


# --- teaching -------------------------------------------------------------------------------------


def test_an_edge_sends_samples_is_taught_and_keeps_what_it_learned(
    store: Path, bundle: Path, tmp_path: Path
) -> None:
    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a"), "probation_samples": 16}
    with serving(store, bundle) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with running(bundle, upload="all", **options) as daemon, Client(daemon.endpoint) as client:
            first = client.predict(images(99)).logits
            seeds = iter(range(10_000))

            def base() -> str:
                client.predict(images(next(seeds)))
                return client.status().bundles[0].base

            taught = until(base)
            found = client.status().cloud
            assert found is not None
            assert (found.phase, found.group, found.problem, found.stale) == ("online", "yard", "", False)
            assert found.sent > 0
            assert found.patches_refused == 0
            until(lambda: client.status().cloud.sent == client.status().cloud.chosen)  # type: ignore[union-attr]
            second = client.predict(images(99)).logits
            assert not np.array_equal(first, second)
        log = read(store, lambda db: ledger.entries(db, "yard"))
        assert {entry.state for entry in log} <= {"published", "built"}
        (row,) = fleet(store)
        assert row["seq"] >= 1
    # The cloud has gone: the edge starts, and serves what it was taught.
    with running(bundle, **options) as daemon, Client(daemon.endpoint) as client:
        assert client.status().bundles[0].base >= taught
        served = client.predict(images(99)).logits
        assert not np.array_equal(first, served)


def test_samples_are_kept_no_longer_than_they_may(store: Path, bundle: Path, tmp_path: Path) -> None:
    def count() -> int:
        return int(read(store, lambda db: db.execute("SELECT count(*) FROM samples").fetchone()[0]))

    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a")}
    with serving(store, bundle) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with running(bundle, upload="all", **options) as daemon, Client(daemon.endpoint) as client:
            client.predict(images(1))
            until(count)
    with serving(store, bundle):
        assert count(), "thirty days have not passed"
    with serving(store, bundle, retention_days=1e-9):
        until(lambda: count() == 0)


def test_upload_is_off_unless_it_is_asked_for(store: Path, bundle: Path, tmp_path: Path) -> None:
    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a")}
    with serving(store, bundle) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with running(bundle, **options) as daemon, Client(daemon.endpoint) as client:
            until(lambda: client.status().cloud, lambda found: found is not None and found.phase == "online")
            for seed in range(5):
                client.predict(images(seed))
            found = client.status().cloud
            assert found is not None
            assert (found.seen, found.chosen, found.sent) == (0, 0, 0)
        assert read(store, lambda db: db.execute("SELECT count(*) FROM samples").fetchone()[0]) == 0


def test_a_restarted_cloud_goes_on_where_it_was(store: Path, bundle: Path, tmp_path: Path) -> None:
    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a"), "probation_samples": 16}
    with serving(store, bundle) as server:
        enrol(ticket(server, store), tmp_path / "a")
        port = server.endpoint
    with running(bundle, upload="all", **options) as daemon, Client(daemon.endpoint) as client:
        seeds = iter(range(10_000))

        def seq() -> int:
            client.predict(images(next(seeds)))
            base = client.status().bundles[0].base
            return int(base.split(".")[1]) if base else 0

        with serving(store, bundle, bind=port):
            before = until(seq)
        with serving(store, bundle, bind=port):
            until(seq, lambda found: found > before)


def test_an_edge_that_is_shut_out_is_not_let_in_again(store: Path, bundle: Path, tmp_path: Path) -> None:
    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a")}
    with serving(store, bundle) as server:
        made = enrol(ticket(server, store), tmp_path / "a")
        with running(bundle, **options) as daemon, Client(daemon.endpoint) as client:

            def phase() -> str:
                found = client.status().cloud
                return "" if found is None else f"{found.phase} {found.problem}"

            until(phase, lambda found: found.startswith("online"))
            control.leave(store, ShutOut(made.public.decode()))
            until(phase, lambda found: "revoked or unknown" in found or "not enrolled" in found)
            client.predict(images(1))  # serving goes on
    assert [row["state"] for row in fleet(store)] == ["revoked"]


def test_a_stranger_is_not_heard(store: Path, bundle: Path) -> None:
    """NULL, and a key that nobody knows: neither gets an answer, and a known edge does."""
    hello = encode_message(
        Hello(
            id=1, version="0", bundle_digest="ab" * 32, mode="cloud", epoch=0, seq=0, theta_digest="ab" * 32
        )
    )
    with serving(store, bundle) as server:
        context = zmq.Context()
        key = identity.load(store).curve_public.encode()
        for keys in (None, zmq.curve_keypair()):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            if keys is not None:
                socket.setsockopt(zmq.CURVE_SERVERKEY, key)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, keys[0])
                socket.setsockopt(zmq.CURVE_SECRETKEY, keys[1])
            socket.connect(server.endpoint)
            socket.send_multipart(hello)
            assert not socket.poll(300)
            socket.close(linger=0)
        # At the door everybody is heard, and nothing but enrolment is answered.
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.connect(server.door)
        socket.send_multipart(encode_message(Ping(id=1)))
        assert socket.poll(5000)
        assert b"not-greeted" in socket.recv_multipart()[1]
        socket.close(linger=0)
        context.term()


def test_the_commands_of_the_readme_make_a_fleet(bundle: Path, tmp_path: Path) -> None:
    """Keys, service, token, edge: as processes, with the words of the README and ports that are free."""
    places = {
        "small-bundle": bundle,
        "big-bundle": bundle,
        "cloud": tmp_path / "cloud",
        "state": tmp_path / "state",
    }
    keys, serve, admit = _words("cloud-1", places)
    join, edge = _words("cloud-2", places)
    environment = process_environment()

    def run(words: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, "-m", words[0].replace("-", "_"), *words[1:]], env=environment, capture_output=True,
            text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    store = ["--store", str(places["cloud"])]
    run(keys)
    free = ["--bind", "tcp://127.0.0.1:0", "--enroll-bind", "tcp://127.0.0.1:0"]
    service = subprocess.Popen(
        [sys.executable, "-m", "tta_cloud", *serve[1:], *free],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert service.stderr is not None
        ready = next(line for line in service.stderr if line.startswith("ready "))
        token = json.loads(run([*admit, "--door", ready.split()[2], "--json"]))["token"]
        made = json.loads(run([*(token if word == "TOKEN" else word for word in join), "--json"]))
        assert made["group"] == "yard"
        (row,) = json.loads(run(["tta-cloud", "fleet", "--json", *store]))
        assert (row["name"], row["group"], row["state"], row["seq"]) == ("camera-3", "yard", "active", 0)
        assert json.loads(run(["tta-cloud", "keys", "list", "--json", *store]))[0]["name"] == "camera-3"
        assert json.loads(run(["tta-cloud", "patches", "log", "yard", "--json", *store])) == []
        with daemon(*edge[2:]) as served, ExitStack() as stack:
            assert served.endpoint, served.log
            client = stack.enter_context(Client(served.endpoint))
            told = until(
                lambda: client.status().cloud, lambda link: link is not None and link.phase == "online"
            )
            assert told is not None
            assert told.group == "yard"
            assert served.stop() == 0
    finally:
        service.terminate()
        assert service.wait(PATIENCE_S) == 0


def _words(mark: str, places: Mapping[str, Path]) -> list[list[str]]:
    """The command lines of a block of the README, its names replaced by what there is here."""
    (found,) = (block for block in blocks(REPOSITORY / "README.md") if block.mark == mark)
    lines = found.text.replace("--store cloud", f"--store {places['cloud']}").splitlines()
    return [
        [str(places.get(word, word)) if word != "cloud" else word for word in line.split()] for line in lines
    ]
