"""Settings of the daemon: flags over environment (`TTA_*`) over a TOML file over defaults, with their origin.

One typed structure declares every setting; the file's keys, the environment's names and the flags follow from
it. A misspelt key is an error at once, wherever it stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tta_edge.wire import NAME_PATTERN
from tta_runtime.errors import BadValue, UnknownKey
from tta_runtime.settings import known, read_toml, typed

ENV_PREFIX = "TTA_"
ENV_SET = "TTA_SET"
ENV_CONFIG = "TTA_CONFIG"
ENV_BUNDLES = "TTA_BUNDLES"
DEFAULT_BUNDLE = "default"
HTTP_OFF = "off"

Hyper = dict[str, float | dict[str, float]]
BundleName = Annotated[str, Meta(pattern=NAME_PATTERN)]
_GIVEN = {"bundle": "argument BUNDLE", "bundles": "flag --bundle"}  # others are flags of their own name


class BundleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more bundle of the daemon."""

    path: str
    """Directory of the bundle."""
    method: str | None = None
    """How theta changes; without it the bundle's default."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `tta-edge serve` can be told."""

    bind: str = "tcp://127.0.0.1:5555"
    """Where to listen: tcp://HOST:PORT; port 0 takes a free one."""
    allow_remote: bool = False
    """Allow a bind that other machines can reach. Clients are not authenticated."""
    bundle: str | None = None
    """Directory of the first bundle, named `default`; without it and without `bundles` the built-in one."""
    bundles: dict[BundleName, BundleConfig] = msgspec.field(default_factory=dict)
    """More bundles by name."""
    method: str | None = None
    """How theta changes; without it the bundle's default. Of the first bundle."""
    hyper: Hyper = msgspec.field(default_factory=dict)
    """Hyper-parameters of the method served (`lr`), or of one method by name (a table)."""
    engine: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """What computes. `auto`: TensorRT where the bundle was built for it, else CUDA, else the CPU; where a GPU is there
    and not used, a warning, the status and a metric say so. Another is taken at its word, or nothing is served."""
    gpu: Annotated[int, Meta(ge=0, le=1023)] = 0
    """Number of the GPU."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products to 10 bits: faster, and answers differ from the CPU's."""
    plan_cache: str | None = None
    """Directory, mode 0700, that keeps the plans which TensorRT builds; without it the service's or user's cache."""
    plan_max_batch: Annotated[int, Meta(ge=1, le=65_536)] = 64
    """Most samples that a TensorRT plan takes at once; larger requests are answered in parts and not stepped on."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Threads of all engines together; without it one for each core. Background policies split them."""
    step_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Threads of the steps; without it half of `threads`, or all of them with policy `inline`."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Of the random numbers that a method uses; a run with the same seed and data repeats bit for bit."""
    mode: Literal["off", "local", "cloud", "both"] = "local"
    """Who improves theta. `local`: the streams themselves. `cloud`: patches that come from a cloud service, beside a
    method that learns nothing by gradient (auto, norm, source). `both`: patches, and any method. `off`: nobody."""
    probation_samples: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Samples answered while a new base is judged in shadow, before it serves; each costs one more forward pass."""
    upload: Literal["off", "budgeted", "cema", "released", "random", "all"] = "off"
    """Which answered samples go to the cloud, in the modes `cloud` and `both`. `budgeted`: about `upload_share` of each
    stream, whatever its answers are like; `cema` and `released`: thresholds on their entropy, as published."""
    upload_share: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Share of each stream that `budgeted` and `random` send."""
    upload_samples_per_minute: Annotated[int, Meta(ge=0)] = 0
    """Most samples sent in a minute, over all streams; 0 for no limit."""
    upload_bytes_per_minute: Annotated[int, Meta(ge=0)] = 0
    """Most bytes sent in a minute; 0 for no limit."""
    upload_encoding: Literal["lossless", "jpeg"] = "lossless"
    """How samples go to the cloud: the very bytes, or as JPEG, for images of one or three channels and of one size;
    needs Pillow here and there. Budgets and the spool count what is sent."""
    upload_jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 90
    """Of those JPEG files, as libjpeg has it."""
    max_spool_samples: Annotated[int, Meta(ge=8)] = 10_000
    """Most samples that wait on disk for the cloud; beyond it the oldest are dropped."""
    max_spool_bytes: Annotated[int, Meta(ge=65_536)] = 256 * 1024 * 1024
    """Most bytes of their files."""
    adapt: bool = True
    """Whether streams adapt at all; `false` serves what is there. `tta-edge adapt` switches while running."""
    policy: Literal["inline", "always", "every", "budget"] = "inline"
    """When a step runs. `inline`: a large enough request is predicted and adapted on in one pass. `always`,
    `every`, `budget`: requests are answered at once and samples collected; a step runs in the background for
    each `step_batch` samples, for each `every_samples`, or within a share of the time."""
    inline_min_batch: Annotated[int, Meta(ge=1)] = 16
    """Policy `inline`: smaller requests are answered and their samples collected, as with `always`."""
    step_batch: Annotated[int, Meta(ge=1, le=65_536)] = 64
    """Samples of one background step."""
    every_samples: Annotated[int, Meta(ge=1)] = 256
    """Policy `every`: samples of a stream between two of its steps."""
    budget: Annotated[float, Meta(gt=0, le=1)] = 0.25
    """Policy `budget`: share of the time that background steps may take, over all streams."""
    window: Annotated[int, Meta(ge=1, le=1_000_000)] = 256
    """Most samples that wait for a step, for each stream; beyond it the oldest are dropped."""
    max_window_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024 * 1024
    """Most bytes that wait for steps, over all streams; beyond it the samples of those streams are dropped that
    got none for the longest."""
    batch_max: Annotated[int, Meta(ge=1)] = 64
    """Most samples of requests answered in one run of the engine; 1 answers each request by itself."""
    batch_wait_ms: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """How long a request may wait for others to share a run; 0 merges only what waits anyway."""
    max_batch: Annotated[int, Meta(ge=1)] = 1024
    """Most samples in one request."""
    max_request_bytes: Annotated[int, Meta(ge=1024, le=2**31)] = 64 * 1024 * 1024
    """Most tensor bytes in one request."""
    max_queue: Annotated[int, Meta(ge=1, le=65_536)] = 64
    """Most requests waiting; one more is answered `busy`."""
    max_queue_bytes: Annotated[int, Meta(ge=1024)] = 256 * 1024 * 1024
    """Most tensor bytes waiting; a request beyond them is answered `busy`, unless nothing else waits."""
    max_client_requests: Annotated[int, Meta(ge=1, le=65_536)] = 16
    """Most requests of one client waiting; one more is answered `busy`."""
    max_streams: Annotated[int, Meta(ge=1, le=65_536)] = 64
    """Most streams held in memory. With a state directory the least recently used one goes to disk, without
    one a further stream is refused."""
    max_stored_streams: Annotated[int, Meta(ge=1)] = 4096
    """Most streams on disk; beyond it the least recently used one is forgotten."""
    state_dir: str | None = None
    """Directory in which streams, the kill switch and events survive a restart; without it nothing does."""
    checkpoint_steps: Annotated[int, Meta(ge=1)] = 20
    """Steps between two checkpoints of a stream: what a rollback returns to, and what is on disk."""
    max_event_bytes: Annotated[int, Meta(ge=4096)] = 1024 * 1024
    """Size at which the event log of the state directory is rotated; one older file is kept."""
    max_sessions: Annotated[int, Meta(ge=1, le=65_536)] = 1024
    """Most sessions of language models held in memory. With a state directory the least recently used one goes to
    disk, without one a further session is refused."""
    max_session_bytes: Annotated[int, Meta(ge=65_536)] = 256 * 1024 * 1024
    """Most memory of sessions and of texts that are scored or generated; likewise."""
    max_text_bytes: Annotated[int, Meta(ge=1)] = 1024 * 1024
    """Most bytes of one text that is scored, absorbed or gone on from."""
    max_distance: Annotated[float, Meta(gt=0)] = 1.0
    """Radius of the ball around the source theta, as relative L2 distance. BatchNorm networks move by 0.1 to
    0.4 under the strongest common corruptions, most of it in their statistics."""
    reset_every_steps: Annotated[int, Meta(ge=0)] = 1000
    """Return to the source after so many steps, as a backstop; 0 never does."""
    min_diversity: Annotated[float, Meta(ge=0, le=1)] = 0.3
    """Collapse is suspected where the entropy of the mean prediction falls below this fraction of ln C, and
    established where the frozen source's is clearly higher on the same samples; 0 turns the guard off."""
    http: str = "127.0.0.1:5556"
    """Where /metrics, /livez and /readyz answer: HOST:PORT; port 0 takes a free one; `off` for none."""
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    """How long open requests may take to finish when the daemon is told to stop."""
    ready_file: str | None = None
    """File to leave the endpoint in when the daemon is ready; removed when it ends."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message to log."""
    log_format: Literal["text", "json"] = "text"
    """One line of text or one JSON object per message."""

    def hyper_of(self, method: str) -> dict[str, float]:
        """The hyper-parameters set for one method: bare ones first, the method's own table over them."""
        bare = {name: value for name, value in self.hyper.items() if not isinstance(value, dict)}
        own = self.hyper.get(method, {})
        return {**bare, **(own if isinstance(own, dict) else {})}

    def hyper_methods(self) -> list[str]:
        """The methods that have a table of their own."""
        return [name for name, value in self.hyper.items() if isinstance(value, dict)]


