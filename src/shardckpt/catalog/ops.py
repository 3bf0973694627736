"""What the protocols of the catalog ask of a store, one frozen value per operation.

Layer: catalog. A protocol is a generator that yields these and receives the answers:
`catalog.store` answers from a storage, the model checker in `tests/catalog` from every state it can
reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardckpt.errors import StorageError


@dataclass(frozen=True, slots=True)
class ListRoots:
    """Answered with every name in `roots/`."""


@dataclass(frozen=True, slots=True)
class GetRoot:
    """Answered with the bytes, or None where the name is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class PutRoot:
    """Answered with True (durable), False (the name exists) or the StorageError (who knows)."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class SyncRoots:
    """Answered with None once every name in `roots/` that a listing shows is durable."""


@dataclass(frozen=True, slots=True)
class DeleteRoot:
    """Answered with None."""

    name: str


@dataclass(frozen=True, slots=True)
class ListAttempts:
    """Answered with the name of every attempt directory."""


@dataclass(frozen=True, slots=True)
class ListLeased:
    """Answered with the attempts that a live lease names."""


@dataclass(frozen=True, slots=True)
class DeleteAttempt:
    """Answered with None once the directory and all below is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class SyncAttempts:
    """Answered with None once every removal of an attempt directory is durable."""


LogOp: TypeAlias = (
    ListRoots
    | GetRoot
    | PutRoot
    | SyncRoots
    | DeleteRoot
    | ListAttempts
    | ListLeased
    | DeleteAttempt
    | SyncAttempts
)
LogAnswer: TypeAlias = Sequence[str] | bytes | bool | StorageError | None
