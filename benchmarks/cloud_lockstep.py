"""An edge and the cloud in lockstep, in one process: what teaching from a share of the samples gains, repeatably.

    python benchmarks/cloud_lockstep.py --student BUNDLE --teacher BUNDLE --stream npz:FILE --shifts all:5 --share 0.1

Every part is the one that serves: the edge's stream with its method, its filter, probation and adoption, signed patches
that are verified, the cloud's learner and gate. Only sockets and stores are left out, so that a round is a round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_cloud.gate import HOLD_OUT, GateOptions, judge
from tta_cloud.learner import Learner, LearnerOptions
from tta_edge.adapt import Guards, Stream
from tta_edge.probation import Probation
from tta_edge.sending import encoder
from tta_edge.streams.order import batches, order
from tta_edge.streams.preprocess import preprocess
from tta_edge.streams.shifts import parse_shifts
from tta_edge.streams.sources import open_source
from tta_edge.upload import FILTERS, Filter
from tta_runtime import jpeg
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.model import Engines, Model
from tta_runtime.patch import Trust, make_patch, verify_patch
from tta_runtime.root import Root, named
from tta_runtime.sealed import encode
from tta_runtime.signing import SecretKey
from tta_runtime.theta import Vector


@dataclass
class Sent:
    """What waits, what is remembered, what is held out; by place in the stream."""

    waiting: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    nbytes: int = 0


class Lockstep:
    """One edge of its own group."""

    def __init__(self, args: argparse.Namespace) -> None:
        options = EngineOptions(threads=args.threads)
        bundle = Bundle.open(args.student)
        self.args = args
        # Where the statistics are not the edge's own, nothing of it may move them.
        self.method = args.method if args.statistics == "edge" else "source"
        self.encoder = encoder(args.encoding, args.quality, bundle.manifest.input)
        self.engines = Engines.load(bundle, methods=["source", "distill", self.method], options=options)
        self.teacher = Engines.load(Bundle.open(args.teacher), methods=["distill"], options=options)
        self.key = SecretKey.generate()
        root = Root(
            version=1, epoch=1, root_keys=named([self.key.public]), root_threshold=1,
            publisher_keys=named([self.key.public]), publisher_threshold=1, not_after_s=2**40,
        )  # fmt: skip
        self.trust = Trust(root, bundle.digest, "edge", epoch=1)

    def served(self, theta: Vector) -> Vector:
        """What the edge is given to serve of a patch, [P]."""
        if self.args.statistics != "source":
            return theta
        trained = self.engines.bundle.manifest.theta.trained
        return np.concatenate([theta[:trained], self.engines.bundle.theta0[trained:]])

    def sent(self, x: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """Bytes of one sample on its way, and what the cloud makes of them."""
        if self.encoder is None:
            return x.nbytes, x
        data = jpeg.encode(x, self.encoder.form, self.encoder.quality)
        return len(data), jpeg.decode(data, self.encoder.form)

    def play(self, x: NDArray[Any], y: NDArray[np.int64]) -> dict[str, Any]:
        """One stream, in order."""
        args, seen = self.args, np.zeros_like(x)  # by the cloud, of what was sent
        draw = np.random.default_rng(args.seed)
        learner = Learner(
            self.engines, self.teacher,
            LearnerOptions(
                replay=args.replay, rounds=args.rounds, adapt_teacher=not args.frozen_teacher,
                teacher_replay=not args.paper_teacher, alpha=args.alpha,
                beta=args.beta, gamma=args.gamma,
            ),
        )  # fmt: skip
        stream = Stream(
            "edge",
            Model(self.engines, self.method),
            Guards(max_distance=args.max_distance, reset_every_steps=0),
        )
        choose: Filter = FILTERS[args.filter](args.share)
        sent, head, seq = Sent(), self.engines.bundle.theta0, 0
        candidate, probation = None, None
        counts = dict.fromkeys(("patches", "refused_by_gate", "refused_by_edge", "bytes_down", "rounds"), 0)
        wrong: list[bool] = []
        for begin in range(0, len(x), args.batch):
            batch = x[begin : begin + args.batch]
            answer = stream.answer(batch)
            wrong += (answer.logits.argmax(1) != y[begin : begin + args.batch]).tolist()
            if candidate is not None and probation is not None:
                said = stream.model.predict(batch, instead=stream.adopted(candidate)).logits
                probation = probation.seen(said, answer.logits)
                if probation.decided:
                    if probation.objection() is None:
                        stream.adopt(candidate, (1, seq))
                    else:
                        counts["refused_by_edge"] += 1
                    candidate = probation = None
            choice, choose = choose.choose(answer.logits, draw.random(len(batch)))
            for place in np.flatnonzero(choice.keep) + begin:
                nbytes, seen[place] = self.sent(x[place])
                sent.nbytes += nbytes
                held = draw.integers(1 << 62) % HOLD_OUT == 0
                (sent.held if held else sent.waiting).append(int(place))
            while len(sent.waiting) >= learner.options.new:
                new, sent.waiting = sent.waiting[: learner.options.new], sent.waiting[learner.options.new :]
                pool = sent.used[-10_000:]
                replays = [
                    seen[draw.choice(pool, min(args.replay, len(pool)), replace=False)]
                    if pool and args.replay
                    else seen[:0]
                    for _ in range(args.rounds)
                ]
                learner.learn(seen[new], replays)
                counts["rounds"] += 1
                sent.used += new
                proposed = (head + np.float32(args.publish_rate) * (learner.theta - head)).astype(np.float32)
                held = sent.held[-256:]
                if held:
                    target = learner.teach(seen[held])
                    verdict = judge(
                        learner.predict(proposed, seen[held]), learner.predict(head, seen[held]), target,
                        ["edge"] * len(held), GateOptions(min_samples=args.gate_samples),
                    )  # fmt: skip
                    if not verdict.passed and verdict.reason != "few-samples":
                        counts["refused_by_gate"] += 1
                        continue
                seq += 1
                sealed, payload = make_patch(
                    proposed, self.engines.bundle.manifest.theta, [self.key],
                    bundle_digest=self.trust.bundle_digest, channel="edge", epoch=1, seq=seq,
                    parent_digest=stream.model.digest, samples=len(new),
                    issued_s=int(time.time()), dtype=args.dtype,
                )  # fmt: skip
                verified = verify_patch(
                    sealed, payload, self.trust, self.engines.bundle.manifest.theta, self.engines.bundle.theta0,
                    max_distance=args.max_distance,
                )  # fmt: skip
                counts["bytes_down"] += len(encode(sealed)) + len(payload)
                counts["patches"] += 1
                head = verified.theta
                # A newer patch takes the place of one on probation, and goes on with what was seen.
                candidate = self.served(head)
                probation = probation or Probation.begin(stream.model.manifest.classes, args.probation)
        uploads = len(sent.waiting) + len(sent.used) + len(sent.held)
        return {
            "error": float(np.mean(wrong)),
            "last_error": float(np.mean(wrong[-1000:])),
            "teacher_last_error": float(np.mean(learner.teach(x[-1000:]).argmax(1) != y[-1000:])),
            "upload_ratio": uploads / len(x),
            "bytes_up": sent.nbytes,
            "bytes_per_sample": sent.nbytes / uploads if uploads else 0.0,
            **counts,
        }


def streams(args: argparse.Namespace) -> Iterator[tuple[str, NDArray[Any], NDArray[np.int64]]]:
    """Name, x and y of each shift."""
    source = open_source(args.stream)
    spec = Bundle.open(args.student).manifest.input
    to_input = preprocess(source.shape, dtype=spec.dtype, shape=spec.shape, low=spec.low, high=spec.high)
    labels = np.asarray(source.labels, dtype=np.int64)
    places = order(len(labels), limit=args.samples)
    if args.order == "sorted":
        places = places[np.argsort(labels[places], kind="stable")]
    found = []
    for shift in parse_shifts(args.shifts):
        parts = batches(source, shift, places, batch=1000, seed=args.seed)
        found.append((str(shift), np.concatenate([to_input(part.images) for part in parts]), labels[places]))
        if not args.series:
            yield found.pop()
    if found:
        yield "series", np.concatenate([x for _, x, _ in found]), np.concatenate([y for _, _, y in found])


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; without `given` on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--shifts", default="all:5")
    parser.add_argument("--order", choices=["given", "sorted"], default="given")
    parser.add_argument("--series", action="store_true", help="one stream of all shifts, one after the other")
    parser.add_argument("--samples", type=int, default=5000, help="of each shift")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--method", default="auto", help="of the edge")
    parser.add_argument(
        "--statistics", choices=["edge", "cloud", "source"], default="edge",
        help="of the normalisation on the edge: its own, by --method; those of the cloud's student, as the patch has "
        "them; the source's. Where they are not its own the edge changes nothing by itself, whatever --method says",
    )  # fmt: skip
    parser.add_argument(
        "--encoding", choices=["lossless", "jpeg"], default="lossless", help="of what is sent"
    )
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100")
    parser.add_argument("--filter", choices=FILTERS, default="budgeted")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replay", type=int, default=96)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--beta", type=float, default=3.0)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--frozen-teacher", action="store_true")
    parser.add_argument("--paper-teacher", action="store_true", help="its step sees new samples only")
    parser.add_argument("--probation", type=int, default=64)
    parser.add_argument("--publish-rate", type=float, default=LearnerOptions.publish_rate)
    parser.add_argument("--gate-samples", type=int, default=16)
    parser.add_argument("--max-distance", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def main() -> None:
    """All streams."""
    args = arguments()
    lockstep, rows = Lockstep(args), []
    for name, x, y in streams(args):
        rows.append({"shift": name, **lockstep.play(x, y)})
        print(json.dumps(rows[-1]), flush=True)
    mean = {
        key: float(np.mean([row[key] for row in rows])) for key in ("error", "last_error", "upload_ratio")
    }
    print(json.dumps({"mean": mean}))
    if args.json is not None:
        args.json.write_text(
            json.dumps({"rows": rows, "mean": mean, "args": {k: str(v) for k, v in vars(args).items()}})
        )


if __name__ == "__main__":
    main()
