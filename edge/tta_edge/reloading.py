"""Reading bundles again while they are served: loaded in a thread of its own, taken over between two requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from tta_edge.batching import Call
from tta_edge.config import BundleConfig, Config
from tta_edge.errors import Internal, ReloadUnderWay
from tta_edge.events import Event, Reason, Tell
from tta_edge.hosting import Host, load, wanted
from tta_edge.registry import Registry
from tta_edge.served import Served
from tta_edge.session import Arrived, Emit, Refuse
from tta_edge.teaching import Bases
from tta_edge.texts import Texts
from tta_edge.wire import ReloadDone
from tta_runtime.errors import TtaError
from tta_runtime.memory import return_free_memory

log = logging.getLogger(__name__)


class Reloads:
    """Replaces bundles. `begin` and `begin_all` are for the answering thread.

    Args:
        config: of the daemon: where the bundles are.
        served: the bundles that are served.
        registry: whose streams go on with a new one.
        bases: are looked up anew for a new one.
        texts: whose sessions go on with a new one.
        tell: takes events.
        call: has something done by the answering thread between two requests.
        finish: takes the reply to a request.
        refuse: takes the error that a request is answered with.
    """

    def __init__(
        self,
        config: Config,
        served: Served,
        registry: Registry,
        bases: Bases,
        texts: Texts,
        *,
        tell: Tell,
        call: Callable[[Call], None],
        finish: Emit,
        refuse: Refuse,
    ) -> None:
        self._config = config
        self._served = served
        self._registry = registry
        self._bases = bases
        self._texts = texts
        self._tell = tell
        self._call = call
        self._finish = finish
        self._refuse = refuse
        self._under_way: set[str] = set()

    def begin_all(self) -> None:
        """Read every bundle again; how it ends is told by events."""
        for host in self._served.all():
            if host.name not in self._under_way:
                self.begin(host.name, None)

    def begin(self, name: str, arrived: Arrived | None) -> None:
        """Read a bundle again.

        Args:
            name: of the bundle; empty for the first one.
            arrived: the request that is answered at the end, if there is one.

        Raises:
            UnknownBundle: there is no such bundle.
            ReloadUnderWay: it is being read already.
        """
        old = self._served.host(name)
        if old.name in self._under_way:
            raise ReloadUnderWay(f"bundle `{old.name}` is being reloaded already", "Wait for it to finish")
        self._under_way.add(old.name)
        bundle = wanted(self._config)[old.name]
        threading.Thread(
            target=self._load, args=(old, bundle, arrived), name="tta-loader", daemon=True
        ).start()

    def _load(self, old: Host, bundle: BundleConfig, arrived: Arrived | None) -> None:
        """In the loader's thread: load, then hand the result to the answering thread."""
        try:
            new = load(old.name, bundle, self._config, before=old)
        except TtaError as error:
            refused = error
            self._call(lambda: self._failed(old, refused, arrived))
        except Exception as error:
            log.exception("a defect while loading bundle %s", old.name)
            internal = Internal(f"loading failed with {type(error).__name__}", "Report it with the log")
            self._call(lambda: self._failed(old, internal, arrived))
        else:
            self._call(lambda: self._swap(old, new, arrived))

    def _failed(self, old: Host, error: TtaError, arrived: Arrived | None) -> None:
        self._under_way.discard(old.name)
        self._tell(Event(old.name, "", "reload", Reason.BUNDLE_REFUSED.value, str(error)))
        if arrived is not None:
            self._refuse(arrived, error)

    def _swap(self, old: Host, new: Host, arrived: Arrived | None) -> None:
        self._under_way.discard(old.name)
        before, now = old.engines.bundle.digest, new.engines.bundle.digest
        self._served.replace(new)
        if new.text is not None:
            kept, restarted = self._texts.swap(new)
        else:
            if before != now:
                self._bases.open(new)
            kept, restarted = self._registry.swap(new)
        detail = f"bundle {now[:12]} after {before[:12]}; {kept} streams go on, {restarted} start anew"
        self._tell(Event(new.name, "", "reload", Reason.REQUESTED.value, detail))
        if arrived is not None:
            reply = ReloadDone(
                id=arrived.message.id,
                bundle=new.name,
                bundle_digest=now,
                changed=before != now,
                kept_streams=kept,
                restarted_streams=restarted,
            )
            self._finish(arrived, reply, {})
        self._call(return_free_memory)  # when nothing holds the old engines any more
