"""What can be wrong with a stream: its source, its shift, or its fit to the model.

Each is also one of the runtime's kinds, so that a command ends with the exit status of that kind: a wrong
word on the command line is a `ConfigError`, bad data an `InputError`.
"""

from __future__ import annotations

from tta_runtime.errors import BundleError, ConfigError, InputError, TtaError


class StreamError(TtaError):
    """A stream cannot be read, shifted, or fed to the model."""

    code = "stream"


class PlotsExtraMissing(StreamError, ConfigError):
    """Matplotlib is needed and not installed."""

    code = "plots-extra-missing"


class BuiltinMissing(StreamError, BundleError):
    """This installation lacks the built-in bundle or its test images."""

    code = "builtin-missing"


class UnknownShift(StreamError, ConfigError):
    """No corruption has this name."""

    code = "unknown-shift"


class BadSeverity(StreamError, ConfigError):
    """A severity is a whole number from 1 to 5."""

    code = "bad-severity"


class FrostPhotosMissing(StreamError, ConfigError):
    """The shift `frost` needs photographs of frost and has none that serve."""

    code = "frost-photos-missing"


class ShiftNeedsColour(StreamError, InputError):
    """The shift is defined on three channels and the images have one."""

    code = "shift-needs-colour"


class BadImages(StreamError, InputError):
    """The array is not uint8 [batch, height, width, 1 or 3]."""

    code = "bad-images"


class UnknownSource(StreamError, ConfigError):
    """The source is not of a known kind."""

    code = "unknown-source"


class SourceMissing(StreamError, InputError):
    """The source's file or directory does not exist."""

    code = "source-missing"


class SourceMalformed(StreamError, InputError):
    """The source exists and cannot be used."""

    code = "source-malformed"


class SourceTooLarge(StreamError, InputError):
    """The source declares more data than the limit."""

    code = "source-too-large"


class ShiftNotGiven(StreamError, ConfigError):
    """A directory of published corruptions does not hold the asked one."""

    code = "shift-not-given"


class LabelsMissing(StreamError, InputError):
    """The source has no labels and the command needs them."""

    code = "labels-missing"


class InputMismatch(StreamError, InputError):
    """The source's images or labels do not fit the model."""

    code = "input-mismatch"
