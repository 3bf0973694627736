"""The text the example trains on, and which sample is which window of it.

The text is the source of Python's own standard library: real, on every machine, and the same for
everyone who runs the same Python. The order of the data is a pure function: sample `i` of a job is
always the same window, whatever the number of ranks and however often the job was interrupted. So
one saved integer, the number of samples consumed, resumes the data anywhere.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

VOCABULARY: Final = 256
_ROUNDS: Final = 4
_SKIPPED: Final = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes of text, split in a part to train on and a part held out.

    Attributes:
        train: Tokens to train on, uint8.
        held_out: Tokens the model never trains on, uint8.
        digest: Names the text; two jobs with one digest saw the same bytes.
    """

    train: np.ndarray[Any, Any]
    held_out: np.ndarray[Any, Any]
    digest: str


def standard_library(max_bytes: int) -> Corpus:
    """Return the first `max_bytes` of Python's standard library, files sorted; 5% held out.

    Raises:
        FileNotFoundError: This Python has no readable standard library source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not _SKIPPED.isdisjoint(path.relative_to(root).parts):
            continue
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    if not text:
        raise FileNotFoundError(f"no .py files below {root}: this Python ships without its source")
    del text[max_bytes:]
    tokens = np.frombuffer(text, dtype=np.uint8)
    cut = len(text) * 95 // 100
    return Corpus(tokens[:cut], tokens[cut:], hashlib.sha256(text).hexdigest()[:16])


def window_of(sample: int, num_windows: int, seed: int) -> int:
    """Return which window sample number `sample` of the job is.

    The first `num_windows` samples visit every window once, in an order that depends on the seed
    only; so do the next `num_windows`, in another order. No list is shuffled or kept: a keyed
    bijection of `[0, 2**bits)` (a Feistel network over blake2b) is applied again until it lands
    inside the range.

    Args:
        sample: Global sample number from the start of the job, from 0.
        num_windows: Windows in the text.
        seed: Seed of the job.

    Raises:
        ValueError: There are no windows, or the sample number is negative.
    """
    if num_windows < 1 or sample < 0:
        raise ValueError(f"sample {sample} of {num_windows} windows: want sample >= 0 and a window")
    epoch, index = divmod(sample, num_windows)
    half_bits = max(1, ((num_windows - 1).bit_length() + 1) // 2)
    key = f"{seed}/{epoch}".encode()
    index = _scrambled(index, half_bits, key)
    while index >= num_windows:
        index = _scrambled(index, half_bits, key)
    return index


def batch_of(
    text: np.ndarray[Any, Any], samples: range, context: int, seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return inputs and next-byte targets, both int64 of shape (samples, context)."""
    num_windows = (len(text) - 1) // context
    starts = [context * window_of(sample, num_windows, seed) for sample in samples]
    windows = np.stack([text[start : start + context + 1] for start in starts]).astype(np.int64)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


def slice_of_rank(first: int, global_batch: int, rank: int, world_size: int) -> range:
    """Return the samples of one rank: an equal contiguous slice of the global batch at `first`.

    Raises:
        ValueError: The global batch does not divide by the number of ranks.
    """
    if global_batch % world_size:
        raise ValueError(
            f"a global batch of {global_batch} does not divide by {world_size} ranks: "
            "choose a --global-batch that every number of ranks you use divides"
        )
    per_rank = global_batch // world_size
    return range(first + rank * per_rank, first + (rank + 1) * per_rank)


def _scrambled(index: int, half_bits: int, key: bytes) -> int:
    """Return a keyed bijection of `[0, 2**(2*half_bits))`."""
    mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & mask
    for turn in range(_ROUNDS):
        word = turn.to_bytes(1, "little") + right.to_bytes(8, "little")
        digest = hashlib.blake2b(word, key=key, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
