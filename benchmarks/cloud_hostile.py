r"""One hostile edge among ten: what its samples do to the patches of the group, attack by attack.

    python benchmarks/cloud_hostile.py --student BUNDLE --teacher BUNDLE --models models.py --student-weights FILE \
        --teacher-weights FILE --stream npz:FILE --shifts gaussian_noise:5

Intake, store, rounds, learner, gate and ledger are those that serve; sockets and rollout are left out. The hostile
edge knows everything: both networks with their weights, the published head, the labels of its own images. It sends as
many samples as it likes and chooses their keys. After each published patch the head's error is measured on labelled
images of the honest edges' shift, which nobody has learned from; what counts is the largest loss of a patch against
the head before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zmq.utils.z85
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from tta_adapters.methods.distill import kl_divergence
from tta_cloud import identity, ledger, samples
from tta_cloud.config import Config
from tta_cloud.gate import GateOptions, held_out
from tta_cloud.intake import Intake, IntakeOptions
from tta_cloud.learner import METHOD, Learner, LearnerOptions
from tta_cloud.publishing import theta_of
from tta_cloud.records import Sample
from tta_cloud.school import Published, School
from tta_cloud.store import Store, StoreOptions
from tta_cloud.writer import GroupCommit
from tta_edge.streams.order import batches, order
from tta_edge.streams.preprocess import preprocess
from tta_edge.streams.shifts import parse_shifts
from tta_edge.streams.sources import open_source
from tta_exporters.attack import AttackOptions, Victim, ascend
from tta_exporters.build import InputOptions
from tta_exporters.sources import load_network
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.model import Engines
from tta_runtime.numerics import entropy
from tta_runtime.theta import Vector

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
GROUP, HOSTILE = "group", 0
MINUTE_MS = 60_000


@dataclass(frozen=True)
class Plan:
    """How long, how many, and who sends how much.

    Attributes:
        edges: in all; one of them is hostile.
        calm: minutes in which all are honest, before the attack.
        minutes: of the attack.
        honest_rate: samples that an honest edge sends in a minute.
        hostile_rate: samples that the hostile edge sends in a minute.
        fresh: of them, those that are made anew in each minute against the head of the moment; the others are these
            a grey level away.
        seed: of every draw.
    """

    edges: int = 10
    calm: int = 6
    minutes: int = 4
    honest_rate: int = 8
    hostile_rate: int = 128
    fresh: int = 32
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Data:
    """Images of one shift, [n, C, H, W] float32 in 0..1, with labels.

    Attributes:
        x: what the edges see.
        y: their labels; known to nobody but the attacker, and of its own images.
        holdout_x: what errors are measured on.
        holdout_y: their labels.
    """

    x: Images
    y: Labels
    holdout_x: Images
    holdout_y: Labels


@dataclass(frozen=True, eq=False)
class Networks:
    """What the attacker has: both networks in torch, and where theta's tensors belong."""

    student: nn.Module
    teacher: nn.Module
    bundle: Bundle

    def parameters(self, head: Vector) -> dict[str, Tensor]:
        """Theta as named tensors of the student."""
        named = thetas.unpack(self.bundle.manifest.theta, np.asarray(head))
        return {name: torch.from_numpy(np.array(value)) for name, value in named.items()}


Attack = Callable[[Networks, Vector, Images, Labels, np.random.Generator], Images]
"""(networks, published head, the attacker's images, their labels, chance) -> what it sends, as many."""


# --- attacks ------------------------------------------------------------------------------------------


