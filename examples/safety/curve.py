"""Curves of a finished suite as one picture: the error along some streams, for each player.

    python examples/safety/curve.py out/safety/store --model resnet8_bn -o safety.svg

Needs matplotlib (`pip install 'tta-runtime[plots]'`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tta_edge import figure
from tta_edge.suite.result import Result, decode
from tta_runtime.atomic import write_atomic

STREAMS = ("continual", "sorted/contrast:5", "batch-1/gaussian_noise:5", "malicious/20-clean")
PLAYERS = ("source", "norm", "auto")
WINDOW = 256
"""Samples of the rolling error."""


def results(store: Path, model: str) -> dict[tuple[str, str], Result]:
    """(stream, player) -> what the store holds for a model.

    Raises:
        SystemExit: there is none.
    """
    found = [decode(path.read_bytes(), path) for path in sorted(store.glob("results/*/*.json"))]
    chosen = {(each.key.stream, each.key.player): each for each in found if each.model == model}
    if not chosen:
        models = ", ".join(sorted({each.model for each in found})) or "none"
        raise SystemExit(f"{store} has no result of {model}; models: {models}")
    return chosen


def picture(found: dict[tuple[str, str], Result], streams: list[str], players: list[str]) -> str:
    """An SVG document.

    Raises:
        SystemExit: a result is missing.
    """
    missing = [
        f"{player} on {stream}" for stream in streams for player in players if (stream, player) not in found
    ]
    if missing:
        raise SystemExit(f"the store has no result of {', '.join(missing)}")
    drawn = figure.rolling_errors(
        [
            (stream, [figure.Curve(player, found[stream, player].wrong_flags) for player in players])
            for stream in streams
        ],
        window=WINDOW,
        frozen="source",
        title="Error along streams",
        description=f"Error over the last {WINDOW} samples along {', '.join(streams)}.",
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return drawn.replace("<svg ", head, 1) + "\n"


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", default="resnet8_bn")
    parser.add_argument("--streams", default=",".join(STREAMS))
    parser.add_argument("--players", default=",".join(PLAYERS))
    parser.add_argument("-o", "--out", type=Path, default=Path("safety.svg"))
    arguments = parser.parse_args()
    found = results(arguments.store, arguments.model)
    drawn = picture(found, arguments.streams.split(","), arguments.players.split(","))
    write_atomic(arguments.out, drawn.encode())


if __name__ == "__main__":
    main()
