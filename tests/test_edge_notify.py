"""Notices to the service manager over a real datagram socket, and what happens where nobody reads them."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid

import pytest

from tta_edge.notify import Notifier, watchdog_s

PATIENCE_S = 10


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """(socket of a service manager, NOTIFY_SOCKET)."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@tta-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.bind(name if request.param == "path" else "\0" + name[1:])
        opened.settimeout(PATIENCE_S)
        yield opened, name


@pytest.fixture
def notifier(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager[1]})
    yield notifier
    notifier.close()


def received(manager):
    return manager[0].recv(4096).decode()


@pytest.mark.parametrize(
    ("method", "notice"), [("ready", "READY=1"), ("stopping", "STOPPING=1"), ("watchdog", "WATCHDOG=1")]
)
def test_a_notice_arrives(manager, notifier, method, notice):
    getattr(notifier, method)()
    assert received(manager) == notice


def test_reloading_says_when_on_the_clock_of_the_kernel(manager, notifier):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    state, stamp = received(manager).split("\n")
    assert state == "RELOADING=1"
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= after


def test_a_status_is_one_line_and_cannot_smuggle_another_notice(manager, notifier):
    notifier.status("3 streams, 0 frozen\nMAINPID=1\r\nSTOPPING=1")
    assert received(manager) == "STATUS=3 streams, 0 frozen MAINPID=1 STOPPING=1"


def test_notices_come_in_order(manager, notifier):
    notifier.status("starting")
    notifier.ready()
    notifier.watchdog()
    assert [received(manager) for _ in range(3)] == ["STATUS=starting", "READY=1", "WATCHDOG=1"]


# --- nobody listens -----------------------------------------------------------------------------------


def say_everything(notifier):
    notifier.ready()
    notifier.reloading()
    notifier.status("text")
    notifier.watchdog()
    notifier.stopping()


def test_without_a_service_manager_nothing_happens(caplog):
    say_everything(Notifier({}))
    say_everything(Notifier({"NOTIFY_SOCKET": ""}))
    assert caplog.records == []


@pytest.mark.parametrize(
    "name", ["relative/path", "vsock:2:1234", "/no/such/socket", "@", "/a\0b", "/" + 300 * "x"]
)
def test_a_socket_that_cannot_be_used_is_logged_once_and_never_raises(name, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": name})
    say_everything(notifier)
    say_everything(notifier)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    notifier.close()


def test_a_manager_that_comes_back_is_notified_again(tmp_path, caplog):
    place = tmp_path / "notify"
    notifier = Notifier({"NOTIFY_SOCKET": str(place)})
    notifier.ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place))
        manager.settimeout(PATIENCE_S)
        notifier.watchdog()
        assert manager.recv(100) == b"WATCHDOG=1"
    place.unlink()
    notifier.watchdog()
    notifier.close()
    assert len(caplog.records) == 2, "once for each time it fails"


def test_a_manager_that_does_not_read_costs_a_bounded_time_and_that_notice_only(manager, notifier, caplog):
    sent = 0
    while not caplog.records:  # fill what the kernel holds for it
        before = time.monotonic()
        notifier.watchdog()
        sent += 1
    assert time.monotonic() - before < PATIENCE_S
    assert [received(manager) for _ in range(sent - 1)] == ["WATCHDOG=1"] * (sent - 1)
    notifier.stopping()
    assert received(manager) == "STOPPING=1"


def test_after_closing_nothing_is_sent(manager, notifier):
    notifier.ready()
    notifier.close()
    say_everything(notifier)
    notifier.close()
    assert received(manager) == "READY=1"
    manager[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        received(manager)


# --- the watchdog -------------------------------------------------------------------------------------


def test_the_watchdog_waits_so_long():
    assert watchdog_s({"WATCHDOG_USEC": "30000000"}) == 30.0
    assert watchdog_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}) == 30.0


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "me"},
        {"WATCHDOG_PID": str(os.getpid())},
    ],
)
def test_there_is_no_watchdog_where_nobody_waits_for_this_process(environment):
    assert watchdog_s(environment) is None
