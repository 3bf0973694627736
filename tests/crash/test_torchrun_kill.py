"""SIGKILL under torchrun: the job fails, and another world size goes on from the newest step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch")

_JOB = Path(__file__).with_name("torchrun_job.py")
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Run:
    """One start of the job.

    Attributes:
        world_size: Ranks.
        victim: The rank that kills itself in its second save; -1 for none.
        op: The file operation at which it does.
        path: Of which files.
        when: Before, half-way through or after it.
        survives: Whether the killed save must be there all the same: its root was.
    """

    world_size: int
    victim: int
    op: str = "*"
    path: str = "*"
    when: str = "before"
    survives: bool = False


_RUNS = (
    Run(2, -1),
    Run(2, 1, "write_at", "*/rank-00001.0.shard", "half-way"),
    Run(3, 2, "fdatasync", "*/rank-00002.0.shard"),
    Run(2, 1, "fsync_dir", "*/step-*", "after"),
    Run(1, 0, "write_at", "*/rank-00000.0.shard"),
    Run(3, 0, "link", "*/MANIFEST.json"),
    Run(2, 0, "link", "*/roots/*"),
    Run(2, 0, "link", "*/roots/*", "after", survives=True),
    Run(3, 0, "unlink", "*/rank-*.shard", "after", survives=True),
    Run(1, -1),
)


@pytest.mark.crash
@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_restart_on_another_world_size_has_the_newest_committed_step(tmp_path: Path) -> None:
    """Each run restores what the one before left, bit for bit, and is killed at its own point."""
    acknowledged = tmp_path / "acknowledged"
    expected = 0
    for number, run in enumerate(_RUNS):
        done = _torchrun(tmp_path, number, run)
        words = f"run {number} ({run}):\n{done.stderr[-4000:]}"
        assert (done.returncode == 0) == (run.victim < 0), words
        if run.victim >= 0:
            assert f"Signal {int(signal.SIGKILL)}" in done.stderr, words
        step, digest = (tmp_path / f"restored-{number}").read_text().split()
        assert int(step) == expected, words
        if expected:
            assert digest == (tmp_path / f"saved-{step}").read_text(), words
        expected = int(step) + (2 if run.victim < 0 or run.survives else 1)
        assert int(acknowledged.read_text()) in (int(step) + 1, expected), words
    attempts = [name for name in os.listdir(tmp_path / "store") if name.startswith("step-")]
    assert len(attempts) == 2, attempts


def _torchrun(place: Path, number: int, run: Run) -> subprocess.CompletedProcess[str]:
    arguments = [str(place / "store"), str(place), number, run.victim, run.op, run.path, run.when]
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={run.world_size}", str(_JOB), *map(str, arguments),
        ],
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
