"""Train one model in torch, go on in JAX, and go on in torch again, through one store and one map.

    python examples/cross/demo.py        # or: make demo-cross; about a minute on 2 CPU cores

1. torch, FSDP2 on 2 ranks, AdamW: trains from its own first values, saves.
2. JAX, 1 process x 8 devices, optax.adamw with the same hyperparameters: restores parameters and
   optimizer state through `gpt_map`, trains on, saves into the same store.
3. torch on 3 ranks restores through the same map and trains to the end.

Beside it each framework trains uninterrupted from the same first values. Every loss must agree with
both within 1e-5, and the state must cross bit by bit: what the jobs hold in memory before and after
each crossing is compared by `plain.py`, which does not use the map. As a control JAX also goes on
with the parameters alone: its losses must not agree.

Leaves the log of every job in `demo-output/cross/`. Exits with 1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

sys.path.append(str(Path(__file__).parents[1] / "torch_fsdp"))

from plain import compare
from report import read_losses

TOLERANCE: Final = 1e-5
JOB_TIMEOUT_S: Final = 300.0
OUTPUT: Final = Path("demo-output") / "cross"
STORE: Final = OUTPUT / "ckpt"
_HERE: Final = Path(__file__).parent


class DemoError(Exception):
    """Something the demo promises did not happen; the message says what."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job of the demo.

    Attributes:
        name: Names its files.
        what: What it is, in words.
        ranks: Ranks of torch; 0 for the one process of JAX.
        until: Steps to have trained in all when it ends.
        alone_from: Step from which it trains and saves nothing; None: it uses the shared store.
        has_moments: It restores the optimizer state too.
        losses: Its losses by step, once it ran.
    """

    name: str
    what: str
    ranks: int
    until: int
    alone_from: int | None = None
    has_moments: bool = True
    losses: dict[int, float] | None = None

    @property
    def restored(self) -> Path:
        """What it held right after restore."""
        return OUTPUT / f"{self.name}-restored.npz"

    @property
    def trained(self) -> Path:
        """What it held after its last step."""
        return OUTPUT / f"{self.name}-trained.npz"


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description="Train one model across torch and JAX.")
    parser.add_argument("--steps", type=int, default=10, help="steps of each of the three phases")
    steps = parser.parse_args().steps
    started_s = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    (OUTPUT.parent / ".gitignore").write_text("*\n")
    try:
        crossing = [
            run(Job("1-torch", "torch FSDP2, 2 ranks", 2, steps)),
            run(Job("2-jax", "JAX, 1 process x 8 devices", 0, 2 * steps)),
            run(Job("3-torch", "torch FSDP2, 3 ranks", 3, 3 * steps)),
        ]
        show_crossing(crossing[0], crossing[1])
        show_crossing(crossing[1], crossing[2])
        alone = [
            run(Job("torch-alone", "torch FSDP2, 2 ranks, uninterrupted", 2, 3 * steps, 0)),
            run(Job("jax-alone", "JAX, 8 devices, uninterrupted", 0, 3 * steps, 0)),
        ]
        control = run(
            Job("control", "JAX, parameters alone", 0, 2 * steps, steps, has_moments=False)
        )
        show_losses(crossing, alone)
        show_control(control, crossing[1])
    except DemoError as error:
        print(f"\nDEMO FAILED: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started_s
    print(
        "\nStreams of random numbers are not converted: nothing here draws any after step 0, and\n"
        "the data follows from (seed, step), as should whatever a job draws."
        f"\n\nThe demo held: torch to JAX to torch, bit by bit ({seconds:.0f} s)."
    )
    return 0


def run(job: Job) -> Job:
    """Run a job to its end; return it with its losses.

    Raises:
        DemoError: It failed.
    """
    print(f"[{job.name}] {job.what}, to step {job.until}", flush=True)
    losses, log = OUTPUT / f"{job.name}.jsonl", OUTPUT / f"{job.name}.log"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks))
    command = (
        *((sys.executable, *launcher) if job.ranks else (sys.executable,)),
        str(_HERE / ("train_torch.py" if job.ranks else "train_jax.py")),
        *("--ckpt", str(STORE), "--until", str(job.until), "--losses", str(losses)),
        *(() if job.alone_from is None else ("--alone-from", str(job.alone_from))),
        *(() if job.has_moments else ("--no-moments",)),
        *("--restored", str(job.restored), "--trained", str(job.trained)),
    )
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**environment, "OMP_NUM_THREADS": "1"}
        )
        try:
            status = process.wait(JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{job.what} did not end within {JOB_TIMEOUT_S:g} s: {log}") from None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise DemoError(f"{job.what} ended with status {status}. From {log}:\n{end}")
    return replace(job, losses=read_losses(losses))


def show_crossing(before: Job, after: Job) -> None:
    """Say that the state came over bit by bit.

    Raises:
        DemoError: It did not.
    """
    pair = (before.trained, after.restored)
    found = compare(*(pair if before.ranks else pair[::-1]))
    if found.differing:
        raise DemoError(f"{before.what} to {after.what}: {found.differing} differ")
    print(
        f"\nstep {before.until}, {before.what} -> {after.what}: parameters, both moments and step "
        f"counts,\n  {found.num_arrays} arrays of {found.num_bytes:,} bytes: bit-equal "
        f"(sha256 {found.digest})",
        flush=True,
    )
    show_left_behind(after)


def show_losses(crossing: list[Job], alone: list[Job]) -> None:
    """Print the losses of all runs, and the largest relative difference between any two.

    Raises:
        DemoError: A run lacks steps, or losses differ by more than is allowed.
    """
    by_torch, by_jax = (job.losses or {} for job in alone)
    where = {step: job for job in crossing for step in job.losses or {}}
    steps = range(crossing[-1].until)
    if not all(sorted(found) == list(steps) for found in (by_torch, by_jax, where)):
        raise DemoError(f"not every run has a loss for every step from 0 to {steps[-1]}")
    print("\nstep  torch alone  jax alone   crossing    largest difference  crossing ran in")
    largest = apart = 0.0
    for step in steps:
        losses = (by_torch[step], by_jax[step], (where[step].losses or {})[step])
        found = difference(*losses)
        largest, apart = max(largest, found), max(apart, difference(*losses[:2]))
        cells = "  ".join(f"{loss:.7f}" for loss in losses)
        print(f"{step:4}  {cells[:9]:11}{cells[9:]}   {found:18.1e}  {where[step].what}")
    print(
        f"\nlargest relative difference between any two runs: {largest:.1e} "
        f"({TOLERANCE:g} allowed, float32)\n  between the two runs that never crossed: {apart:.1e}"
    )
    if largest > TOLERANCE:
        raise DemoError(f"losses differ by {largest:.1e}; {TOLERANCE:g} is allowed")


def show_control(control: Job, crossing: Job) -> None:
    """Say how far losses are off where the optimizer state is lost.

    Raises:
        DemoError: They are not, so that the losses would not tell.
    """
    pairs = [((control.losses or {})[step], loss) for step, loss in (crossing.losses or {}).items()]
    found = max(difference(*pair) for pair in pairs)
    print(f"  as a control, JAX going on with the parameters but without the moments: {found:.1e}")
    if found <= TOLERANCE:
        raise DemoError("losses without the moments agree too: this comparison is blind")


def show_left_behind(job: Job) -> None:
    """Print what the restore of a job warned of: what it did not convert."""
    for line in (OUTPUT / f"{job.name}.log").read_text(errors="replace").splitlines():
        if "through a model map" in line:
            print(f"  {line}", flush=True)


def difference(*losses: float) -> float:
    """Return how far losses lie apart relative to the smallest; infinite where one is no number."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    return (max(losses) - min(losses)) / min(losses)


if __name__ == "__main__":
    sys.exit(main())
