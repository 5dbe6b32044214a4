"""The configuration: flags > environment (TTA_CLOUD_*) > TOML file; unknown keys are errors with a suggestion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from tta_cloud.gate import GateOptions
from tta_cloud.intake import IntakeOptions
from tta_cloud.learner import LearnerOptions
from tta_cloud.rollout import RolloutOptions
from tta_runtime.errors import BadValue
from tta_runtime.settings import known, read_toml, typed

ENV_PREFIX = "TTA_CLOUD_"
ENV_CONFIG = "TTA_CLOUD_CONFIG"
TABLES = {
    "learner": LearnerOptions,
    "gate": GateOptions,
    "intake": IntakeOptions,
    "rollout": RolloutOptions,
}
"""Tables of the file, and what each configures."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `tta-cloud serve` is told."""

    student: str = ""
    """Directory of the bundle that the edges serve; it must have the method `distill`."""
    teacher: str = ""
    """A bundle's directory with `distill`, or a network: FILE.py:factory, timm:NAME."""
    teacher_weights: str | None = None
    """Weights of a FILE.py:factory teacher."""
    store: str = "tta-cloud"
    """Directory of samples, patches, keys and the ledger."""
    bind: str = "tcp://127.0.0.1:7610"
    """Where edges connect. Every connection is encrypted, and only enrolled keys are let in."""
    enroll_bind: str = "tcp://127.0.0.1:7611"
    """Where edges enrol with a token; empty: nowhere."""
    http: str = "off"
    """HOST:PORT of /metrics, /livez and /readyz, for example 127.0.0.1:7612; off: none."""
    allow_remote: bool = False
    """Whether `http` may be an address that other machines can reach; it is neither encrypted nor authenticated."""
    threads: int = 1
    """Of the engines."""
    head_every_s: float = 5.0
    """Seconds between two signed heads, the heartbeat."""
    max_samples: int = 100_000
    """Samples kept of a group; the oldest that were learned from go first."""
    max_sample_bytes: int = 1 << 30
    """Bytes of samples kept of a group."""
    retention_days: float = 30.0
    """Samples older than that are deleted, whatever became of them."""
    holdout: str | None = None
    """npz with x and y: labelled samples on which a patch must not lose either."""
    learner: LearnerOptions = LearnerOptions()
    gate: GateOptions = GateOptions()
    intake: IntakeOptions = IntakeOptions()
    rollout: RolloutOptions = RolloutOptions()
    log_level: str = "info"
    """debug, info, warning or error."""


def resolve(*, flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> Config:
    """The configuration from its three sources.

    Args:
        flags: by key; None where a flag was not given.
        environment: of the process; only TTA_CLOUD_* is looked at.
        file: TOML; without it the one that TTA_CLOUD_CONFIG names, if any.

    Raises:
        UnknownKey: a key or variable that there is not, with the nearest one.
        BadValue: a value of another type or out of range, or a file that cannot be read.
    """
    values: dict[str, Any] = {}
    if file is None and ENV_CONFIG in environment:
        file = Path(environment[ENV_CONFIG])
    if file is not None:
        values.update(_from_file(file))
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name != ENV_CONFIG:
            key = name.removeprefix(ENV_PREFIX).lower()
            known(key, KEYS, f"environment {name}")
            values[key] = _typed(key, environment[name], f"environment {name}", strict=False)
    for key, value in flags.items():
        if value is not None:
            values[key] = _typed(key, value, f"--{key.replace('_', '-')}", strict=False)
    return _checked(Config(**values))


def _from_file(file: Path) -> dict[str, Any]:
    origin, table = f"file {file}", read_toml(file, ENV_CONFIG)
    found: dict[str, Any] = {}
    for key, value in table.items():
        known(key, KEYS, origin)
        if key in TABLES:
            if not isinstance(value, dict):
                raise BadValue(f"{origin}: `{key}` is {value!r}", f"Write a table [{key}]")
            for name in value:
                known(name, [field.name for field in fields(TABLES[key])], origin, table=key)
        found[key] = _typed(key, value, origin, strict=True)
        # A path in a file means the same wherever the service is started.
        if key in ("student", "store", "holdout", "teacher_weights"):
            found[key] = str(file.parent / found[key])
        if key == "teacher" and (file.parent / value).exists():
            found[key] = str(file.parent / value)
    return found


KEYS = Config.__struct_fields__
_TYPES = {info.name: info.type for info in msgspec.structs.fields(Config)}


def _typed(key: str, value: Any, origin: str, *, strict: bool) -> Any:
    return typed(key, value, _TYPES[key], origin, strict=strict)


def _checked(config: Config) -> Config:
    """What types do not say."""
    positive = {
        "threads": config.threads,
        "head_every_s": config.head_every_s,
        "max_samples": config.max_samples,
        "max_sample_bytes": config.max_sample_bytes,
        "retention_days": config.retention_days,
        "learner.new": config.learner.new,
        "learner.rounds": config.learner.rounds,
        "learner.publish_rate": config.learner.publish_rate,
        "intake.max_waiting": config.intake.max_waiting,
        "intake.fairness": config.intake.fairness,
    }
    for key, number in {
        "learner.nearest": config.learner.nearest,
        "learner.nearest_distance": config.learner.nearest_distance,
    }.items():
        if not number >= 0:
            raise BadValue(f"`{key}` is {number:g}", "Give 0 or more")
    for key, value in positive.items():
        if value <= 0:
            raise BadValue(f"`{key}` is {value}", "Give a number above 0")
    shares = {
        "gate.tolerance": config.gate.tolerance,
        "rollout.canary_share": config.rollout.canary_share,
        "rollout.success_share": config.rollout.success_share,
        "rollout.error_share": config.rollout.error_share,
        "intake.max_share": config.intake.max_share,
        "learner.publish_rate": config.learner.publish_rate,
    }
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise BadValue(f"`{key}` is {share:g}", "Give a share from 0 to 1")
    if not 0 <= config.gate.trim < 0.5:
        raise BadValue(f"`gate.trim` is {config.gate.trim:g}", "Give a share from 0 to below 0.5")
    return config