KEYS = Config.__struct_fields__


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its values came from.

    Attributes:
        config: the settings.
        origin: key -> `default`, `file PATH`, `environment TTA_NAME` or `flag --name`; hyper-parameters stand
            as `hyper.lr` and `hyper.tent.lr`.
    """

    config: Config
    origin: Mapping[str, str]


@dataclass
class _Layers:
    """Values collected from the weakest to the strongest source."""

    values: dict[str, Any] = field(default_factory=dict)
    hyper: Hyper = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=lambda: dict.fromkeys(KEYS, "default"))

    def put(self, key: str, value: object, origin: str, *, strict: bool) -> None:
        """Set one key, checked by itself so that the error can say where the value stands."""
        self.values[key] = _checked(key, value, origin, strict=strict)
        self.origin[key] = origin

    def put_hyper(self, settings: Hyper, origin: str) -> None:
        """Lay the hyper-parameters of one source over those of the weaker ones."""
        self.origin["hyper"] = origin if settings else self.origin["hyper"]
        for name, value in settings.items():
            if isinstance(value, dict):
                table = self.hyper.setdefault(name, {})
                if not isinstance(table, dict):
                    raise _mixed(name, origin)
                table.update(value)
                self.origin.update({f"hyper.{name}.{key}": origin for key in value})
            else:
                self._put_bare(name, value, origin, settings)

    def _put_bare(self, name: str, value: float, origin: str, settings: Hyper) -> None:
        if isinstance(self.hyper.get(name), dict):
            raise _mixed(name, origin)
        self.hyper[name] = value
        self.origin[f"hyper.{name}"] = origin
        for method, table in self.hyper.items():
            # `--set lr=..` is stronger than `[hyper.tent] lr` in the file, though the table is more specific.
            same = settings.get(method)
            if isinstance(table, dict) and not (isinstance(same, dict) and name in same):
                table.pop(name, None)
                self.origin.pop(f"hyper.{method}.{name}", None)


def resolve(
    *,
    flags: Mapping[str, object] | None = None,
    settings: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Resolved:
    """Settle every setting.

    Args:
        flags: key -> value as given on the command line; `None` means not given.
        settings: `NAME=VALUE` or `METHOD.NAME=VALUE` hyper-parameters of the command line.
        environment: of the process; only `TTA_*` is looked at.
        file: TOML file; without it the one that `TTA_CONFIG` names, if any.

    Raises:
        UnknownKey: a key of the file or a `TTA_*` name that is almost one of ours.
        BadValue: a value of the wrong type or out of range, a file that cannot be read.
    """
    environment = environment or {}
    layers = _Layers()
    if file is None and ENV_CONFIG in environment:
        file = Path(environment[ENV_CONFIG])
    if file is not None:
        _put_file(layers, file)
    _put_environment(layers, environment)
    for key, value in (flags or {}).items():
        if value is not None:
            layers.put(key, value, _GIVEN.get(key, f"flag --{key.replace('_', '-')}"), strict=True)
    layers.put_hyper(parse_settings(settings, "flag --set"), "flag --set")
    return Resolved(Config(**layers.values, hyper=layers.hyper), layers.origin)


def parse_settings(settings: Iterable[str], origin: str) -> Hyper:
    """Hyper-parameters from `NAME=VALUE` and `METHOD.NAME=VALUE`.

    Raises:
        BadValue: anything of another form.
    """
    result: Hyper = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        method, dot, name = path.strip().rpartition(".")
        value = _number(text)
        if not equals or not name or (dot and not method) or value is None:
            raise BadValue(
                f"{origin}: {setting!r} is not a hyper-parameter setting",
                "Write NAME=NUMBER or METHOD.NAME=NUMBER, for example lr=0.001 or tent.lr=0.001",
            )
        table = result.setdefault(method, {}) if dot else result
        if not isinstance(table, dict):
            raise _mixed(method, origin)
        table[name] = value
    return result


def parse_bundles(given: Iterable[str], origin: str) -> dict[str, dict[str, str]]:
    """Bundles by name from `NAME=DIRECTORY`, in the form the file has them.

    Raises:
        BadValue: anything of another form, or a name given twice.
    """
    result: dict[str, dict[str, str]] = {}
    for text in given:
        name, equals, path = (part.strip() for part in text.partition("="))
        if not equals or not name or not path or name in result:
            raise BadValue(
                f"{origin}: {text!r} does not name one more bundle", "Write NAME=DIRECTORY, each name once"
            )
        result[name] = {"path": path}
    return result


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _put_file(layers: _Layers, file: Path) -> None:
    origin = f"file {file}"
    table = read_toml(file, ENV_CONFIG)
    for key, value in table.items():
        known(key, KEYS, origin)
        if key == "hyper":
            layers.put_hyper(_checked(key, value, origin, strict=True), origin)
        else:
            layers.put(key, value, origin, strict=True)
    # A path in a file means the same wherever the daemon is started.
    for key in ("bundle", "state_dir", "plan_cache"):
        if layers.values.get(key) is not None and key in table:
            layers.values[key] = str(file.parent / layers.values[key])
    if "bundles" in table:
        layers.values["bundles"] = {
            name: msgspec.structs.replace(bundle, path=str(file.parent / bundle.path))
            for name, bundle in layers.values["bundles"].items()
        }


def _put_environment(layers: _Layers, environment: Mapping[str, str]) -> None:
    names = {ENV_PREFIX + key.upper(): key for key in KEYS if key not in ("hyper", "bundles")}
    for name in sorted(environment):
        if name in names:
            layers.put(names[name], environment[name], f"environment {name}", strict=False)
        elif name == ENV_BUNDLES:
            given = [part for part in environment[name].split(",") if part.strip()]
            layers.put(
                "bundles", parse_bundles(given, f"environment {name}"), f"environment {name}", strict=True
            )
        elif name.startswith(ENV_PREFIX) and name not in (ENV_SET, ENV_CONFIG):
            # Others may use the prefix for their own purposes; only what looks like a slip is refused.
            ours = [*names, ENV_SET, ENV_CONFIG, ENV_BUNDLES]
            meant = difflib.get_close_matches(name, ours, n=1, cutoff=0.85)
            if meant:
                raise UnknownKey(
                    f"unknown environment variable `{name}`, did you mean `{meant[0]}`?",
                    "Correct its name, or unset it",
                )
    origin = f"environment {ENV_SET}"
    parts = [part for part in environment.get(ENV_SET, "").split(",") if part.strip()]
    layers.put_hyper(parse_settings(parts, origin), origin)


_TYPES = {info.name: info.type for info in msgspec.structs.fields(Config)}


def _checked(key: str, value: object, origin: str, *, strict: bool) -> Any:
    return typed(key, value, _TYPES[key], origin, strict=strict)


def _mixed(name: str, origin: str) -> BadValue:
    return BadValue(
        f"{origin}: `hyper.{name}` is a number in one place and a table in another",
        "A table is named after a method, a number after a hyper-parameter",
    )
