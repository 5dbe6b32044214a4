"""What can go wrong while a model becomes a bundle: each refusal names its cause and a fix."""

from __future__ import annotations

from tta_runtime.errors import TtaError


class ExportError(TtaError):
    """A model, method or option that cannot become a bundle."""

    code = "export"


class TraceFailed(ExportError):
    """The model cannot be traced into a graph."""

    code = "trace-failed"

    def __init__(self, module_path: str, reason: str) -> None:
        where = f" in module {module_path!r}" if module_path else ""
        super().__init__(
            cause=f"the model cannot be traced{where}: {reason}",
            fix="Remove control flow that depends on tensor values and operations that fix the batch size there",
        )
        self.module_path = module_path


class OperatorNotSupported(ExportError):
    """The traced graph holds an operator that has no lowering to ONNX."""

    code = "operator-not-supported"

    def __init__(self, operator: str, module_path: str, reason: str) -> None:
        where = f"module {module_path!r}" if module_path else "the backward pass or the method"
        super().__init__(
            cause=f"operator {operator} in {where} cannot be lowered to ONNX: {reason}",
            fix="Replace it in the model, leave that module out of adaptation with --exclude, or add a decomposition",
        )
        self.operator = operator
        self.module_path = module_path


class SourceError(ExportError):
    """A model source or its weights that cannot be loaded."""

    code = "model-source"


class WeightsDoNotFit(SourceError):
    """A state dict whose names or shapes are not the network's."""

    code = "weights-do-not-fit"


class NetworkRefused(ExportError):
    """A network whose input or output is not what was declared."""

    code = "network-refused"


class OptionError(ExportError):
    """An unknown method or option."""

    code = "option"


class OutputExists(ExportError):
    """The output directory holds something already."""

    code = "output-exists"


class OutputUnwritable(ExportError):
    """The output directory cannot be made."""

    code = "output-unwritable"


class ExtraMissing(ExportError):
    """A package of an optional extra is not installed."""

    code = "extra-missing"


class ParityError(ExportError):
    """A compiled graph disagrees with eager torch."""

    code = "parity"


class Diverged(ExportError):
    """A warm-up whose loss is no longer finite."""

    code = "diverged"


class Interrupted(ExportError):
    """A warm-up that was stopped and can be resumed."""

    code = "interrupted"


class CheckpointMismatch(ExportError):
    """A checkpoint that belongs to another warm-up, or to none."""

    code = "checkpoint"


class CheckFailed(ExportError):
    """A bundle's graph that does not pass a check."""

    code = "check-failed"


def in_one_line(error: BaseException) -> str:
    """Type and first line of an error that other people's code raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
