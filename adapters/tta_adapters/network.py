"""What every adapter shares: a frozen copy of the network, the layout of theta, a pass with theta given by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tta_adapters.base import Forward, Statistics, ThetaTensor
from tta_adapters.select import SelectionError
from tta_adapters.tape import Tape, join

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class TensorsDoNotFit(ValueError):
    """Tensors whose names or shapes are not those that an adapter trains."""


class NetworkAdapter:
    """Base of the adapters: theta = the tensors a subclass trains, then the running statistics of all BatchNorms.

    Statistics belong to theta for *every* BatchNorm and whatever is trained: a shift reaches all layers, and an edge
    that only serves then carries everything its BatchNorms need and works at batch 1.

    A subclass calls this constructor, then :meth:`_add` for each trained tensor, then :meth:`_add_statistics`.

    Args:
        model: the network, [batch, ...] -> logits [batch, classes]; it is copied, put in eval mode and frozen.
        preprocess: applied to the input before the network, e.g. from 0..255 to the network's own normalisation.
        head: path of the classifier, whose input is reported as features; by default the last nn.Linear.
        classes: C, the length of the logits; by default the outputs of the classifier.
        input_range: smallest and largest value that users send.
        input_shape: of one input, without the batch; None where it is not known.

    Raises:
        SelectionError: ``head`` does not exist.
    """

    name: str

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        head: str | None = None,
        classes: int | None = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        self._preprocess = preprocess
        self._input_range = input_range
        self.input_shape = input_shape
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._names = {name for name, _ in (*self.module.named_parameters(), *self.module.named_buffers())}
        floating = [value.dtype for value in self.module.parameters() if value.is_floating_point()]
        self.dtype = floating[0] if floating else torch.float32
        self._head = _find_head(self.module, head)
        self._classes = classes or getattr(self._head, "out_features", None)
        self._batch_norms = {
            name: module for name, module in self.module.named_modules() if isinstance(module, _BATCH_NORMS)
        }
        self._source: dict[str, Tensor] = {}
        self.tensors: list[ThetaTensor] = []

    def _add(self, name: str, kind: str, value: Tensor | None, *, trained: bool = True) -> None:
        """Appends a tensor to theta; None is no tensor."""
        if value is None:
            return
        self.tensors.append(ThetaTensor(name, tuple(value.shape), kind, trained, self.size))
        self._source[name] = value.detach().to(torch.float32).clone()

    def _add_statistics(self) -> None:
        """Appends the running statistics: all means, then all variances."""
        # Following the batch is then one operation on one contiguous piece.
        for kind, attribute in (("mean", "running_mean"), ("var", "running_var")):
            for name, module in self._batch_norms.items():
                self._add(join(name, attribute), kind, getattr(module, attribute), trained=False)

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the values that the trained tensors start from, before the adapter is used.

        Args:
            tensors: exactly the trained ones, by name.

        Raises:
            TensorsDoNotFit: a name is missing or unknown, a shape differs; nothing is replaced.
        """
        wanted = {entry.name: entry.shape for entry in self.tensors if entry.trained}
        missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
        if missing or unknown:
            raise TensorsDoNotFit(
                f"{len(missing)} tensors of adapter {self.name} missing ({', '.join(sorted(missing)[:2])}), "
                f"{len(unknown)} unknown ({', '.join(sorted(unknown)[:2])})"
            )
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise TensorsDoNotFit(
                    f"tensor {name} is {list(tensors[name].shape)}, adapter {self.name} has {list(shape)}"
                )
        for name in wanted:
            self._source[name] = tensors[name].detach().to(torch.float32).clone()

    @property
    def size(self) -> int:
        """P, the length of theta."""
        return sum(entry.size for entry in self.tensors)

    @property
    def trained(self) -> int:
        """Length of the leading, trained part of theta."""
        return sum(entry.size for entry in self.tensors if entry.trained)

    @property
    def classes(self) -> int:
        """C, the length of the logits.

        Raises:
            SelectionError: the network has no linear classifier and ``classes`` was not given.
        """
        if self._classes is None:
            raise SelectionError("the number of classes is unknown: give `classes`, or the `head`")
        return int(self._classes)

    def to_unit(self, x: Tensor) -> Tensor:
        """What users send as floating point numbers in 0..1."""
        low, high = self._input_range
        return (x.to(self.dtype) - low) * (1.0 / (high - low))

    def from_unit(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`to_unit`, but for the dtype."""
        low, high = self._input_range
        return low + (high - low) * x

    def head_weight(self) -> tuple[Tensor, Tensor] | None:
        """Weight [C, F] and bias [C] (zeros where it has none) of the linear classifier; None if there is none."""
        if not isinstance(self._head, nn.Linear):
            return None
        bias = self._head.bias
        return self._head.weight, bias if bias is not None else torch.zeros(len(self._head.weight))

    @property
    def has_running_statistics(self) -> bool:
        """Whether theta holds running statistics (the network has BatchNorm layers that track them)."""
        return any(entry.kind == "mean" for entry in self.tensors)

    def describe(self) -> str:
        """The trained tensors of theta as a printable table, with the total count of values."""
        entries = [entry for entry in self.tensors if entry.trained]
        lines = [f"{entry.name:48s} {entry.size:8d}  {list(entry.shape)}" for entry in entries]
        return "\n".join([*lines, f"{len(entries)} tensors, {self.trained} values"])

    def source_theta(self) -> Tensor:
        """[P] float32, the values the network was trained with."""
        return torch.cat([self._source[entry.name].reshape(-1) for entry in self.tensors])

    def unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """Slices of theta [P] by name, in their own shapes; trained ones are leaves that require a gradient."""
        slices: dict[str, Tensor] = {}
        pieces = torch.split(theta, [entry.size for entry in self.tensors])
        for entry, piece in zip(self.tensors, pieces, strict=True):
            value = piece.reshape(entry.shape)
            slices[entry.name] = value.detach().requires_grad_(True) if entry.trained else value
        return slices

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`unpack`: [P] float32."""
        return torch.cat([tensors[entry.name].reshape(-1) for entry in self.tensors])

    def forward(
        self, tensors: Mapping[str, Tensor], x: Tensor, *, statistics: Statistics = "running"
    ) -> Forward:
        """Runs the network with theta given by name; see :class:`tta_adapters.base.Forward`.

        Args:
            tensors: what :meth:`unpack` returned.
            x: [batch, ...].
            statistics: see :data:`tta_adapters.base.Statistics`; layers that never tracked running statistics
                always use the batch's.
        """
        return self._run(tensors, x, statistics, {})

    def answered(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        answers: Mapping[Callable[..., Any], Callable[..., Tensor]],
    ) -> Forward:
        """As :meth:`forward` under running statistics, but for functions of torch that are answered otherwise.

        Args:
            tensors: what :meth:`unpack` returned.
            x: [batch, ...].
            answers: function -> what is called in its place, with the same arguments.
        """
        return self._run(tensors, x, "running", answers)

    def _run(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        statistics: Statistics,
        answers: Mapping[Callable[..., Any], Callable[..., Tensor]],
    ) -> Forward:
        """As :meth:`forward`; calls of the functions in ``answers`` go to their values instead."""
        tape = Tape(tensors, self._batch_norms, statistics, answers)
        features: list[Tensor] = []
        hooks = []
        if self._head is not None:
            hooks.append(
                self._head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1)))
            )
        if self._preprocess is not None:
            x = self._preprocess(x)
        # A network in float64 is the oracle of parity checks; its inputs arrive as users send them.
        x = x.to(self.dtype)
        own = {name: value for name, value in tensors.items() if name in self._names}
        try:
            with tape:
                logits = torch.func.functional_call(self.module, own, (x,))
        finally:
            for hook in hooks:
                hook.remove()
        return Forward(logits, features[-1] if features else logits, tape.recorded)

    def batch_statistics(self, recorded: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The batch's statistics in the order of theta's untrained part, [P - T] float32.

        Args:
            recorded: ``Forward.statistics`` of a pass that computed batch statistics.
        """
        tracked = [name for name, module in self._batch_norms.items() if module.running_mean is not None]
        return torch.cat([recorded[name][index] for index in (0, 1) for name in tracked])


def _find_head(module: nn.Module, head: str | None) -> nn.Module | None:
    """The classifier: the module named, else the last nn.Linear, else None (features are then the logits)."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if head is not None:
        if head not in modules:
            raise SelectionError(
                f"head {head!r} is no module of the network; modules end with {list(modules)[-3:]}"
            )
        return modules[head]
    linears = [value for value in modules.values() if isinstance(value, nn.Linear)]
    return linears[-1] if linears else None
