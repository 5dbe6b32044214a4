"""How patient and how eager a link to the cloud is."""

from __future__ import annotations

from dataclasses import dataclass

from tta_runtime.errors import BadValue


@dataclass(frozen=True)
class UplinkOptions:
    """How patient and how eager a link is.

    Attributes:
        window: most samples held for sending; the cloud may grant less.
        window_bytes: that samples under way may have together; one larger sample goes alone.
        answer_s: after which a request is repeated; doubled each time.
        max_answer_s: the longest such wait.
        attempts: refusals after which a request is given up; `busy` and the like do not count.
        ping_s: silence in either direction before a ping.
        liveness: so many `ping_s` of silence mean that the cloud has gone.
        slow_bytes_per_s: slowest line that is not taken for a dead one: bytes under way add to the patience.
        patch_bytes: what a patch may have, for the same.
        connect_s: for a connection and its encryption to come about.
        wait_s: before the second attempt to connect; doubled for each further one, and shortened at random.
        max_wait_s: the longest such wait; with `connect_s` it bounds how late a line that has healed is noticed.
        refetch_s: before a patch or a root is asked for again that was not to be had, or was not adopted.
        max_reports: reports that wait; beyond it the oldest is dropped.

    Raises:
        BadValue: a value is not positive, or `wait_s` is over `max_wait_s`.
    """

    window: int = 16
    window_bytes: int = 1 << 20
    answer_s: float = 5.0
    max_answer_s: float = 60.0
    attempts: int = 5
    ping_s: float = 2.0
    liveness: int = 3
    slow_bytes_per_s: float = 16 * 1024
    patch_bytes: int = 1 << 20
    connect_s: float = 5.0
    wait_s: float = 1.0
    max_wait_s: float = 4.0
    refetch_s: float = 10.0
    max_reports: int = 32

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise BadValue(f"{name} is {value}", "Use a positive number")
        if self.wait_s > self.max_wait_s:
            raise BadValue(
                f"wait_s is {self.wait_s} and max_wait_s {self.max_wait_s}", "Use wait_s <= max_wait_s"
            )
