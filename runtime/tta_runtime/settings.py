"""Settings of a service: a TOML file, keys that exist, values of their types. A misspelt key is an error at once."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from .errors import BadValue, UnknownKey, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(file: Path, variable: str) -> dict[str, Any]:
    """The tables of a file.

    Args:
        file: TOML, utf-8.
        variable: of the environment, beside `--config`, that may have named it.

    Raises:
        BadValue: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadValue(
            f"cannot read the configuration file {file}: {error.strerror}", f"Correct --config or {variable}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadValue(f"{file} is not a TOML file: {error}", "Correct the file at that place") from error


def known(key: str, keys: Collection[str], origin: str, *, table: str = "") -> None:
    """Whether there is such a key.

    Args:
        key: as it was written.
        keys: that there are.
        origin: where it was written.
        table: whose key it is; empty at the top.

    Raises:
        UnknownKey: there is none; the nearest one is named.
    """
    if key not in keys:
        full = f"{table}.{key}" if table else key
        place = f"Keys of [{table}] are" if table else "Keys are"
        raise UnknownKey(
            f"{origin}: unknown key `{full}`{did_you_mean(key, keys)}", f"{place} {', '.join(keys)}"
        )


def typed(key: str, value: object, kind: Any, origin: str, *, strict: bool) -> Any:
    """A value of the declared type.

    Args:
        key: it is for.
        value: as it was written.
        kind: its type, with its range.
        origin: where it was written.
        strict: whether text must not stand for a number, as it does in the environment.

    Raises:
        BadValue: it cannot be.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise BadValue(f"{origin}: `{key}` cannot be {value!r}: {error}", f"Correct `{key}`") from error
