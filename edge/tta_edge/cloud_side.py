"""What a daemon has to do with the cloud: enrolled or not, a link or none, and what its answers are good for there.

Only the first bundle is taught. In a mode that takes no patches there is no link, and bases stay as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tta_edge.adapt import Answer, Stream
from tta_edge.cloud import CloudLink, Offer
from tta_edge.config import Config
from tta_edge.enrol import Enrolment
from tta_edge.enrol import load as load_enrolment
from tta_edge.errors import ModeRefused, NotEnrolled
from tta_edge.events import Reason, Tell
from tta_edge.hosting import Host
from tta_edge.sending import Jpeg, Sender, encoder
from tta_edge.served import Served
from tta_edge.spool import Spool
from tta_edge.teaching import TAUGHT, Bases, check_mode
from tta_edge.wire import CloudInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Footing:
    """On what footing a daemon is with the cloud.

    Attributes:
        enrolment: None: it has nothing to do with it.
        sends: whether samples go there.
        jpegs: how they are encoded; None: as they are.
    """

    enrolment: Enrolment | None
    sends: bool
    jpegs: Jpeg | None

    @classmethod
    def find(cls, config: Config, served: Served) -> Footing:
        """How it is, and whether the bundles go with it. Changes nothing.

        Raises:
            ModeRefused: a bundle does not go with the mode.
            NotEnrolled: the mode needs an enrolment, and there is none.
            NotAnImage, ImagesExtraMissing: samples are to go to the cloud as JPEG and cannot.
        """
        for host in served.of_images().values():
            check_mode(config.mode, host)
        first = served.host("")
        if config.mode in TAUGHT and first.text is not None:
            raise ModeRefused(
                f"mode `{config.mode}` teaches the first bundle, and `{first.name}` is a language model",
                "Set mode = local",
            )
        enrolment = _enrolment(config) if config.mode in TAUGHT else None
        sends = enrolment is not None and config.upload != "off"
        spec = first.engines.bundle.manifest.input
        jpegs = encoder(config.upload_encoding, config.upload_jpeg_quality, spec) if sends else None
        return cls(enrolment, sends, jpegs)


class CloudSide:
    """The daemon's end of all that concerns the cloud.

    Args:
        config: of the daemon.
        footing: see there.
        host: the bundle that is taught.
        bases: of all bundles.
        offer: takes a verified theta of that bundle; for any thread.
        tell: takes events.
    """

    def __init__(
        self,
        config: Config,
        footing: Footing,
        host: Host,
        bases: Bases,
        *,
        offer: Offer,
        tell: Tell,
    ) -> None:
        self._taught = host.name
        self._bases = bases
        self._link: CloudLink | None = None
        if footing.enrolment is not None:
            self._link = CloudLink(
                footing.enrolment,
                host.engines.bundle,
                config.mode,
                lambda: bases.base(host.name),
                offer,
                Spool(
                    footing.enrolment.directory.parent / "spool",
                    max_samples=config.max_spool_samples,
                    max_bytes=config.max_spool_bytes,
                    tell=tell,
                ),
                max_distance=config.max_distance,
            )
        self._sender = Sender(
            config.upload if footing.sends else "off",
            share=config.upload_share,
            samples_per_minute=config.upload_samples_per_minute,
            bytes_per_minute=config.upload_bytes_per_minute,
            send=lambda uploads: None if self._link is None else self._link.send(uploads),
            seed=config.seed,
            encoder=footing.jpegs,
        )

    def start(self) -> None:
        """Begin to talk to the cloud, where there is one."""
        if self._link is not None:
            self._link.start()

    def close(self) -> None:
        """End it."""
        if self._link is not None:
            self._link.close()

    def info(self) -> CloudInfo | None:
        """How the link is; None where there is none. For any thread."""
        if self._link is None:
            return None
        return self._link.info(seen=self._sender.seen, chosen=self._sender.chosen)

    def answered(self, host: Host, stream: Stream, x: NDArray[Any], answer: Answer) -> None:
        """Judge bases by an answer, and send its samples where they are worth it.

        Nobody waits for that, and nothing of it may cost an answer: it raises nothing.

        Args:
            host: of the stream.
            stream: that has answered.
            x: [batch, ...], as the model takes it.
            answer: to it.
        """
        try:
            if answer.reason in (Reason.COLLAPSE, Reason.NON_FINITE_LOGITS):
                self._bases.collapsed(host, f"stream `{stream.name}`: {answer.reason.value}")
            self._bases.answered(host, stream, x, answer.logits)
            if host.name == self._taught:
                self._sender.answered(stream.name, x, answer.logits, self._bases.base(host.name))
        except Exception:
            log.exception("a defect while a base was judged or samples were chosen")


def _enrolment(config: Config) -> Enrolment:
    """What this edge is known by.

    Raises:
        NotEnrolled: the state directory holds no enrolment, or there is none.
    """
    if config.state_dir is None:
        raise NotEnrolled(
            f"mode `{config.mode}` needs the enrolment of a state directory, and none is set",
            "Set `state_dir` to the directory that `tta-edge enroll` was given",
        )
    return load_enrolment(Path(config.state_dir))
