"""What ranks tell each other during a save.

Layer: save.
"""

from __future__ import annotations

import msgspec

from shardckpt.save.write import FileReport


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """A rank has come to this save.

    Attributes:
        step: Its step.
        structure: Digest of its structure.
        is_new: Whether it has no plan for that, and waits for `Asked`.
    """

    step: int
    structure: str
    is_new: bool = False


class Asked(msgspec.Struct, frozen=True):
    """Ranks whose structure the coordinator has not seen; of equal ones the lowest rank's."""

    ranks: list[int]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator's answer once all have come.

    Attributes:
        step: The coordinator's step.
        attempt: Directory to write to; "" where the save is skipped.
        plan: Digest of the global plan.
        structure: Digest of the coordinator's structure.
    """

    step: int
    attempt: str
    plan: str
    structure: str


class Decision(msgspec.Struct, frozen=True):
    """Whether the coordinator goes on with a save or skips it for all (`on_busy="skip"`)."""

    skip: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's files are durable.

    Attributes:
        structure: Digest of the structure that was written.
        files: In order.
        objects_digest: Digest of the values that should be equal on all ranks.
        objects: Those values, only from ranks whose structure is not the coordinator's.
    """

    structure: str
    files: list[FileReport]
    objects_digest: str
    objects: dict[str, msgspec.Raw]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a save ended, for all ranks alike.

    Attributes:
        committed: Whether the step exists now.
        kind: Class of the error, "" where committed.
        message: The error's words.
    """

    committed: bool
    kind: str = ""
    message: str = ""
