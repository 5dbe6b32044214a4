"""MessagePack from strangers: lengths are compared with what was received before anything is allocated from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack


class _BadKeyError(ValueError):
    """A key that is not a string, or two values for one: which one counts would depend on the reader."""


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise _BadKeyError(f"key {key!r} is not a string")
        if key in result:
            raise _BadKeyError(f"key {key!r} occurs twice")
        result[key] = value
    return result


def unpack(data: bytes, *, max_items: int, max_str_bytes: int, max_bin_bytes: int) -> Any:
    """One value with nothing after it, no extension types, and maps of string keys, each once.

    Args:
        data: as received.
        max_items: elements of one array or map.
        max_str_bytes: of one string.
        max_bin_bytes: of one binary value.

    Raises:
        ValueError: it is not that, or over a limit.
    """
    # A list or map of n elements takes at least n bytes: no honest message is refused by the smaller limit, and a
    # short one cannot ask for a long allocation.
    items = min(max_items, len(data))
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=max_str_bytes,
            max_bin_len=max_bin_bytes,
            max_ext_len=0,
            max_array_len=items,
            max_map_len=items,
            object_pairs_hook=_unique,
        )
    except (msgpack.UnpackException, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
