"""The bundles that a daemon serves: each loaded once, shared by all of its streams, replaced whole."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tta_edge.config import DEFAULT_BUNDLE, BundleConfig, Config
from tta_runtime import Limits
from tta_runtime.bundle import Bundle
from tta_runtime.engine import Engine, EngineOptions, Loader
from tta_runtime.errors import BadValue, MethodNeedsTeacher, UnknownMethod, did_you_mean
from tta_runtime.manifest_check import expect_task
from tta_runtime.model import Engines, Model
from tta_runtime.plan_build import Batches
from tta_runtime.selection import Fallback, Selector
from tta_runtime.text_model import PASS_TOKENS, TextModel

log = logging.getLogger(__name__)

NICENESS = 10  # of threads that step, so that an answer comes first where the cores do not suffice


@dataclass(frozen=True)
class Threads:
    """How the cores are divided.

    Attributes:
        serve: threads of the graphs that answer.
        step: threads of the graphs that step.
    """

    serve: int
    step: int


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def divide(config: Config, cores: int) -> Threads:
    """Threads for answers and for steps.

    With policy `inline` one follows the other, so both get all. In the background they run side by side: threads
    of their own that together are no more than the cores keep a step from slowing answers down.
    """
    threads = config.threads or cores
    if config.policy == "inline":
        return Threads(threads, config.step_threads or threads)
    step = config.step_threads or max(1, threads // 2)
    return Threads(max(1, threads - step), step)


def give_way() -> None:
    """Let the calling thread, and those it starts, run after the others where the cores do not suffice."""
    with suppress(OSError, AttributeError):  # where the system has no niceness for threads
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))


def _in_the_background(select: Loader, bundle: Bundle, graph: str, options: EngineOptions) -> Engine:
    """An engine whose own threads give way: they are as nice as the thread that loads it."""
    with ThreadPoolExecutor(1, "tta-loader", initializer=give_way) as pool:
        return pool.submit(select, bundle, graph, options).result()


@dataclass(frozen=True)
class Host:
    """One bundle that is served.

    Attributes:
        name: in this daemon.
        path: of the directory it was read from.
        engines: its loaded graphs.
        method: how theta changes.
        hyper: what is set of its hyper-parameters.
        loads: how often a bundle of this name was loaded.
        fallbacks: graphs that do not run where `auto` would have them.
        text: the language model, of a bundle of the task `text`.
    """

    name: str
    path: Path
    engines: Engines
    method: str
    hyper: Mapping[str, float]
    loads: int = 1
    fallbacks: tuple[Fallback, ...] = ()
    text: TextModel | None = None

    def model(self, config: Config) -> Model:
        """A new stream's model, at the source.

        Raises:
            WrongTask: the bundle is for text.
            MethodError, ConfigError: it has no such method or hyper-parameter.
        """
        limits = Limits(max_batch=config.max_batch, max_bytes=config.max_request_bytes)
        return Model(self.engines, self.method, hyper=self.hyper, seed=config.seed, limits=limits)


def wanted(config: Config) -> dict[str, BundleConfig]:
    """The bundles that a configuration names, the first one first.

    Raises:
        BadValue: two bundles are named `default`.
    """
    bundles = dict(config.bundles)
    if config.bundle is None and bundles:
        return bundles
    if DEFAULT_BUNDLE in bundles:
        raise BadValue(
            f"`bundle` is {config.bundle} and `bundles` has one named `{DEFAULT_BUNDLE}` as well",
            "Leave one of them out, or give the second another name",
        )
    return {DEFAULT_BUNDLE: BundleConfig(path=config.bundle or _builtin(), method=config.method), **bundles}


def load(name: str, bundle: BundleConfig, config: Config, *, before: Host | None = None) -> Host:
    """Open a bundle and load what its method needs.

    Args:
        name: in this daemon.
        bundle: where it is.
        config: of the daemon.
        before: the one that it replaces. Its engines are taken over where every file is the same.

    Raises:
        BundleError: the bundle is refused.
        MethodError: it has no such method or hyper-parameter, or the method learns from a teacher.
        EngineError: this machine cannot run its graphs.
        WrongTask: it is for another task than the one before.
        BadValue: it is for text, and `max_session_bytes` is too small for it.
    """
    opened = Bundle.open(bundle.path)
    known = opened.manifest.methods
    method = bundle.method or opened.manifest.default_method
    if method in known and opened.manifest.needs_teacher(method):
        alone = [other for other in known if not opened.manifest.needs_teacher(other)]
        raise MethodNeedsTeacher(
            f"method `{method}` learns from a teacher's logits, and a daemon has none",
            f"Choose one that adapts by itself: {', '.join(alone) or 'build the bundle with one'}",
        )
    if before is not None:
        expect_task(opened.manifest, before.engines.bundle.manifest.task)
    threads = divide(config, usable_cores())
    if before is not None and (before.engines.bundle.digest, before.method) == (opened.digest, method):
        engines, fallbacks, text = before.engines, before.fallbacks, before.text
    elif opened.manifest.text is not None:
        engines, fallbacks = _text_engines(opened, method, config)
        text = TextModel(engines, method)
    else:
        engines, fallbacks = _engines(opened, method, config, threads)
        text = None
    loads = 1 if before is None else before.loads + 1
    host = Host(name, Path(bundle.path), engines, method, config.hyper_of(method), loads, fallbacks, text)
    if text is None:
        host.model(config)  # a wrong hyper-parameter stops the daemon or the reload, not its first client
    else:
        check_memory(name, text, config)
    log.info(
        "serving `%s` (%s) with method `%s` of %s on %s, %d + %d threads, bundle %s",
        name,
        opened.manifest.model_id,
        method,
        ", ".join(known),
        ", ".join(sorted(set(engines.providers.values()))),
        threads.serve,
        threads.step,
        opened.digest[:12],
    )
    return host


def pass_bytes(text: TextModel, tokens: int) -> int:
    """Memory of a text while it is scored or generated: its cache twice, as a run takes one and gives another."""
    return 2 * tokens * text.cache_bytes + 4 * min(tokens, PASS_TOKENS) * text.manifest.classes


def check_memory(name: str, text: TextModel, config: Config) -> None:
    """Whether a language model has room to do anything at all.

    Raises:
        BadValue: one session and one text of full length need more than `max_session_bytes`.
    """
    needed = text.session_bytes + pass_bytes(text, text.text.context)
    if needed > config.max_session_bytes:
        raise BadValue(
            f"max_session_bytes is {config.max_session_bytes}, one session of `{name}` and one text of "
            f"{text.text.context} tokens need {needed}",
            "Raise max_session_bytes",
        )


def _engines(
    bundle: Bundle, method: str, config: Config, threads: Threads
) -> tuple[Engines, tuple[Fallback, ...]]:
    step_options = EngineOptions(threads=threads.step, tf32=config.tf32)
    select = Selector(
        config.engine,
        device=config.gpu,
        plan_cache=None if config.plan_cache is None else Path(config.plan_cache),
        batches=plan_batches(bundle, method, config),
    )

    def loader(bundle: Bundle, graph: str, options: EngineOptions) -> Engine:
        if config.policy != "inline" and options is step_options:
            return _in_the_background(select, bundle, graph, options)
        return select(bundle, graph, options)

    engines = Engines.load(
        bundle,
        methods=[method],
        options=EngineOptions(threads=threads.serve, tf32=config.tf32),
        step_options=step_options,
        loader=loader,
    )
    return engines, tuple(select.fallbacks)


def _text_engines(bundle: Bundle, method: str, config: Config) -> tuple[Engines, tuple[Fallback, ...]]:
    """Of a language model: `auto` is the CPU, where small decoders are fastest and others have not been tried."""
    select = Selector("cpu" if config.engine == "auto" else config.engine, device=config.gpu)
    # One thread answers and absorbs, so all cores are for both.
    options = EngineOptions(threads=config.threads or usable_cores(), tf32=config.tf32)
    engines = Engines.load(bundle, methods=[method], options=options, loader=select, task="text")
    return engines, tuple(select.fallbacks)


def plan_batches(bundle: Bundle, method: str, config: Config) -> Batches:
    """Samples that plans take at once: never fewer than a step of the method has."""
    spec = bundle.manifest.methods.get(method)
    needed = 1 if spec is None else max(spec.window, spec.min_batch)
    most = max(config.plan_max_batch, needed)
    return Batches(1, min(config.step_batch, most), most)


def load_all(config: Config) -> dict[str, Host]:
    """Every bundle of a configuration, the first one first; raises what `load` and `wanted` raise."""
    hosts = {name: load(name, bundle, config) for name, bundle in wanted(config).items()}
    known = {name for host in hosts.values() for name in host.engines.bundle.manifest.methods}
    for name in config.hyper_methods():
        if name not in known:
            raise UnknownMethod(
                f"hyper-parameters are set for unknown method `{name}`{did_you_mean(name, known)}",
                "Correct the name, or leave the setting out",
            )
    return hosts


def _builtin() -> str:
    from tta_edge.builtin import builtin_bundle

    return str(builtin_bundle())
