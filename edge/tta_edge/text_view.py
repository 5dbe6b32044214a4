"""A streamed text as lines for people. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from tta_edge.text_stream import Row, rates

HEAD = (
    f"{'context':>10}  {'piece':>7}  {'no context':>10}  {'absorbed':>8}  {'full context':>12}  {'seen':>6}"
)
"""Over the lines: bytes before the piece, bytes of it, bits per byte under the three conditions, tokens seen before."""


def line(row: Row) -> str:
    """One piece."""
    found = rates([row])
    return (
        f"{row.context_bytes:>10}  {row.bytes:>7}  {found.no_context_bpb:>10.4f}  {found.stream_bpb:>8.4f}  "
        f"{found.full_context_bpb:>12.4f}  {row.full_context_tokens:>6}"
    )


def summary(rows: Sequence[Row], context: int) -> str:
    """All pieces together, and what the columns are.

    Args:
        rows: at least one.
        context: tokens that the model sees at once.
    """
    found = rates(rows)
    closed = "" if found.gap_closed is None else f"; absorbing closes {found.gap_closed:.0%} of the gap"
    seen = max(row.stream_tokens for row in rows)
    total = sum(row.bytes for row in rows)
    return (
        f"bits per byte over {total} bytes: no context {found.no_context_bpb:.4f}, absorbed {found.stream_bpb:.4f}, "
        f"full context {found.full_context_bpb:.4f}{closed}\n"
        f"no context: the piece alone; absorbed: all before it became theta, but for at most {seen} tokens that are "
        "seen as they are; full context: as much of the text before it as fits into the "
        f"{context} tokens that the model sees"
    )
