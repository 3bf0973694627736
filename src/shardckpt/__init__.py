"""Sharded checkpoints of distributed training: saved in the background, loaded anywhere."""

import logging

from shardckpt.errors import (
    CorruptCheckpointError,
    DeadlineError,
    FencedError,
    FormatError,
    ModelMapError,
    OutcomeUnknownError,
    PoisonedStateError,
    SaveFailedError,
    ShardckptError,
    StagingMemoryError,
    StateMismatchError,
    StepNotFoundError,
    StorageError,
    StoreNotFoundError,
    TornCopyError,
    UnsupportedStateError,
)
from shardckpt.load.maps import ModelMap, Rule
from shardckpt.options import Auto, Best, Every, Retention, Staging
from shardckpt.state import PerRank

__version__ = "0.1.0.dev0"
__all__ = [
    "Auto",
    "Best",
    "CorruptCheckpointError",
    "DeadlineError",
    "Every",
    "FencedError",
    "FormatError",
    "ModelMap",
    "ModelMapError",
    "OutcomeUnknownError",
    "PerRank",
    "PoisonedStateError",
    "Retention",
    "Rule",
    "SaveFailedError",
    "ShardckptError",
    "Staging",
    "StagingMemoryError",
    "StateMismatchError",
    "StepNotFoundError",
    "StorageError",
    "StoreNotFoundError",
    "TornCopyError",
    "UnsupportedStateError",
]

logging.getLogger("shardckpt").addHandler(logging.NullHandler())
