"""`tta-cloud doctor`: every check in its order. Those of the store stand in doctor_store.py."""

from __future__ import annotations

import errno
import socket
import stat
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from tta_cloud import doctor_store as stores
from tta_cloud import identity
from tta_cloud.config import Config
from tta_cloud.control import is_served
from tta_cloud.identity import Identity
from tta_cloud.learner import METHOD, Learner, check_fit, image_form
from tta_cloud.start import check_endpoint
from tta_cloud.teacher import open_student, open_teacher
from tta_runtime import machine
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.endpoint import is_loopback
from tta_runtime.endpoint import parse as parse_endpoint
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import ImagesExtraMissing, TtaError
from tta_runtime.health import OFF
from tta_runtime.jpeg import needs_pillow
from tta_runtime.model import Engines, Model

SOON_S = 30 * 86_400
"""A root that ends within so long is to be renewed."""


def checks(
    settings: Callable[[], Config],
    *,
    silent_s: float,
    clock_s: Callable[[], float] = time.time,
) -> Iterator[Check]:
    """Every check, one after the other. Nothing is changed, and a service that runs is not disturbed.

    Args:
        settings: gives the configuration, or raises what is wrong with it; then only the machine is looked at.
        silent_s: an edge that has not been heard of for so long is named.
        clock_s: seconds since 1970.
    """
    yield machine.python()
    yield machine.packages()
    yield machine.onnxruntime()
    try:
        config = settings()
    except TtaError as error:
        yield fail("settings", f"{error.code}: {error.cause}", error.fix)
        yield machine.clock()
        return
    store = Path(config.store)
    yield ok("settings", f"store {store}, student {config.student or '-'}, teacher {config.teacher or '-'}")
    found, keys = check_keys(store)
    yield found
    yield check_root(keys, clock_s())
    running = is_served(store)
    yield from stores.checks(config, running, silent_s=silent_s, clock_s=clock_s)
    yield machine.clock()
    found, student = check_student(config)
    yield found
    yield check_images(student)
    found, teacher = check_teacher(config, student)
    yield found
    yield check_learners(config, student, teacher)
    yield check_address("bind", config.bind, keys is not None, running)
    yield check_address("enroll_bind", config.enroll_bind, keys is not None, running)
    yield check_http(config, running)
    yield machine.open_files()


# --- keys -------------------------------------------------------------------------------------------


def check_keys(store: Path) -> tuple[Check, Identity | None]:
    """The keys are there, and nobody else can read them."""
    directory = store / identity.DIRECTORY
    exposed = [
        f"{path.name} has mode {stat.S_IMODE(path.stat().st_mode):04o}"
        for path in sorted(directory.glob("*.key"))
        if path.stat().st_mode & 0o077
    ]
    if exposed:
        text = f"others can use {', '.join(exposed)}"
        return fail("keys", text, f"chmod 600 {directory}/*.key, and replace keys that others have had"), None
    try:
        found = identity.load(store)
    except TtaError as error:
        return fail("keys", f"{error.code}: {error.cause}", error.fix), None
    text = f"{directory}, mode 0600, publisher {found.publisher.key_id[:12]}.."
    if (directory / "root.key").exists():
        fix = "Move it to a place that this machine does not see; only `tta-cloud keys rotate --root-key` needs it"
        return warn("keys", f"{text}; root.key is beside the others", fix), found
    return ok("keys", text), found


def check_root(keys: Identity | None, now_s: float) -> Check:
    """The root in force asks for no more than the key that signs, and may still be adopted."""
    if keys is None:
        return fail("root", "without keys there is none that can be looked at", "See the check before")
    root = keys.root
    until = time.strftime("%Y-%m-%d", time.gmtime(root.not_after_s))
    text = f"version {root.version}, epoch {root.epoch}, until {until}"
    renew = "tta-cloud keys rotate --root-key FILE, then restart the service"
    if root.publisher_threshold > 1:
        return fail(
            "root",
            f"{text}: it asks for {root.publisher_threshold} signatures, this service makes one",
            renew,
        )
    if now_s > root.not_after_s:
        return fail("root", f"{text}: it has ended, edges that enrol now do not take it", renew)
    if root.not_after_s - now_s < SOON_S:
        return warn("root", f"{text}: it ends soon", renew)
    return ok("root", text)


# --- bundles ----------------------------------------------------------------------------------------


def check_student(config: Config) -> tuple[Check, Engines | None]:
    """The edges' bundle is whole and has what distils."""
    if not config.student:
        return fail(
            "student", "`student` is not set", "Give --student or set it in the file of --config"
        ), None
    try:
        student = open_student(Path(config.student), EngineOptions(threads=config.threads))
    except TtaError as error:
        return fail("student", f"{error.code}: {error.cause}", error.fix), None
    manifest = student.bundle.manifest
    text = f"{manifest.model_id}, {manifest.classes} classes, theta of {manifest.theta.size}"
    return ok("student", f"{text}, digest {student.bundle.digest[:12]}"), student


