"""A literal bad bundle for each rule of docs/spec/bundle.md that is for text; each spoils a good tiny text bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_bundles import Bad, Json, drop, edited, put, reseal
from tta_runtime import errors

WORDS: Json = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "hello": 1, "world": 2}, "unk_token": "[UNK]"},
}
"""A tokenizer file of three words."""


def tokenizer(data: bytes) -> Callable[[Path], None]:
    """Put a tokenizer file into the bundle."""

    def spoil(path: Path) -> None:
        (path / "tokenizer.json").write_bytes(data)
        put("text", "tokenizer", value="tokenizer.json")(path)
        reseal(path)

    return spoil


def port(graph: str, side: str, name: str, **changes: Any) -> Callable[[Path], None]:
    """Change one port of a graph; without changes it goes."""

    def change(data: Json) -> None:
        ports = data["graphs"][graph][side]
        (place,) = (place for place, each in enumerate(ports) if each["name"] == name)
        if changes:
            ports[place] |= changes
        else:
            del ports[place]

    return edited(change)


def _images(data: Json) -> None:
    data["task"] = "classification"
    data["input"] |= {"dtype": "uint8", "shape": ["batch", 3], "layout": "flat"}


def _vocabulary(size: int) -> Callable[[Path], None]:
    def change(data: Json) -> None:
        data["classes"], data["input"]["high"] = size, size - 1.0
        data["text"]["begin"] = None

    return edited(change)


_LARGE = {**WORDS, "model": {**WORDS["model"], "vocab": {"[UNK]": 0, "hello": 1, "world": 999}}}
_GROUPS: list[tuple[str, type[errors.TtaError], bool, dict[str, tuple[Any, ...]]]] = [
    (
        "B17",
        errors.ManifestInconsistent,
        False,
        {
            "no text": (drop("text"), "task is `text`, and `text` is missing"),
            "text of another task": (edited(_images), "task is `classification`", "`text` is given"),
            "task unknown": (put("task", value="speech"), "`speech`", "text"),
            "input of floats": (put("input", "dtype", value="float32"), "float32", "int64"),
            "input of two texts": (put("input", "shape", value=["batch", "tokens"]), "batch"),
            "input beyond the vocabulary": (put("input", "high", value=257.0), "257.0", "256.0"),
            "no chunk": (put("text", "chunk", value=0), "chunk is 0"),
            "chunk as long as the context": (put("text", "chunk", value=96), "96"),
            "chunk without bound": (edited(lambda d: d["text"].update(chunk=65537, context=1 << 20)), "65537", "65536"),
            "cache of another rank": (put("text", "cache", value=[2, 2, 16]), "[2, 2, 16]"),
            "cache of one array": (put("text", "cache", value=[2, 1, 2, 8]), "[2, 1, 2, 8]"),
            "cache without heads": (put("text", "cache", value=[2, 2, 0, 8]), "dimension of 0"),
            "cache without bound": (put("text", "cache", value=[1 << 30, 2, 1 << 30, 8]), "text.cache"),
            "begin beyond the vocabulary": (put("text", "begin", value=257), "begin is 257", "257 tokens"),
            "end beyond the vocabulary": (put("text", "end", value=1000), "end is 1000"),
            "bytes with too few tokens": (_vocabulary(255), "bytes", "255"),
            "served by something else": (
                put("methods", "source", "serve_vector", value="state:theta"), "serve_vector", "state:theta",
            ),
        },
    ),
    (
        "B18",
        errors.GraphMismatch,
        False,
        {
            "no cache in": (port("forward", "inputs", "cache"), "takes", "cache"),
            "no cache out": (port("forward", "outputs", "cache_out"), "returns", "cache"),
            "cache of other heads": (port("forward", "inputs", "cache", shape=[1, 2, 1, 4, "past", 8]), "4", "cache"),
            "logits of other classes": (port("forward", "outputs", "logits", shape=[1, "tokens", 9]), "9", "257"),
            "tokens of another dtype": (port("forward", "inputs", "x", dtype="float32"), "float32", "int64"),
            "forward takes a state": (
                port("forward", "inputs", "cache", bind="state", key="cache"), "must need only", "cache",
            ),
            "another chunk": (port("absorb", "inputs", "x", shape=[1, 8]), "[1, 8]", "16"),
            "absorb without theta": (port("absorb", "outputs", "theta_out"), "returns", "theta"),
            "absorb without a state": (port("absorb", "inputs", "state.0_o"), "0_o"),
            "theta of another size": (port("absorb", "outputs", "theta_out", shape=[7]), "[7]", "392"),
        },
    ),
    (
        "B18",
        errors.ManifestInconsistent,
        False,
        {"a step instead of absorb": (put("graphs", "absorb", "role", value="step"), "no absorb graph `absorb`")},
    ),
    (
        "B19",
        errors.ManifestInconsistent,
        False,
        {"tokenizer that is not there": (put("text", "tokenizer", value="tokenizer.json"), "`tokenizer.json`")},
    ),
    (
        "B19",
        errors.TokenizerRefused,
        True,
        {
            "tokenizer that is no JSON": (tokenizer(b"\xff\xfe{"), "`tokenizer.json` is no tokenizer"),
            "tokenizer of another kind": (tokenizer(b'{"hello": 1}'), "no tokenizer"),
            "tokenizer with more tokens": (tokenizer(json.dumps(_LARGE).encode()), "token 999", "257"),
        },
    ),
]  # fmt: skip

BAD_TEXT_BUNDLES = [
    Bad(name, rule, error, entry[0], entry[1:], at_load)
    for rule, error, at_load, entries in _GROUPS
    for name, entry in entries.items()
]