def upside_down(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """Images turned on their heads."""
    return x[:, :, ::-1]


def one_class(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """Nothing but images of one class."""
    own = x[y == y[0]]
    return own[draw.integers(0, len(own), len(x))]


def duplicates(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """One image again and again, each time a grey level away."""
    noise = draw.integers(-1, 2, x.shape) / 255
    return np.clip(x[:1] + noise, 0, 1)


def free_pixels(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """Every pixel black or white."""
    return draw.integers(0, 2, x.shape).astype(np.float32)


def window(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """Noise of which the student is as sure as of real images: what a filter of entropies lets through."""
    scale = draw.uniform(0.02, 0.5, (8 * len(x), 1, 1, 1))
    coarse = draw.normal(0, 1, (8 * len(x), x.shape[1], 4, 4)).repeat(x.shape[2] // 4, 2)
    noise = np.clip(0.5 + scale * coarse.repeat(x.shape[3] // 4, 3), 0, 1).astype(np.float32)
    parameters = nets.parameters(head)
    with torch.no_grad():
        both = [functional_call(nets.student, parameters, torch.from_numpy(part)) for part in (noise, x)]
    mine, real = (entropy(logits.numpy()) for logits in both)
    return noise[np.argsort(np.abs(mine - np.median(real)))[: len(x)]]


def wrong_class(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """Images within 16 grey levels of real ones that the teacher is sure to be of the next class."""
    clean, wanted = torch.from_numpy(x), torch.from_numpy((y + 1) % 10)
    changed, bound = clean, 16 / 255
    for _ in range(10):
        changed = changed.detach().requires_grad_()
        loss = F.cross_entropy(nets.teacher(changed), wanted)
        (gradient,) = torch.autograd.grad(loss, changed)
        moved = changed - bound / 4 * gradient.sign()
        changed = torch.minimum(torch.maximum(moved, clean - bound), clean + bound).clamp(0, 1)
    return changed.detach().numpy()


def invading(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """The distribution invading attack (Wu et al., 2023) through the batch's statistics, pixels free."""
    nets.student.load_state_dict(nets.parameters(head), strict=False)
    victim = Victim(nets.student, InputOptions(x.shape[1:]), "statistics")
    found = []
    for start in range(0, len(x), 16):
        others = draw.integers(0, len(x), 48)
        own = x[start : start + 16]
        mixed = np.concatenate([own, x[others]])
        truth = torch.from_numpy(np.concatenate([y[start : start + 16], y[others]]))
        clean = torch.from_numpy((mixed * 255).round().astype(np.uint8))
        mine = np.arange(len(mixed)) < len(own)
        found.append(ascend(victim, clean, mine, truth, AttackOptions(steps=10))[mine].numpy() / 255)
    return np.concatenate(found).astype(np.float32)


def opposing(nets: Networks, head: Vector, x: Images, y: Labels, draw: np.random.Generator) -> Images:
    """Images within 16 grey levels whose step of distillation points against that of the truth on real images."""
    options = LearnerOptions()
    parameters = nets.parameters(head)
    names = [name for name, value in parameters.items() if not name.endswith(("mean", "var"))]
    leaves = [parameters[name].requires_grad_() for name in names]

    def gradient(loss: Tensor, *, again: bool) -> Tensor:
        parts = torch.autograd.grad(loss, leaves, create_graph=again)
        return torch.cat([part.flatten() for part in parts])

    def student(images: Tensor) -> Tensor:
        logits: Tensor = functional_call(nets.student, parameters, images)
        return logits

    real = torch.from_numpy(x)
    wanted = gradient(F.cross_entropy(student(real), torch.from_numpy(y)), again=False).detach()
    found, bound = [], 16 / 255
    for start in range(0, len(x), 32):
        clean = real[start : start + 32]
        changed = clean
        for _ in range(10):
            changed = changed.detach().requires_grad_()
            target, logits = nets.teacher(changed), student(changed)
            p = torch.log_softmax(target, 1)
            sure = torch.exp(0.4 * np.log(target.shape[1]) + (p.exp() * p).sum(1))
            named = F.cross_entropy(logits, target.argmax(1), reduction="none")
            each = sure * (options.beta * kl_divergence(target, logits) + options.gamma * named)
            mine = gradient(each.mean(), again=True)
            (push,) = torch.autograd.grad(F.cosine_similarity(mine, wanted, dim=0), changed)
            moved = changed - bound / 4 * push.sign()
            changed = torch.minimum(torch.maximum(moved, clean - bound), clean + bound).clamp(0, 1)
        found.append(changed.detach().numpy())
    return np.concatenate(found)


ATTACKS: Mapping[str, Attack] = {
    "upside-down": upside_down,
    "one-class": one_class,
    "duplicates": duplicates,
    "free-pixels": free_pixels,
    "window": window,
    "wrong-class": wrong_class,
    "invading": invading,
    "opposing": opposing,
}


# --- the fleet ----------------------------------------------------------------------------------------


@dataclass
class Played:
    """What came of one attack.

    Attributes:
        errors: of the head on the hold-out, before the first patch and after each.
        refused: patches that the gate has refused.
        sent: samples of the hostile edge.
        accepted: of them, those that were stored.
        reasons: why the others were not.
        learned: of them, those that rounds have taken, without those held out; from an odd edge's nothing was learned.
        odd: samples of all edges that were passed over because their edge is unlike the others.
    """

    errors: list[float] = field(default_factory=list)
    refused: int = 0
    sent: int = 0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    learned: int = 0
    odd: int = 0

    @property
    def worst(self) -> float:
        """Largest loss of a patch against the head before it, in points."""
        return 100 * max((b - a for a, b in zip(self.errors, self.errors[1:], strict=False)), default=0.0)

    def row(self, name: str) -> dict[str, Any]:
        """As a row of the table."""
        return {
            "attack": name,
            "first_error": self.errors[0],
            "last_error": self.errors[-1],
            "worst_patch_points": self.worst,
            "patches": len(self.errors) - 1,
            "refused_by_gate": self.refused,
            "hostile_sent": self.sent,
            "hostile_accepted": self.accepted,
            "hostile_refused": dict(self.reasons),
            "hostile_in_rounds": self.learned,
            "odd": self.odd,
        }


class Fleet:
    """Edges of one group and their cloud, without sockets.

    Args:
        student: graphs of the edges' bundle.
        teacher: graphs of the teacher.
        data: what the edges see.
        plan: how long and how much.
        config: of the service.
    """

    def __init__(
        self,
        student: Engines,
        teacher: Engines,
        data: Data,
        plan: Plan,
        *,
        config: Config | None = None,
    ) -> None:
        self.student, self.teacher, self.data, self.plan = student, teacher, data, plan
        self.config = config or Config()
        self._probe = Learner(student, teacher, self.config.learner)

    def calm(self, directory: Path) -> Played:
        """The fleet's life before any attack; the store stays in a directory for `play`."""
        identity.create(directory)
        return self._play(directory, None, None, range(self.plan.calm))

    def play(self, calm: Path, attack: Attack | None, networks: Networks | None = None) -> Played:
        """How it goes on under an attack; None: all edges are honest.

        Args:
            calm: directory that `calm` has left; it is not changed.
            attack: what the hostile edge sends.
            networks: what it knows.
        """
        with tempfile.TemporaryDirectory(prefix="tta-hostile-") as directory:
            copy = Path(directory) / "cloud"
            shutil.copytree(calm, copy)
            minutes = range(self.plan.calm, self.plan.calm + self.plan.minutes)
            return self._play(copy, attack, networks, minutes)

    def _play(
        self, directory: Path, attack: Attack | None, networks: Networks | None, minutes: range
    ) -> Played:
        alone = StoreOptions(commit=GroupCommit(linger_s=0.0))  # nobody else writes that could be waited for
        store = Store(directory / "data", lambda event: None, options=alone)
        try:
            played = Played()
            patch = store.read(lambda db: ledger.newest(db, GROUP))
            signs, bundle = identity.load(directory), self.student.bundle
            head = bundle.theta0 if patch is None else theta_of(patch, signs, bundle)
            heads, intake = [head], Intake(self.student, self.config.intake)
            intake.teach(GROUP, head)
            played.errors.append(self.error(head))

            def published(found: Published) -> None:
                entry = found.patch.entry
                store.call(ledger.move(GROUP, entry.epoch, entry.seq, "published", ""))
                heads.append(theta_of(found.patch, signs, bundle))
                intake.teach(GROUP, heads[-1])
                played.errors.append(self.error(heads[-1]))

            school = School(self.config, self.student, self.teacher, store, signs, published)
            for minute in minutes:
                for edge, x, key in self._minute(minute, attack, networks, heads[-1]):
                    hostile = edge == HOSTILE and attack is not None
                    reason = intake.refused(GROUP, key_of(edge), x)
                    found = reason or self._send(store, edge, x, key, minute)
                    if hostile:
                        played.sent += 1
                        played.accepted += found == "stored"
                        played.reasons.update([] if found == "stored" else [found])
                    before = len(heads)
                    while school.learn(GROUP):
                        played.refused += len(heads) == before
                        before = len(heads)
            if attack is not None:
                since = (self.plan.calm + 1) * MINUTE_MS
                query = "SELECT number FROM samples WHERE edge = ? AND used > 0 AND received_ms >= ?"
                numbers = store.read(lambda db: db.execute(query, (key_of(HOSTILE), since)).fetchall())
                played.learned = sum(not held_out(number) for (number,) in numbers)
            played.odd = store.read(lambda db: samples.refusals(db, GROUP)).get("odd", 0)
            return played
        finally:
            store.close()

    def _minute(
        self, minute: int, attack: Attack | None, networks: Networks | None, head: Vector
    ) -> Iterator[tuple[int, Images, str]]:
        """Who sends what in a minute, mixed by chance."""
        plan, data = self.plan, self.data
        draw = np.random.default_rng([plan.seed, minute])
        streams = np.array_split(np.arange(len(data.x)), plan.edges)
        sends: list[tuple[int, Images]] = []
        for edge in range(plan.edges):
            for i in range(plan.honest_rate):
                place = (minute * plan.honest_rate + i) % len(streams[edge])
                sends.append((edge, data.x[streams[edge][place]]))
        if attack is not None and networks is not None:
            sends = [(edge, x) for edge, x in sends if edge != HOSTILE]
            own = draw.choice(streams[HOSTILE], plan.fresh)
            made = attack(networks, head, data.x[own], data.y[own], draw)
            for i in range(plan.hostile_rate):
                near = draw.integers(-1, 2, made.shape[1:]) / 255 if i >= plan.fresh else 0.0
                sends.append((HOSTILE, np.clip(made[i % plan.fresh] + near, 0, 1).astype(np.float32)))
        for i in draw.permutation(len(sends)):
            edge, x = sends[i]
            yield (
                edge,
                np.ascontiguousarray(x),
                hashlib.sha256(f"{minute} {edge} {i}".encode()).hexdigest()[:32],
            )

    def _send(self, store: Store, edge: int, x: Images, key: str, minute: int) -> str:
        sample = Sample(
            key=key, edge=key_of(edge), group=GROUP, stream="s", taken_ms=minute * MINUTE_MS, seq=0, entropy=0.5,
            encoding="raw", dtype="float32", shape=x.shape, x=x.tobytes(),
        )  # fmt: skip
        most = self.config.intake.quota_per_minute
        quota = samples.Quota(most, MINUTE_MS) if most else None
        return store.call(samples.insert(sample, received_ms=(minute + 1) * MINUTE_MS, quota=quota))

    def error(self, theta: Vector) -> float:
        """Share of the hold-out that a theta gets wrong."""
        x, y = self.data.holdout_x, self.data.holdout_y
        parts = [self._probe.predict(theta, x[i : i + 500]).argmax(1) for i in range(0, len(x), 500)]
        return float((np.concatenate(parts) != y).mean())


def key_of(edge: int) -> str:
    """A key's public half, another for each edge and the same in each run."""
    return zmq.utils.z85.encode(hashlib.sha256(f"edge {edge}".encode()).digest()).decode()


# --- the command --------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, shift: str) -> Data:
    """The stream's images under a shift: the first ones for the edges, the others held out."""
    source = open_source(args.stream)
    spec = Bundle.open(args.student).manifest.input
    to_input = preprocess(source.shape, dtype=spec.dtype, shape=spec.shape, low=spec.low, high=spec.high)
    labels = np.asarray(source.labels, dtype=np.int64)
    (parsed,) = parse_shifts(shift)
    parts = batches(source, parsed, order(len(labels)), batch=1000, seed=args.seed)
    x = np.concatenate([to_input(part.images) for part in parts])
    cut = len(x) - args.holdout
    return Data(x[:cut], labels[:cut], x[cut:], labels[cut:])


def networks(args: argparse.Namespace) -> Networks:
    """The attacker's copies."""
    found = [
        load_network(f"{args.models}:{name}", weights).eval().requires_grad_(False)
        for name, weights in (
            (args.student_network, args.student_weights),
            (args.teacher_network, args.teacher_weights),
        )
    ]
    return Networks(found[0], found[1], Bundle.open(args.student))


def main(arguments: Sequence[str] | None = None) -> None:
    """All attacks under all shifts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="file with the networks' factories")
    parser.add_argument("--student-network", default="resnet8_bn")
    parser.add_argument("--teacher-network", default="resnet26w32_bn")
    parser.add_argument("--student-weights", type=Path, required=True)
    parser.add_argument("--teacher-weights", type=Path, required=True)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--shifts", default="gaussian_noise:5")
    parser.add_argument("--attacks", default=",".join(["none", *ATTACKS]))
    parser.add_argument("--edges", type=int, default=Plan.edges)
    parser.add_argument("--calm", type=int, default=Plan.calm, help="minutes before the attack")
    parser.add_argument("--minutes", type=int, default=Plan.minutes, help="of the attack")
    parser.add_argument("--honest-rate", type=int, default=Plan.honest_rate)
    parser.add_argument("--hostile-rate", type=int, default=Plan.hostile_rate)
    parser.add_argument("--fresh", type=int, default=Plan.fresh)
    parser.add_argument("--holdout", type=int, default=2500, help="images that errors are measured on")
    parser.add_argument("--max-share", type=float, default=IntakeOptions.max_share)
    parser.add_argument("--fairness", type=float, default=IntakeOptions.fairness)
    parser.add_argument("--oddness", type=float, default=IntakeOptions.oddness)
    parser.add_argument("--tolerance", type=float, default=GateOptions.tolerance, help="of the gate")
    parser.add_argument("--replay", type=int, default=LearnerOptions.replay)
    parser.add_argument("--publish-rate", type=float, default=LearnerOptions.publish_rate)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    options = EngineOptions(threads=args.threads)
    student, teacher = (
        Engines.load(Bundle.open(path), methods=[METHOD], options=options)
        for path in (args.student, args.teacher)
    )
    nets, rows = networks(args), []
    plan = Plan(
        args.edges, args.calm, args.minutes, args.honest_rate, args.hostile_rate, args.fresh, args.seed
    )
    for shift in args.shifts.split(","):
        fleet = Fleet(
            student, teacher, load_data(args, shift), plan,
            config=Config(
                intake=IntakeOptions(
                    max_share=args.max_share, fairness=args.fairness, oddness=args.oddness
                ),
                gate=GateOptions(tolerance=args.tolerance),
                learner=LearnerOptions(replay=args.replay, publish_rate=args.publish_rate),
            ),
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="tta-hostile-") as calm:
            print(json.dumps({"shift": shift, **fleet.calm(Path(calm)).row("calm")}), flush=True)
            for name in args.attacks.split(","):
                played = fleet.play(Path(calm), None if name == "none" else ATTACKS[name], nets)
                rows.append({"shift": shift, **played.row(name), "errors": played.errors})
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "errors"}), flush=True)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"rows": rows, "args": {k: str(v) for k, v in vars(args).items()}}, indent=1)
        )


if __name__ == "__main__":
    main()
