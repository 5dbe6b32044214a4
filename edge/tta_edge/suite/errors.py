"""What can be wrong with a suite: its name, its streams, its stored results, its ready-made streams."""

from __future__ import annotations

from tta_runtime.errors import ConfigError, EngineError, InputError, TtaError


class SuiteError(TtaError):
    """A suite cannot be played."""

    code = "suite"


class UnknownSuite(SuiteError, ConfigError):
    """No suite has this name."""

    code = "unknown-suite"


class UnknownStreamName(SuiteError, ConfigError):
    """No stream of the suite has this name or fits this pattern."""

    code = "unknown-stream-name"


class UnknownPlayer(SuiteError, ConfigError):
    """Nothing answers streams under this name."""

    code = "unknown-player"


class SuiteOption(SuiteError, ConfigError):
    """An option does not go with a suite, or not with the bundles that were given."""

    code = "suite-option"


class TooFewImages(SuiteError, InputError):
    """The source has too few images for a stream."""

    code = "too-few-images"


class GivenMalformed(SuiteError, InputError):
    """A file with a ready-made stream exists and cannot be used."""

    code = "given-malformed"


class StoreMalformed(SuiteError, InputError):
    """A stored result cannot be read."""

    code = "store-malformed"


class StoreUnwritable(SuiteError, ConfigError):
    """A result cannot be stored where the user asked for it."""

    code = "store-unwritable"


class WorkerLost(SuiteError, EngineError):
    """A worker process ended without saying why."""

    code = "worker-lost"
