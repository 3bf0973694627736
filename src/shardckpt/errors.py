"""Typed errors: every failure is a `ShardckptError` and the fitting builtin.

Layer: bottom; imports nothing from the package.
"""


class ShardckptError(Exception):
    """Base of every error about a checkpoint; says what failed, where, and what to do."""


class StateMismatchError(ShardckptError, ValueError):
    """The saved structure and the target differ; `problems` lists every key, not only the first."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        """Keep `problems`, one line per key, beside the joined message."""
        super().__init__(message)
        self.problems = problems


class ModelMapError(ShardckptError, ValueError):
    """A model map contradicts itself; the message names the rule."""


class UnsupportedStateError(ShardckptError, TypeError):
    """A value in the state cannot be stored exactly; the message names its path and type."""


class PoisonedStateError(ShardckptError, RuntimeError):
    """The state holds half-loaded data after a failed restore, so saving it is refused."""


class StepNotFoundError(ShardckptError, FileNotFoundError):
    """The step asked for, or any step at all, is not committed in this store."""


class StoreNotFoundError(ShardckptError, FileNotFoundError):
    """There is no checkpoint store at this place."""


class CorruptCheckpointError(ShardckptError, ValueError):
    """Stored bytes do not match their checksum or contradict the manifest."""


class FormatError(ShardckptError, ValueError):
    """Stored bytes are not in a format this version reads."""


class StorageError(ShardckptError, OSError):
    """A storage operation failed; the message holds operation, path and the system's words."""


class FencedError(ShardckptError, RuntimeError):
    """A later job took over this store; this one may no longer save."""


class SaveFailedError(ShardckptError, RuntimeError):
    """The save was not committed; every rank raises the same first error."""


class TornCopyError(SaveFailedError):
    """An array changed, or its memory was freed, while it was copied; the message names it."""


class StagingMemoryError(ShardckptError, MemoryError):
    """There is no host memory for the copies of a save."""


class OutcomeUnknownError(ShardckptError, RuntimeError):
    """The commit log is out of reach, so nobody here can say whether the step was committed."""


class DeadlineError(ShardckptError, TimeoutError):
    """A named wait passed its deadline; the message names who was missing."""


class MissingDependencyError(ShardckptError, ImportError):
    """An optional package is not installed; the message says how to get it."""


def error_named(kind: str, message: str) -> ShardckptError:
    """Return the error of class `kind` with `message`; an unknown name gives a SaveFailedError.

    Used where an error has travelled from another rank.
    """
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, ShardckptError):
        return found(message)
    return SaveFailedError(f"{kind}: {message}" if kind else message)
