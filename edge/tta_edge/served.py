"""The bundles that a daemon serves, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tta_edge.errors import UnknownBundle
from tta_edge.hosting import Host
from tta_runtime.errors import did_you_mean
from tta_runtime.manifest_check import expect_task


class Served:
    """Bundles by name. One thread changes it; reading is for any thread.

    Args:
        hosts: at least one, the first one first.

    Attributes:
        default: name of the first one, which answers requests that name none.
    """

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = dict(hosts)
        self.default = next(iter(self._hosts))

    def all(self) -> list[Host]:
        """Every one, the first one first."""
        return list(self._hosts.values())

    def of_images(self) -> dict[str, Host]:
        """Those that classify."""
        return {host.name: host for host in self.all() if host.text is None}

    def of_text(self) -> set[str]:
        """Names of the language models."""
        return {host.name for host in self.all() if host.text is not None}

    def host(self, name: str) -> Host:
        """The bundle of a name; empty: the first one.

        Raises:
            UnknownBundle: there is none.
        """
        host = self._hosts.get(name or self.default)
        if host is None:
            raise UnknownBundle(
                f"there is no bundle `{name}`{did_you_mean(name, self._hosts)}", "Name one that is served"
            )
        return host

    def images(self, name: str) -> Host:
        """The same, which must be for images.

        Raises:
            UnknownBundle: there is none.
            WrongTask: it is a language model.
        """
        host = self.host(name)
        expect_task(host.engines.bundle.manifest, "classification")
        return host

    def replace(self, host: Host) -> None:
        """Serve a new version of a bundle in the place of the old one."""
        self._hosts[host.name] = host
