"""What both frameworks train: the model's size, the hyperparameters, the batch of every step.

Knows no framework. The batch is a pure function of (seed, step), and so may anything random be that
a job needs: streams of random numbers do not cross from one framework to the other.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# The text and its order are those of the torch example.
sys.path.append(str(Path(__file__).parents[1] / "torch_fsdp"))

from corpus import Corpus, batch_of, standard_library

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

CORPUS_BYTES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """All that must be equal in both frameworks.

    Attributes:
        lr: Learning rate of AdamW; constant.
        betas: How slowly its moments forget.
        eps: Added to the root of the second moment.
        weight_decay: Of matrices; gains have none.
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    context: int = 32
    global_batch: int = 24
    seed: int = 0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def text(self) -> Corpus:
        """Return the text to train on."""
        return standard_library(CORPUS_BYTES)

    def batch(
        self, corpus: Corpus, step: int, rank: int = 0, world_size: int = 1
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return one rank's inputs and next-byte targets of a step, int64 (samples, context).

        Args:
            corpus: The text.
            step: Number of the step, from 0.
            rank: Which of the equal slices of the global batch.
            world_size: How many slices there are.
        """
        per_rank = self.global_batch // world_size
        first = step * self.global_batch + rank * per_rank
        return batch_of(corpus.train, range(first, first + per_rank), self.context, self.seed)


def parse_options() -> argparse.Namespace:
    """Return the options of a job in either framework, or leave with a usage message."""
    parser = argparse.ArgumentParser(description="Train the GPT of this folder up to some step.")
    add = parser.add_argument
    add("--ckpt", required=True, help="store that all jobs share")
    add("--until", type=int, required=True, help="steps to have trained in all")
    add("--alone-from", type=int, help="train from this step on and save nothing")
    add("--no-moments", action="store_true", help="load parameters alone (in JAX)")
    add("--losses", type=Path, required=True, help="append one JSON line per step to this file")
    add("--restored", type=Path, help="write the state right after restore to this file (npz)")
    add("--trained", type=Path, help="write the state after the last step to this file (npz)")
    return parser.parse_args()


def log_warnings() -> None:
    """Print the warnings of shardckpt: what a restore through the map leaves behind."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)


def write_loss(path: Path, step: int, loss: float) -> None:
    """Append the loss of one step."""
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def check_text(saved: Mapping[str, Any], corpus: Corpus) -> None:
    """Refuse a checkpoint of another text.

    Raises:
        ValueError: The texts differ.
    """
    if saved["corpus"] != corpus.digest:
        raise ValueError(
            f"the checkpoint was trained on text {saved['corpus']}, this Python's standard library "
            f"is text {corpus.digest}: resume with the Python that started it"
        )
