"""Kill a training job in the middle of a save, resume it on 2, 3 and 1 ranks, compare all losses.

    python examples/torch_fsdp/demo.py        # or: make demo; about two minutes on 2 CPU cores

What it shows, with `train.py` started by torchrun like any other job:

1. A reference: 2 ranks train to the end, uninterrupted and without checkpoints.
2. The same job with checkpoints. While a save is being written, rank 1 is killed with SIGKILL: its
   shard file exists, the save is not committed. The job dies.
3. It is started again, on 2 ranks, and resumes from the newest committed step by itself. Every loss
   must equal the reference bit for bit.
4. It goes on with 3 ranks, then with 1. Every loss must be within 1e-5 of the reference.

Prints a timeline and writes the losses as a picture to `demo-output/` in the current directory,
beside the log of every job. Exits with 1 if anything is not as promised.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from report import Phase, count, draw, read_losses, timeline

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS: Final = 80
SAVE_EVERY: Final = 10
KILL_FROM_STEP: Final = 30
KILLED_RANK: Final = 1
KILL_TRIES: Final = 3
JOB_TIMEOUT_S: Final = 300.0
OUTPUT: Final = Path("demo-output")
STORE: Final = OUTPUT / "ckpt"
_TRAIN: Final = Path(__file__).with_name("train.py")
_ARGUMENTS: Final = (
    *("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--ckpt", str(STORE)),
    *("--layers", "4", "--width", "256", "--heads", "4", "--context", "32", "--global-batch", "24"),
)


class DemoError(Exception):
    """Something the demo promises did not happen; the message says what."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A rank killed in the middle of a save.

    Attributes:
        attempt: Directory of the save that was under way.
        file: The killed rank's shard file in it, below the store.
    """

    attempt: str
    file: str

    @property
    def step(self) -> int:
        """The step that was being saved."""
        return int(self.attempt.split(".")[0].removeprefix("step-"))


@dataclass(frozen=True, slots=True)
class Job:
    """A training job under way."""

    name: str
    ranks: int
    process: subprocess.Popen[bytes]
    log: Path
    metrics: Path
    started_s: float

    def said(self, pattern: str) -> re.Match[str] | None:
        """Return the first match of `pattern` in what the job printed so far."""
        return re.search(pattern, self.log.read_text(errors="replace"))


def main() -> int:
    """Run the demo; return the exit status."""
    started_s = time.monotonic()
    clean_output()
    try:
        phases = run_phases()
    except DemoError as error:
        print(f"\nDEMO FAILED: {error}", file=sys.stderr)
        return 1
    picture = draw(phases, OUTPUT / "loss.png")
    print("\n" + timeline(phases))
    print(f"\nlosses, drawn: {picture.resolve()}\nlogs:          {OUTPUT.resolve()}/*.log")
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


def clean_output() -> None:
    """Remove what an earlier demo left, and nothing else."""
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / ".gitignore").write_text("*\n")
    shutil.rmtree(STORE, ignore_errors=True)
    for path in (*OUTPUT.glob("*.log"), *OUTPUT.glob("*.jsonl"), *OUTPUT.glob("loss.png")):
        path.unlink()


def run_phases() -> list[Phase]:
    """Run every phase and return what happened."""
    phases = [run_reference()]
    reference = phases[0].losses
    killed, kill = run_until_killed(reference)
    phases.append(killed)
    committed = max(step for step in committed_steps(STORE) if step < kill.step)
    for name, ranks, stop in (("resume", 2, 45), ("grow", 3, 65), ("shrink", 1, STEPS)):
        phase = run_resumed(
            name, ranks, stop, expected=(committed, phases[-1].ranks), reference=reference
        )
        phases.append(phase)
        committed = stop - 1
    return phases


def run_reference() -> Phase:
    """Train to the end on 2 ranks, with no interruption and no checkpoint."""
    announce("reference", f"2 ranks train {STEPS} steps, uninterrupted, without checkpoints")
    with started("reference", 2, "--no-checkpoint") as job:
        finish(job)
    losses = read_losses(job.metrics)
    return Phase("reference", 2, losses, losses, wall_s(job), "uninterrupted, no checkpoints", None)


def run_until_killed(reference: dict[int, float]) -> tuple[Phase, Kill]:
    """Train on 2 ranks and kill one in the middle of a save; return the phase and the kill.

    A save takes a fraction of a second, so the signal may come too late: then the save was
    committed all the same, nothing was interrupted, and the phase is run again from nothing.

    Raises:
        DemoError: The job ended by itself, survived, or was never hit in the middle of a save.
    """
    for attempt in range(1, KILL_TRIES + 1):
        shutil.rmtree(STORE, ignore_errors=True)
        announce(
            "kill",
            f"2 ranks train and checkpoint; rank {KILLED_RANK} dies in a save (try {attempt})",
        )
        with started(f"kill-{attempt}", 2) as job:
            kill = kill_during_save(job)
            if wait(job) == 0:
                raise DemoError(
                    f"rank {KILLED_RANK} was killed, yet the job ended well; see {job.log}"
                )
        if kill.attempt not in committed_attempts(STORE):
            what = f"rank {KILLED_RANK} killed (SIGKILL) while step {kill.step} was being saved"
            print(f"  {what}:\n  its {kill.file} exists, but no root names it")
            print(
                f"  the job failed; committed steps: {sorted(committed_steps(STORE))}", flush=True
            )
            losses = read_losses(job.metrics)
            return Phase("kill", 2, losses, reference, wall_s(job), what, kill.step), kill
        print(f"  the signal came too late: step {kill.step} was already committed", flush=True)
    raise DemoError(
        f"{KILL_TRIES} tries, and each time the save was committed before the signal came"
    )


def run_resumed(
    name: str, ranks: int, stop: int, *, expected: tuple[int, int], reference: dict[int, float]
) -> Phase:
    """Start the job again on `ranks` ranks and let it train up to `stop` steps in all.

    Args:
        name: Name of the phase.
        ranks: Ranks to run on.
        stop: Steps of the whole job after which to leave.
        expected: Step it must restore and the number of ranks that saved it.
        reference: Losses of the uninterrupted run, by step.

    Raises:
        DemoError: The job failed, or restored another step.
    """
    announce(name, f"the same command on {count(ranks)}, to step {stop - 1}")
    with started(name, ranks, "--stop-step", str(stop)) as job:
        finish(job)
    restored = job.said(r"restored step (\d+) saved on (\d+) ranks?, now (\d+) ranks?")
    wanted = (*expected, ranks)
    if restored is None or tuple(map(int, restored.groups())) != wanted:
        said = restored[0] if restored else "that it restored nothing"
        raise DemoError(
            f"phase {name} should have restored step {wanted[0]} saved on {count(wanted[1])}, "
            f"but the job said {said!r}\n{tail(job.log)}"
        )
    print(f"  {restored[0]}", flush=True)
    losses = read_losses(job.metrics)
    if sorted(losses) != list(range(expected[0] + 1, stop)):
        raise DemoError(
            f"phase {name} should have trained steps {expected[0] + 1} to {stop - 1}; "
            f"{job.metrics} holds {sorted(losses)}"
        )
    return Phase(name, ranks, losses, reference, wall_s(job), restored[0], None)


def kill_during_save(job: Job) -> Kill:
    """Kill one rank as soon as its shard file of an uncommitted save exists."""
    deadline_s = time.monotonic() + JOB_TIMEOUT_S
    while job.process.poll() is None and time.monotonic() < deadline_s:
        for attempt in sorted(STORE.glob("step-*")):
            files = [
                path for path in attempt.rglob("*.shard") if f"{KILLED_RANK:05d}." in path.name
            ]
            kill = Kill(attempt.name, "")
            if not files or kill.step < KILL_FROM_STEP or attempt.name in committed_attempts(STORE):
                continue
            os.kill(process_of_rank(job, KILLED_RANK), signal.SIGKILL)
            return Kill(attempt.name, str(files[0].relative_to(STORE)))
        # A save lasts tens of milliseconds; looking every half millisecond does not miss it.
        time.sleep(0.0005)
    return fail(job, f"it ended before rank {KILLED_RANK} could be killed in a save")


def committed_entries(store: Path) -> list[dict[str, object]]:
    """Return the live steps in the newest root of the commit log (docs/FORMAT.md)."""
    roots = sorted(store.glob("roots/*.json"))
    return list(json.loads(roots[-1].read_bytes())["body"]["live"]) if roots else []


def committed_attempts(store: Path) -> set[str]:
    """Return the directories of all committed steps."""
    return {str(entry["attempt"]) for entry in committed_entries(store)}


def committed_steps(store: Path) -> set[int]:
    """Return all committed steps."""
    return {int(str(entry["step"])) for entry in committed_entries(store)}


def process_of_rank(job: Job, rank: int) -> int:
    """Return the process id that this rank of the job printed when it started."""
    match = job.said(rf"rank {rank} of \d+ is process (\d+)")
    return int(match[1]) if match else fail(job, f"rank {rank} never printed its process id")


@contextmanager
def started(name: str, ranks: int, *arguments: str) -> Iterator[Job]:
    """Start `train.py` under torchrun; when the block is left early, stop it and all its ranks.

    Yields:
        The job under way.
    """
    log, metrics = OUTPUT / f"{name}.log", OUTPUT / f"{name}.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    command = [
        sys.executable,
        *launcher,
        str(_TRAIN),
        *_ARGUMENTS,
        "--metrics",
        str(metrics),
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        yield Job(name, ranks, process, log, metrics, time.monotonic())
    finally:
        if process.poll() is None:
            # torchrun passes SIGTERM on to its ranks and kills what is left after 30 s.
            process.terminate()
            process.wait()


def wait(job: Job) -> int:
    """Wait for the job and return its exit status."""
    try:
        return job.process.wait(JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return fail(job, f"it did not end within {JOB_TIMEOUT_S:g} s")


def finish(job: Job) -> None:
    """Wait for the job, which must succeed."""
    status = wait(job)
    if status:
        fail(job, f"it ended with status {status}")


def fail(job: Job, why: str) -> NoReturn:
    """Raise with the end of the job's log.

    Raises:
        DemoError: Always.
    """
    raise DemoError(
        f"phase {job.name} on {count(job.ranks)}: {why}. From {job.log}:\n{tail(job.log)}"
    )


def tail(log: Path, lines: int = 40) -> str:
    """Return what the ranks said last, indented; not what torchrun says about them."""
    text = log.read_text(errors="replace").splitlines()
    ends = (at for at, line in enumerate(text) if re.match(r"[EW]\d+ .*/elastic/", line))
    said = text[: next(ends, len(text))]
    first = next((line for line in said if re.match(r"\[rank\d+\]: Traceback", line)), None)
    if first is not None:
        # Ranks fail one after the other and their lines mix; the first one holds the cause.
        said = [line for line in said if line.startswith(first.split(" ")[0])]
    return "\n".join("    " + line for line in said[-lines:])


def wall_s(job: Job) -> float:
    """Return the seconds since the job was started, its own start-up included."""
    return time.monotonic() - job.started_s


def announce(name: str, what: str) -> None:
    """Say which phase begins."""
    print(f"[{name}] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
