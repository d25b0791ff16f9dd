"""The errors a user can meet: each says what was found, what was expected, what to do."""


class FromscratchError(Exception):
    """Base of every error whose message is meant for the user, shown without a traceback."""


class ConfigError(FromscratchError):
    """The user's settings are wrong. The message names each dotted key."""


class DataError(FromscratchError):
    """The user's data is wrong. The message names file and line."""


class ArtifactError(FromscratchError):
    """An artifact is missing or damaged. The message names its folder and what to run."""


class DiskFullError(FromscratchError):
    """A disk is full. The message names the file, and the bytes that are needed and free."""


class StageError(FromscratchError):
    """A stage's child process failed. The message holds its traceback and how to reproduce it."""


class TransientError(StageError):
    """A stage failed for a reason that may pass: the network."""


class Interrupted(BaseException):
    """A stage was asked to stop, has saved what it needs to go on, and can be started again."""
