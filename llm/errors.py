"""User-facing errors: each says what was found, what was expected, and what to do."""


class FromscratchError(Exception):
    """Base of the errors that are shown to the user without a traceback."""


class ConfigError(FromscratchError):
    """The user's settings are wrong. The message names each dotted key."""


class DataError(FromscratchError):
    """The user's data is wrong. The message names file and line."""


class ArtifactError(FromscratchError):
    """An artifact is missing or damaged. The message names its folder and the remedy."""


class DiskFullError(FromscratchError):
    """A disk is full. The message names the file and the bytes needed and free."""


class StageError(FromscratchError):
    """A stage's child process failed. The message holds its traceback and how to reproduce it."""


class TransientError(StageError):
    """A stage failed for a passing reason: the network."""


class Interrupted(BaseException):
    """A stage stopped on request after saving its work; it can be started again."""
