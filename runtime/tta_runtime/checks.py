"""What a check of `tta-edge doctor` or `tta-cloud doctor` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Verdict(str, Enum):
    """Result of a check. Only `fail` means that the service will not do what it was set up for."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at, stable for machines.
        verdict: the result.
        text: what was found, with the values; where something is wrong, the cause.
        fix: what to do about it; empty where nothing is wrong.
    """

    name: str
    verdict: Verdict
    text: str
    fix: str = ""


def ok(name: str, text: str) -> Check:
    """Nothing is wrong."""
    return Check(name, Verdict.OK, text)


def warn(name: str, text: str, fix: str) -> Check:
    """Something that somebody should know."""
    return Check(name, Verdict.WARN, text, fix)


def fail(name: str, text: str, fix: str) -> Check:
    """Something that has to be put right."""
    return Check(name, Verdict.FAIL, text, fix)


def passed(found: Sequence[Check]) -> bool:
    """Whether no check failed."""
    return all(check.verdict is not Verdict.FAIL for check in found)


def form(found: Sequence[Check]) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "passed": passed(found),
        "checks": [
            {
                "number": number,
                "name": each.name,
                "verdict": each.verdict.value,
                "text": each.text,
                "fix": each.fix,
            }
            for number, each in enumerate(found, 1)
        ],
    }