def check_images(student: Engines | None) -> Check:
    """What edges may send as JPEG can be read here."""
    if student is None or image_form(student) is None:
        return ok("images", "none that edges could send as JPEG are known of")
    try:
        needs_pillow()
    except ImagesExtraMissing as error:
        text = "Pillow is missing: what edges send as JPEG (`upload_encoding`) waits with them"
        return warn("images", text, error.fix)
    return ok("images", "JPEG can be read")


def check_teacher(config: Config, student: Engines | None) -> tuple[Check, Engines | None]:
    """The teacher is there and can teach this student. What has to be compiled first is not compiled here."""
    if not config.teacher:
        return fail(
            "teacher", "`teacher` is not set", "Give --teacher or set it in the file of --config"
        ), None
    if student is None:
        return warn(
            "teacher", "without a student nobody can say whether it fits", "See the check before"
        ), None
    if not Path(config.teacher).is_dir():
        if ":" not in config.teacher:
            return fail(
                "teacher", f"{config.teacher} is no directory and names no network", "Correct --teacher"
            ), None
        if find_spec("torch") is None:
            cause = f"{config.teacher} has to be compiled, and PyTorch is missing"
            return fail("teacher", cause, "pip install tta-runtime[cloud], or name a bundle"), None
        return ok("teacher", f"{config.teacher} is compiled when the service starts first"), None
    try:
        options = EngineOptions(threads=config.threads)
        teacher = open_teacher(config.teacher, student, Path(config.store) / "teachers", options=options)
        check_fit(Model(student, METHOD), Model(teacher, METHOD))
    except TtaError as error:
        return fail("teacher", f"{error.code}: {error.cause}", error.fix), None
    manifest = teacher.bundle.manifest
    return ok("teacher", f"{manifest.model_id}, {manifest.classes} classes, fits the student"), teacher


def check_learners(config: Config, student: Engines | None, teacher: Engines | None) -> Check:
    """Learners that were saved go on with these bundles."""
    if student is None or teacher is None:
        return ok("learners", "not looked at: that needs both bundles")
    try:
        snapshots = stores.snapshots(Path(config.store))
        learner = Learner(student, teacher, config.learner)
    except TtaError as error:
        return ok("learners", f"none to look at: {error.cause}")
    stale = []
    for group, snapshot in snapshots.items():
        try:
            learner.restore(snapshot)
        except TtaError as error:
            stale.append(f"{group} ({error.cause})")
    if stale:
        return warn(
            "learners",
            f"made with other bundles, these start anew: {'; '.join(stale)}",
            "Nothing where the bundles were changed on purpose; else name the former student and teacher",
        )
    return ok("learners", f"{len(snapshots)} go on with these bundles")


# --- addresses --------------------------------------------------------------------------------------


def check_address(name: str, endpoint: str, keys: bool, running: bool) -> Check:
    """An address can be bound, and is open to other machines only with keys.

    Args:
        name: of the setting.
        endpoint: tcp://HOST:PORT; empty for none.
        keys: whether the service has its keys: without them nothing is encrypted, and nobody is known.
        running: whether a service runs with this store already.
    """
    if not endpoint:
        return ok(name, "off")
    try:
        check_endpoint(endpoint)
    except TtaError as error:
        return fail(name, error.cause, error.fix)
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    reach = "this machine only" if is_loopback(host) else "other machines too, encrypted and by key"
    if not is_loopback(host) and not keys:
        return fail(
            name, f"{endpoint} is open to other machines, and there are no keys", "tta-cloud keys init"
        )
    return _bindable(name, endpoint, {"*": "0.0.0.0"}.get(host, host), _port(endpoint), reach, running)


def check_http(config: Config, running: bool) -> Check:
    """The address of metrics and health can be bound."""
    if config.http == OFF:
        return ok("http", "off")
    endpoint = f"tcp://{config.http}"
    try:
        host, port = parse_endpoint(endpoint)
    except TtaError:
        return fail("http", f"{config.http!r} is not HOST:PORT", "Write for example 127.0.0.1:7612, or off")
    if not is_loopback(host) and not config.allow_remote:
        return fail("http", f"{config.http} is open to other machines, without a password", "Use 127.0.0.1")
    reach = "this machine only" if is_loopback(host) else "other machines too"
    host = {"*": "0.0.0.0", "lo": "127.0.0.1"}.get(host, host)
    return _bindable("http", config.http, host, 0 if port == "*" else int(port), reach, running)


def _bindable(name: str, shown: str, host: str, port: int, reach: str, running: bool) -> Check:
    if port == 0:
        return ok(name, f"{shown} takes a free port; {reach}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and running:
            return ok(name, f"{shown} is in use, and a service runs with this store; {reach}")
        if error.errno == errno.EADDRINUSE:
            return fail(
                name, f"{shown} is in use by another process", f"Stop it, or set {name} to another port"
            )
        cause = error.strerror or str(error)
        return fail(
            name, f"{shown} cannot be bound: {cause}", "Use an address of this machine, port above 1023"
        )
    return ok(name, f"{shown} is free; {reach}")


def _port(endpoint: str) -> int:
    try:
        return urlsplit(endpoint).port or 0
    except ValueError:  # `*` takes a free one
        return 0
