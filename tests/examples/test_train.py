"""The example job: its data order, its restart, and how the demo judges it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_fsdp"
WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12)
TINY = (
    *("--layers", "1", "--width", "16", "--heads", "2", "--context", "8", "--global-batch", "4"),
    *("--steps", "6", "--warmup", "2", "--save-every", "2", "--seed", "3"),
)


def load_module(name: str) -> ModuleType:
    """Import a file of the example, whose folder is on the path only while it runs as a script."""
    spec = importlib.util.spec_from_file_location(f"torch_fsdp_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


corpus = load_module("corpus")
report = load_module("report")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_world_size_sees_the_same_global_batches(world_size: int) -> None:
    text = np.arange(20_000).astype(np.uint8)
    for first in (0, 24, 24 * 1000):
        whole = corpus.batch_of(text, range(first, first + 24), context=16, seed=5)
        parts = [
            corpus.batch_of(
                text, corpus.slice_of_rank(first, 24, rank, world_size), context=16, seed=5
            )
            for rank in range(world_size)
        ]
        for index in (0, 1):
            assert np.array_equal(np.concatenate([part[index] for part in parts]), whole[index])


@pytest.mark.parametrize("num_windows", [1, 2, 3, 16, 17, 1000])
def test_each_epoch_visits_every_window_once(num_windows: int) -> None:
    for epoch in range(3):
        samples = range(epoch * num_windows, (epoch + 1) * num_windows)
        visited = [corpus.window_of(sample, num_windows, seed=0) for sample in samples]
        assert sorted(visited) == list(range(num_windows))


def test_epochs_and_seeds_have_different_orders() -> None:
    def order(epoch: int, seed: int) -> tuple[int, ...]:
        return tuple(corpus.window_of(epoch * 500 + i, 500, seed) for i in range(500))

    orders = {order(0, 0), order(1, 0), order(0, 1), tuple(range(500))}
    assert len(orders) == 4


def test_the_order_of_data_is_the_one_runs_were_started_with() -> None:
    """A changed order would change what a resumed job trains on, so it is pinned."""
    order = [corpus.window_of(sample, 1000, seed=7) for sample in (0, 1, 2, 999, 1000)]
    assert order == [520, 153, 46, 375, 824]


def test_targets_are_the_bytes_after_the_inputs() -> None:
    text = np.arange(200).astype(np.uint8)
    inputs, targets = corpus.batch_of(text, range(6), context=9, seed=0)
    assert inputs.shape == targets.shape == (6, 9)
    assert np.array_equal(inputs + 1, targets)


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 24 does not divide by 5 ranks"):
        corpus.slice_of_rank(0, 24, 0, 5)


def test_the_text_is_the_same_every_time_and_held_out_text_is_not_trained_on() -> None:
    text = corpus.standard_library(100_000)
    assert text.digest == corpus.standard_library(100_000).digest
    assert (len(text.train), len(text.held_out)) == (95_000, 5_000)


@pytest.mark.parametrize(
    ("ranks", "relative_error", "holds"),
    [(2, 0.0, True), (2, 1e-9, False), (3, 5e-6, True), (3, 2e-5, False), (1, float("nan"), False)],
)
def test_the_demo_accepts_bit_equality_on_two_ranks_and_rounding_on_others(
    ranks: int, relative_error: float, holds: bool
) -> None:
    reference = {0: 4.0, 1: 2.0}
    phase = report.Phase(
        "x",
        ranks,
        {1: 2.0 * (1 + relative_error)},
        reference,
        wall_s=1.0,
        what="",
        killed_at_step=None,
    )
    assert phase.holds is holds


def test_the_demo_does_not_accept_a_phase_whose_losses_are_missing_or_no_numbers() -> None:
    for losses in ({}, {7: 1.0}, {0: 1.0, 1: float("nan")}):
        phase = report.Phase(
            "x", 3, losses, {0: 1.0, 1: 1.0}, wall_s=1.0, what="", killed_at_step=None
        )
        assert not phase.holds


def test_a_line_of_metrics_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "lo')
    assert report.read_losses(metrics) == {0: 2.5}


@pytest.mark.multiproc
def test_a_restarted_job_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """Losses and validation losses after a restart are those of a run that never stopped."""
    reference = train(tmp_path, "reference", "--no-checkpoint")
    first = train(tmp_path, "first", "--stop-step", "3")
    second = train(tmp_path, "second")
    assert sorted(reference) == [0, 1, 2, 3, 4, 5]
    assert sorted(first) == [0, 1, 2]
    assert sorted(second) == [3, 4, 5]
    joined = first | second
    assert {step: line["loss"] for step, line in joined.items()} == {
        step: line["loss"] for step, line in reference.items()
    }
    assert joined[4]["val_loss"] == reference[4]["val_loss"]
    assert joined[5]["val_loss"] == reference[5]["val_loss"]


def train(folder: Path, name: str, *arguments: str) -> dict[int, dict[str, float]]:
    """Run the example on one rank; return its metrics by step."""
    metrics = folder / f"{name}.jsonl"
    command = [sys.executable, str(EXAMPLE / "train.py"), *TINY, "--ckpt", str(folder / "ckpt")]
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [*command, "--metrics", str(metrics), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["step"]: line for line in map(json.loads, metrics.read_text().splitlines())}
