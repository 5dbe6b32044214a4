"""How a daemon is doing and what it serves, in the words of `status` and `info`. Reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tta_edge.adapt import Stream
from tta_edge.auto import Auto
from tta_edge.cloud_side import CloudSide
from tta_edge.config import Config
from tta_edge.hosting import Host
from tta_edge.operating import Switch
from tta_edge.registry import Registry
from tta_edge.saver import Saver
from tta_edge.served import Served
from tta_edge.sessions import Sessions
from tta_edge.stats import Figures, Stats
from tta_edge.stepper import Stepper
from tta_edge.teaching import Bases
from tta_edge.texts import Texts
from tta_edge.wire import (
    AutoStatus,
    BundleStatus,
    Info,
    InfoReply,
    InputInfo,
    Requests,
    ServerLimits,
    StatusReply,
    StreamStatus,
    TextInfo,
)
from tta_runtime import __version__
from tta_runtime.memory import resident_bytes
from tta_runtime.model import Model
from tta_runtime.text_model import TextModel


class Overview:
    """Looks at all parts of a daemon. For any thread.

    Args:
        config: of the daemon.
        stats: counters and latencies.
        served: bundles.
        registry: streams.
        bases: on which they stand.
        stepper: has what they collect.
        sessions: of language models.
        texts: requests to these.
        switch: whether streams adapt.
        saver: knows how the disk is.
        cloud: knows how the link is.
        open_requests: how many requests are being worked on.
        began_s: when the daemon was started.
        clock: seconds.
    """

    def __init__(
        self,
        config: Config,
        stats: Stats,
        *,
        served: Served,
        registry: Registry,
        bases: Bases,
        stepper: Stepper,
        sessions: Sessions,
        texts: Texts,
        switch: Switch,
        saver: Saver | None,
        cloud: CloudSide,
        open_requests: Callable[[], int],
        began_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._stats = stats
        self._served = served
        self._registry = registry
        self._bases = bases
        self._stepper = stepper
        self._sessions = sessions
        self._texts = texts
        self._switch = switch
        self._saver = saver
        self._cloud = cloud
        self._open_requests = open_requests
        self._began_s = began_s
        self._clock = clock

    def info(self, message: Info) -> InfoReply:
        """What is served.

        Raises:
            UnknownBundle: there is no such bundle.
        """
        host = self._served.host(message.bundle)
        manifest = host.engines.bundle.manifest
        spec = manifest.methods[host.method]
        return InfoReply(
            id=message.id,
            version=__version__,
            bundle=host.name,
            model_id=manifest.model_id,
            bundle_digest=host.engines.bundle.digest,
            method=host.method,
            methods=sorted(manifest.methods),
            hyper={h.name: host.hyper.get(h.name, h.default) for h in spec.hyper},
            input=InputInfo(
                dtype=manifest.input.dtype,
                shape=list(manifest.input.shape),
                low=manifest.input.low,
                high=manifest.input.high,
            ),
            classes=manifest.classes,
            class_names=manifest.class_names,
            limits=ServerLimits(
                max_batch=self._config.max_batch,
                max_request_bytes=self._config.max_request_bytes,
                batch=spec.batch,
                min_batch=spec.min_batch,
            ),
            text=None if host.text is None else _text_info(host.text, self._config),
        )

    def status(self, request_id: int = 0, figures: Figures | None = None) -> StatusReply:
        """How the daemon is doing; for any thread."""
        figures = figures or self._stats.figures()
        return StatusReply(
            id=request_id,
            version=__version__,
            uptime_s=self._clock() - self._began_s,
            adapt=self._switch.on,
            policy=self._config.policy,
            bundles=[self._bundle_status(host) for host in self._served.all()],
            streams=[self._stream_status(stream) for stream in self._registry.all()],
            stored_streams=self._registry.stored(self._served.of_text()),
            state_dir=self._config.state_dir or "",
            requests=Requests(
                ok=figures.ok,
                failed=figures.failed,
                open=self._open_requests(),
                failures=dict(figures.refused),
            ),
            latency_ms=figures.latency(),
            rss_bytes=resident_bytes(),
            disk_error="" if self._saver is None else self._saver.error,
            cloud=self._cloud.info(),
            sessions=self._texts.status(),
            stored_sessions=self._sessions.stored(self._served.of_text()),
            text_bytes=self._sessions.nbytes,
        )

    def _bundle_status(self, host: Host) -> BundleStatus:
        bundle = host.engines.bundle
        status = BundleStatus(
            name=host.name,
            model_id=bundle.manifest.model_id,
            digest=bundle.digest,
            method=host.method,
            provider=", ".join(sorted(set(host.engines.providers.values()))),
            loads=host.loads,
            task="classification" if host.text is None else "text",
        )
        if host.text is not None:
            return status
        base, staged = self._bases.base(host.name), self._bases.candidate(host.name)
        return msgspec.structs.replace(
            status,
            base="" if not base.seq else f"{base.epoch}.{base.seq}",
            staged="" if staged is None else f"{staged[0]}.{staged[1]}",
            fallbacks=[str(fallback) for fallback in host.fallbacks],
        )

    def _stream_status(self, stream: Stream) -> StreamStatus:
        model, monitor, auto = stream.model, stream.monitor, stream.auto
        steps, distance, digest = theta_facts(model)
        return StreamStatus(
            id=stream.name,
            bundle=stream.bundle,
            method=model.method,
            steps=steps,
            theta_digest=digest,
            distance=distance,
            state=stream.state(self._switch.on),
            restored=stream.restored,
            samples=stream.samples,
            window=self._stepper.waiting(stream) if auto is None else len(auto.gallery),
            checkpoints=len(stream.checkpoints),
            entropy=monitor.entropy,
            diversity=monitor.diversity,
            agreement=monitor.agreement,
            last_event=stream.last_event,
            events=dict(stream.counts),
            auto=None if auto is None else _auto_status(auto),
        )


def _text_info(text: TextModel, config: Config) -> TextInfo:
    return TextInfo(
        tokenizer=text.text.tokenizer,
        tokenizer_digest=text.tokenizer.digest,
        chunk=text.text.chunk,
        context=text.text.context,
        begins=text.text.begin is not None,
        max_text_bytes=config.max_text_bytes,
    )


def theta_facts(model: Model) -> tuple[int, float, str]:
    """Steps, distance and digest of one theta, though a step in the background may be committed meanwhile."""
    while True:
        now = model.checkpoint
        facts = model.steps, model.distance, model.digest
        if model.checkpoint is now:
            return facts


def _auto_status(auto: Auto) -> AutoStatus:
    """What auto has decided for a stream."""
    return AutoStatus(
        mode="source" if auto.held else "resting" if auto.resting else "awake",
        change=auto.shift,
        shift=auto.report.get("shift"),
        share=auto.report.get("share"),
        gain=auto.gain,
        correlated=auto.prior.correlated,
        evidence=auto.prior.evidence,
    )
