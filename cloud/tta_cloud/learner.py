"""The learner of one group: a teacher that adapts to what edges send, and a student that follows it.

One round of CEMA's cloud: the teacher takes a step of entropy minimisation on the new samples, then the student
takes steps of distillation on new and remembered ones. Arrays in, a theta out; where samples come from and where the
theta goes is the service's.

Source: Chen et al., Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy
Distillation, ICLR 2024, algorithm 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tta_cloud.errors import SnapshotUnreadable, TeacherUnfit
from tta_runtime.arrays import is_finite
from tta_runtime.errors import EmptyBatch, NotAnImage, StateError
from tta_runtime.files import reason
from tta_runtime.jpeg import ImageForm, form_of
from tta_runtime.model import Checkpoint, Engines, Model, Step
from tta_runtime.theta import Vector

METHOD = "distill"
ENTROPY_ONLY = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
"""The weights under which a step of distillation is the teacher's entropy minimisation (eq. 5 of the paper)."""


@dataclass(frozen=True)
class LearnerOptions:
    """How a group learns.

    Attributes:
        new: fresh samples of a round.
        replay: remembered samples beside them, at most.
        rounds: steps of the student in a round, each on a draw of its own.
        student_lr: learning rate of the student.
        teacher_lr: of the teacher; 0 leaves the teacher as it is but for its running statistics.
        adapt_teacher: whether the teacher steps at all.
        teacher_replay: whether its step sees remembered samples beside the new ones. The paper's sees the new ones
            only; where labels come in runs that teaches it one class at a time.
        alpha: weight of the student's own entropy.
        beta: weight of the divergence from the teacher.
        gamma: weight of the teacher's label.
        temperature: of both distributions in the divergence.
        publish_rate: how far a patch goes from the head before it to the student, as a share of the way.
        nearest: samples of a new group after which it starts from the group whose samples are nearest, see
            `nearest.distance`; where others have patches it learns nothing before. 0: it begins at the source.
        nearest_distance: how far the nearest group's samples may be, by the same measure; beyond it the new group
            begins at the source, for what was taught under another shift does harm.
    """

    new: int = 32
    replay: int = 96
    rounds: int = 3
    student_lr: float = 2.5e-3
    teacher_lr: float = 2.5e-4
    adapt_teacher: bool = True
    teacher_replay: bool = True
    alpha: float = 0.0
    beta: float = 3.0
    gamma: float = 1.0
    temperature: float = 1.0
    publish_rate: float = 0.5
    nearest: int = 32
    nearest_distance: float = 0.75


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        samples: new ones that it was given.
        loss: of the student's last step.
        divergence: mean KL of teacher and student on it, in nats.
        agreement: share of it on which both named the same class before the step.
        refused: whether a step would have made something non-finite, and everything is as it was; the other figures
            are NaN then.
    """

    samples: int
    loss: float
    divergence: float
    agreement: float
    refused: bool


class _Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a learner stands: two state files."""

    student: bytes
    teacher: bytes
    rounds: Annotated[int, msgspec.Meta(ge=0)]


_SNAPSHOT = b"tta-learner-1\n"
"""What a snapshot's checksum begins with: another format is no snapshot at all."""
_CHECKSUM_BYTES = hashlib.sha256().digest_size


