"""From which group a new one should start: distances of their samples, and what each start is worth.

    python benchmarks/cloud_nearest.py --student BUNDLE --teacher BUNDLE --stream npz:F --taught fog:5 --fresh all:5

Each taught group learns as the service lets it, from the source. Each new group is compared with it by as many samples
as the service takes, and its theta tried on others of the new group: with the running statistics of the patch, as an
edge has it that changes nothing by itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_cloud.gate import GateOptions, judge
from tta_cloud.learner import Learner, LearnerOptions
from tta_cloud.nearest import distance
from tta_edge.streams.order import batches, order
from tta_edge.streams.preprocess import preprocess
from tta_edge.streams.shifts import parse_shifts
from tta_edge.streams.sources import open_source
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.model import Engines

Images = tuple[NDArray[Any], NDArray[np.int64]]


def streams(args: argparse.Namespace, shifts: str, count: int) -> dict[str, Images]:
    """Of each shift x [count, ...] and y [count]."""
    source = open_source(args.stream)
    spec = Bundle.open(args.student).manifest.input
    to_input = preprocess(source.shape, dtype=spec.dtype, shape=spec.shape, low=spec.low, high=spec.high)
    labels = np.asarray(source.labels, dtype=np.int64)
    places = order(len(labels), limit=count)
    return {
        str(shift): (
            np.concatenate([to_input(p.images) for p in batches(source, shift, places, batch=500, seed=0)]),
            labels[places],
        )
        for shift in parse_shifts(shifts)
    }


def taught(learner: Learner, x: NDArray[Any], rounds: int) -> None:
    """Let a group's learner make its rounds, remembered samples drawn from those before."""
    draw, new = np.random.default_rng(0), learner.options.new
    for number in range(rounds):
        used = x[: number * new]
        count = min(learner.options.replay, len(used))
        replays = [
            used[draw.choice(len(used), count, replace=False)] if count else used
            for _ in range(learner.options.rounds)
        ]
        learner.learn(x[number * new : (number + 1) * new], replays)


def main() -> None:
    """All pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--taught", required=True, help="shifts of the groups that have learned")
    parser.add_argument("--fresh", required=True, help="shifts of new groups")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=500, help="on which a start is tried")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    options, engine = LearnerOptions(), EngineOptions(threads=args.threads)
    student = Engines.load(Bundle.open(args.student), methods=["distill"], options=engine)
    teacher = Engines.load(Bundle.open(args.teacher), methods=["distill"], options=engine)
    learned, n = args.rounds * options.new, options.nearest
    groups: dict[str, tuple[Learner, NDArray[np.float32]]] = {}
    for name, (x, _) in streams(args, args.taught, learned).items():
        learner = Learner(student, teacher, options)
        taught(learner, x, args.rounds)
        groups[name] = learner, learner.features(x[-n:])
    built, theta0 = Learner(student, teacher, options), student.bundle.theta0
    for name, (images, labels) in streams(args, args.fresh, learned + n + args.samples).items():
        first = images[learned : learned + n]  # none that a group has learned from, whatever was done to it
        x, y = images[learned + n :], labels[learned + n :]
        row: dict[str, Any] = {
            "fresh": name,
            "source": float((built.predict(theta0, x).argmax(1) == y).mean()),
        }
        for group, (learner, features) in groups.items():
            after, before = (built.predict(theta, first) for theta in (learner.theta, theta0))
            verdicts = [
                judge(after, before, each.teach(first), ["edge"] * n, GateOptions())
                for each in (built, learner)
            ]
            row[group] = {
                "distance": distance(built.features(first), features),
                "accuracy": float((built.predict(learner.theta, x).argmax(1) == y).mean()),
                "gain_by_built_teacher": verdicts[0].score - verdicts[0].head,
                "gain_by_its_teacher": verdicts[1].score - verdicts[1].head,
            }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
