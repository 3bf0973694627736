"""Kill a JAX training job in the middle of a save, resume it on other meshes, compare all losses.

    python examples/jax_pjit/demo.py        # or: make demo-jax; about two minutes on 2 CPU cores

What it shows, with `train.py` on CPU devices:

1. A reference: 2 processes x 4 devices train to the end, uninterrupted and without checkpoints.
2. The same job with checkpoints. While a save is being written, process 1 is killed with SIGKILL:
   its shard file exists, the save is not committed. The job dies.
3. It is started again, on 2 x 4 devices, and resumes from the newest committed step by itself.
   Every loss must equal the reference bit for bit.
4. It goes on in 1 process with 8 devices, then on a (2, 2) mesh with tensor parallelism. Every loss
   must be within 1e-5 of the reference.

Prints a timeline; leaves the log of every process in `demo-output/jax/`. Exits with 1 if anything
is not as promised.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

sys.path.append(str(Path(__file__).parents[1] / "torch_fsdp"))

from report import Phase, read_losses, timeline

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS: Final = 60
SAVE_EVERY: Final = 10
KILL_FROM_STEP: Final = 20
KILLED_PROCESS: Final = 1
KILL_TRIES: Final = 3
JOB_TIMEOUT_S: Final = 300.0
OUTPUT: Final = Path("demo-output") / "jax"
STORE: Final = OUTPUT / "ckpt"
_TRAIN: Final = Path(__file__).with_name("train.py")
_ARGUMENTS: Final = (
    *("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--ckpt", str(STORE)),
    *("--layers", "4", "--width", "256", "--heads", "4", "--context", "32", "--global-batch", "24"),
)


class DemoError(Exception):
    """Something the demo promises did not happen; the message says what."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a phase runs on: processes, devices of each, and devices along the "model" axis."""

    processes: int
    devices: int
    model: int = 1

    def __str__(self) -> str:
        """Return for example `2 x 4 devices`."""
        if self.model > 1:
            return f"a ({self.processes * self.devices // self.model}, {self.model}) mesh"
        return f"{self.processes} x {self.devices} devices"


TWO: Final = Place(2, 4)


@dataclass(frozen=True, slots=True)
class Job:
    """A training job under way; its processes in order."""

    name: str
    processes: list[subprocess.Popen[bytes]]
    metrics: Path
    started_s: float

    @property
    def log(self) -> Path:
        """What process 0 prints."""
        return OUTPUT / f"{self.name}-0.log"


def main() -> int:
    """Run the demo; return the exit status."""
    started_s = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    (OUTPUT.parent / ".gitignore").write_text("*\n")
    try:
        phases = run_phases()
    except DemoError as error:
        print(f"\nDEMO FAILED: {error}", file=sys.stderr)
        return 1
    print("\n" + timeline(phases))
    print(f"\n(ranks are processes)  logs: {OUTPUT.resolve()}/*.log")
    wrong = [phase.name for phase in phases if not phase.holds]
    seconds = time.monotonic() - started_s
    if wrong:
        print(
            f"\nDEMO FAILED after {seconds:.0f} s: losses differ in {', '.join(wrong)}",
            file=sys.stderr,
        )
        return 1
    print(f"\nThe demo held: every loss after every interruption is right ({seconds:.0f} s).")
    return 0


def run_phases() -> list[Phase]:
    """Run every phase and return what happened."""
    announce("reference", f"{TWO} train {STEPS} steps, uninterrupted, without checkpoints")
    with started("reference", TWO, "--no-checkpoint") as job:
        finish(job)
    reference = read_losses(job.metrics)
    what = "uninterrupted, no checkpoints"
    phases = [Phase("reference", 2, reference, reference, wall_s(job), what, None)]
    killed, committed = run_until_killed(reference)
    phases.append(killed)
    for name, place, stop in (
        ("resume", TWO, 35),
        ("one", Place(1, 8), 47),
        ("tensor", Place(1, 4, model=2), STEPS),
    ):
        phases.append(run_resumed(name, place, stop, committed, reference))
        committed = stop - 1
    return phases


def run_until_killed(reference: dict[int, float]) -> tuple[Phase, int]:
    """Train and kill a process in the middle of a save; return the phase and the newest commit.

    The signal may come too late: then the save was committed all the same, nothing was interrupted,
    and the phase is run again from nothing.

    Raises:
        DemoError: The job ended by itself, or was never hit in the middle of a save.
    """
    for attempt in range(1, KILL_TRIES + 1):
        shutil.rmtree(STORE, ignore_errors=True)
        announce("kill", f"{TWO} train; process {KILLED_PROCESS} dies in a save (try {attempt})")
        with started(f"kill-{attempt}", TWO) as job:
            saved = kill_during_save(job)
            # The runtime ends the other process when it misses this one.
            if wait(job, 0) == 0:
                raise DemoError(f"process {KILLED_PROCESS} was killed, yet the job ended well")
        if saved not in committed_attempts():
            step = step_of(saved)
            what = f"process {KILLED_PROCESS} killed (SIGKILL) while step {step} was being saved"
            print(f"  {what};\n  no root names {saved}; committed: {committed_steps()}", flush=True)
            losses = read_losses(job.metrics)
            phase = Phase("kill", 2, losses, reference, wall_s(job), what, step)
            return phase, max(committed_steps())
        print(f"  the signal came too late: {saved} was already committed", flush=True)
    raise DemoError(
        f"{KILL_TRIES} tries, and each time the save was committed before the signal came"
    )