class Learner:
    """Teacher and student of one group. For one thread.

    Args:
        student: graphs of the edges' bundle, `distill` among them.
        teacher: graphs of the larger model's bundle, likewise.
        options: see :class:`LearnerOptions`.

    Attributes:
        rounds: how many were made.
        form: of the images that both take; None where they take none that a JPEG can hold.

    Raises:
        UnknownMethod: a bundle has no `distill`.
        TeacherUnfit: the teacher takes other inputs or knows other classes than the student.
    """

    def __init__(self, student: Engines, teacher: Engines, options: LearnerOptions) -> None:
        self.options = options
        self._student = Model(
            student,
            METHOD,
            hyper={
                "lr": options.student_lr,
                "alpha": options.alpha,
                "beta": options.beta,
                "gamma": options.gamma,
                "temperature": options.temperature,
            },
        )
        self._teacher = Model(teacher, METHOD, hyper={"lr": options.teacher_lr, **ENTROPY_ONLY})
        check_fit(self._student, self._teacher)
        self.form = image_form(student)
        self.rounds = 0

    @property
    def theta(self) -> Vector:
        """The student's theta, [P], read-only: what a patch carries."""
        return self._student.theta

    @property
    def digest(self) -> str:
        """Digest of the student's theta."""
        return self._student.digest

    def teach(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """The teacher's logits [n, C] as it stands.

        Args:
            x: [n, ...] as edges have it.
        """
        return self._teacher.predict(x).logits

    def looks(self, x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The student's logits [n, C] and features [n, F] as it stands; logits again where its graph gives none.

        Args:
            x: [n, ...] as edges have it.
        """
        found = self._student.predict(x)
        return found.logits, found.logits if found.features is None else found.features

    def features(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """What the bundle's own student makes of samples, [n, F], whatever was learned; logits if it has no features.

        Args:
            x: [n, ...] as edges have it.
        """
        found = Model(self._student.engines, METHOD).predict(x)
        return found.logits if found.features is None else found.features

    def predict(self, theta: Vector, x: NDArray[Any]) -> NDArray[np.float32]:
        """The logits [n, C] that an edge would give with a theta.

        Args:
            theta: [P].
            x: [n, ...].
        """
        probe = Model(self._student.engines, METHOD)
        probe.swap(theta)
        return probe.predict(x).logits

    def learn(self, new: NDArray[Any], replays: Sequence[NDArray[Any]]) -> Round:
        """One round.

        Args:
            new: [n, ...], samples that were not learned from before; at least what a step takes.
            replays: one draw of remembered samples [m, ...] for each of the student's steps, at least one; m may
                be 0.

        Raises:
            InputError: samples are not what the models take; nothing has changed.
            EngineError: an engine failed; nothing has changed.
        """
        new = self._student.check_input(new)
        # Each by itself: joined, samples of another dtype would be converted without a word.
        draws = [self._student.check_input(replay) if len(replay) else None for replay in replays]
        if not draws:
            raise EmptyBatch(
                "a round without draws of remembered samples has no step for the student",
                "Give one draw for each step, of no samples where none are remembered",
            )
        before = self._teacher.checkpoint, self._student.checkpoint
        try:
            report = self._round(new, draws)
        except BaseException:
            self._return(*before)
            raise
        if report is None:
            self._return(*before)
            return Round(len(new), float("nan"), float("nan"), float("nan"), True)
        self.rounds += 1
        return Round(len(new), report["loss"], report["divergence"], report["agreement"], False)

    def _round(self, new: NDArray[Any], draws: Sequence[NDArray[Any] | None]) -> Mapping[str, float] | None:
        """The report of the student's last step; None if something was not finite, and then it is to be undone."""
        if self.options.adapt_teacher:
            # No divergence counts here.
            first = draws[0] if draws and self.options.teacher_replay else None
            seen = new if first is None else np.concatenate([new, first])
            nothing = np.zeros((len(seen), self._teacher.manifest.classes), dtype=np.float32)
            if not _committed(self._teacher, self._teacher.step(seen, target=nothing)):
                return None
        report: Mapping[str, float] = {}
        for draw in draws:
            x = new if draw is None else np.concatenate([new, draw])
            target = self._teacher.predict(x).logits
            if not is_finite(target):
                return None
            step = self._student.step(x, target=target)
            if not _committed(self._student, step):
                return None
            report = step.report
        # A step answers as before its update, so nothing has looked at the last theta's answers yet.
        if not is_finite(self._student.predict(new).logits):
            return None
        return report

    def _return(self, teacher: Checkpoint, student: Checkpoint) -> None:
        self._teacher.restore(teacher)
        self._student.restore(student)

    # ------------------------------------------------------------------------------------------ snapshots

    def snapshot(self) -> bytes:
        """Everything that a learner needs to go on after its process was killed."""
        body = msgspec.msgpack.encode(
            _Snapshot(
                self._student.encode(self._student.checkpoint),
                self._teacher.encode(self._teacher.checkpoint),
                self.rounds,
            )
        )
        return _checksum(body) + body

    def restore(self, data: bytes) -> None:
        """Go on from a snapshot of a learner of the same bundles.

        Raises:
            SnapshotUnreadable: it is not one; nothing has changed.
        """
        body = bytes(data[_CHECKSUM_BYTES:])
        if data[:_CHECKSUM_BYTES] != _checksum(body):
            raise SnapshotUnreadable(
                f"the {len(data)} bytes that a learner left do not have the checksum that they name",
                "Start the group anew, or restore the store from a copy",
            )
        try:
            found = msgspec.msgpack.decode(body, type=_Snapshot)
            student, teacher = self._student.decode(found.student)[0], self._teacher.decode(found.teacher)[0]
        except (msgspec.DecodeError, UnicodeError, StateError) as error:
            raise SnapshotUnreadable(
                f"what a learner left is not a snapshot of these models: {reason(error)}",
                "Start the group anew, or serve the student and teacher that it was made with",
            ) from error
        self._return(teacher, student)
        self.rounds = found.rounds

    def start_from(self, theta: Vector) -> None:
        """Let the student go on from a theta, its optimiser anew; the teacher stays.

        Args:
            theta: [P], for example the head's after patches were refused, or that of the nearest group.

        Raises:
            ThetaError: it does not fit.
        """
        self._student.swap(theta)


def image_form(student: Engines) -> ImageForm | None:
    """What JPEG files of a student's inputs are like; None where there can be none."""
    try:
        return form_of(student.bundle.manifest.input)
    except NotAnImage:
        return None


def _committed(model: Model, step: Step) -> bool:
    """Commit a step, unless something in it is not finite."""
    if not all(is_finite(array) for array in (step.logits, step.theta, *step.state.values())):
        return False
    model.commit(step)
    return True


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(_SNAPSHOT + body).digest()


def check_fit(student: Model, teacher: Model) -> None:
    """Whether a teacher can teach a student.

    Raises:
        TeacherUnfit: it takes other inputs, knows other classes, or the same in another order.
    """
    mine, its = student.manifest, teacher.manifest
    if mine.classes != its.classes:
        raise TeacherUnfit(
            f"the teacher `{its.model_id}` knows {its.classes} classes, the student `{mine.model_id}` {mine.classes}",
            "Use a teacher of the same classes in the same order",
        )
    names, others = mine.class_names or [], its.class_names or []
    if names != others and sorted(names) == sorted(others):
        # Names that differ may be two words for one class; the same names elsewhere are no such accident.
        place = next(i for i, (one, other) in enumerate(zip(names, others, strict=True)) if one != other)
        raise TeacherUnfit(
            f"class {place} is `{others[place]}` for the teacher `{its.model_id}` and `{names[place]}` for the "
            f"student `{mine.model_id}`",
            "Use a teacher of the same classes in the same order",
        )
    wanted, found = mine.input, its.input
    if (wanted.dtype, wanted.shape, wanted.low, wanted.high) != (
        found.dtype,
        found.shape,
        found.low,
        found.high,
    ):
        raise TeacherUnfit(
            f"the teacher `{its.model_id}` takes {found.dtype} {found.shape} in {found.low:g}..{found.high:g}, "
            f"the student `{mine.model_id}` {wanted.dtype} {wanted.shape} in {wanted.low:g}..{wanted.high:g}",
            "Build the teacher's bundle with the student's --input, --dtype and --range",
        )
