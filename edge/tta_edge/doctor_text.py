"""Checks of a language model on this machine: it scores, generates and absorbs, and how fast; how many sessions fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.filesize import decimal

from tta_edge.config import Config
from tta_edge.hosting import pass_bytes
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.errors import TtaError
from tta_runtime.text_model import TextModel

TOKENS = 16
"""That are generated to measure."""


def check_text(name: str, model: TextModel, config: Config) -> list[Check]:
    """Every check of one language model that has been loaded.

    Args:
        name: of the bundle in the daemon.
        model: of it.
        config: the caps.
    """
    chunk = [token % model.manifest.classes for token in range(model.text.chunk)]
    length = min(len(chunk), model.text.context - TOKENS) or 1
    session = model.session()
    kinds: dict[str, tuple[int, Callable[[], Any]]] = {
        "score": (length, lambda: session.score(chunk[:length])),
        "generate": (TOKENS, lambda: list(session.generate(chunk[:1], max_tokens=TOKENS))),
    }
    if model.spec.step is not None:
        kinds["absorb"] = (len(chunk), lambda: session.absorb(chunk))
    checks = [_run(f"{kind} {name}", tokens, run) for kind, (tokens, run) in kinds.items()]
    return [*checks, _sessions(name, model, config)]


def _run(check: str, tokens: int, run: Callable[[], Any]) -> Check:
    try:
        run()
        began_s = time.perf_counter()
        run()
        seconds = time.perf_counter() - began_s
    except TtaError as error:
        return fail(check, f"{error.code}: {error.cause}", error.fix)
    return ok(
        check, f"{tokens} tokens in {seconds * 1e3:.1f} ms, {tokens / seconds:.0f} a second, all finite"
    )


def _sessions(name: str, model: TextModel, config: Config) -> Check:
    check, each = f"sessions {name}", model.session_bytes
    longest = pass_bytes(model, model.text.context)
    fits = (config.max_session_bytes - longest) // each
    held = min(config.max_sessions, fits)
    text = (
        f"{decimal(each)} each and up to {decimal(longest)} for a text under way: {held} sessions in memory, beside "
        "one text of full length"
    )
    if held < config.max_sessions:
        return warn(
            check,
            f"{text}, fewer than max_sessions {config.max_sessions}",
            "Raise max_session_bytes, or lower max_sessions",
        )
    return ok(check, text)