def kill_during_save(job: Job) -> str:
    """Kill one process as soon as its shard file of an uncommitted save exists."""
    deadline_s = time.monotonic() + JOB_TIMEOUT_S
    while job.processes[0].poll() is None and time.monotonic() < deadline_s:
        for attempt in sorted(STORE.glob("step-*")):
            files = list(attempt.glob(f"rank-{KILLED_PROCESS:05d}.*.shard"))
            if not files or step_of(attempt.name) < KILL_FROM_STEP:
                continue
            if attempt.name not in committed_attempts():
                job.processes[KILLED_PROCESS].send_signal(signal.SIGKILL)
                return attempt.name
        time.sleep(0.0005)
    return fail(job, f"it ended before process {KILLED_PROCESS} could be killed in a save")


def run_resumed(
    name: str, place: Place, stop: int, committed: int, reference: dict[int, float]
) -> Phase:
    """Start the job again and let it train up to `stop` steps in all.

    Raises:
        DemoError: The job failed, restored another step, or trained others.
    """
    announce(name, f"the same command on {place}, to step {stop - 1}")
    with started(name, place, "--stop-step", str(stop)) as job:
        finish(job)
    restored = re.search(r"restored step (\d+) .*", job.log.read_text())
    losses = read_losses(job.metrics)
    if restored is None or int(restored[1]) != committed:
        fail(job, f"it should have restored step {committed}, but said {restored and restored[0]}")
    if sorted(losses) != list(range(committed + 1, stop)):
        fail(job, f"it should have trained steps {committed + 1} to {stop - 1}")
    print(f"  {restored[0]}", flush=True)
    return Phase(name, place.processes, losses, reference, wall_s(job), f"on {place}", None)


def committed_entries() -> list[dict[str, object]]:
    """Return the live steps in the newest root of the commit log (docs/FORMAT.md)."""
    roots = sorted(STORE.glob("roots/*.json"))
    return list(json.loads(roots[-1].read_bytes())["body"]["live"]) if roots else []


def committed_attempts() -> set[str]:
    """Return the directories of all committed steps."""
    return {str(entry["attempt"]) for entry in committed_entries()}


def committed_steps() -> list[int]:
    """Return all committed steps."""
    return sorted(int(str(entry["step"])) for entry in committed_entries())


def step_of(attempt: str) -> int:
    """Return the step of an attempt's directory."""
    return int(attempt.split(".")[0].removeprefix("step-"))


@contextmanager
def started(name: str, place: Place, *arguments: str) -> Iterator[Job]:
    """Start every process of `train.py`; when the block is left, stop those that still run.

    Yields:
        The job under way.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = OUTPUT / f"{name}.jsonl"
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    processes: list[subprocess.Popen[bytes]] = []
    for number in range(place.processes):
        command = (
            *(sys.executable, str(_TRAIN), *_ARGUMENTS, "--metrics", str(metrics)),
            *("--devices", str(place.devices), "--model", str(place.model), "--port", str(port)),
            *("--processes", str(place.processes), "--process", str(number), *arguments),
        )
        with (OUTPUT / f"{name}-{number}.log").open("wb") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            )
    try:
        yield Job(name, processes, metrics, time.monotonic())
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait(job: Job, number: int) -> int:
    """Wait for a process of the job and return its exit status."""
    try:
        return job.processes[number].wait(JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return fail(job, f"process {number} did not end within {JOB_TIMEOUT_S:g} s")


def finish(job: Job) -> None:
    """Wait for all processes, which must succeed."""
    for number in range(len(job.processes)):
        status = wait(job, number)
        if status:
            fail(job, f"process {number} ended with status {status}")


def fail(job: Job, why: str) -> NoReturn:
    """Raise with the end of the job's logs.

    Raises:
        DemoError: Always.
    """
    logs = sorted(OUTPUT.glob(f"{job.name}-*.log"))
    tails = "\n".join(
        f"--- {log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        for log in logs
    )
    raise DemoError(f"phase {job.name}: {why}\n{tails}")


def wall_s(job: Job) -> float:
    """Return the seconds since the job was started, its own start-up included."""
    return time.monotonic() - job.started_s


def announce(name: str, what: str) -> None:
    """Say which phase begins."""
    print(f"[{name}] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
