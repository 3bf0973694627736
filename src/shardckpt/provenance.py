"""Where a checkpoint came from: who writes it, with which versions, from which commit.

Layer: provenance (with backend). For people and messages only; nothing is decided by it.
"""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def environment_facts(versions: Mapping[str, str], world_size: int) -> dict[str, str]:
    """Return what explains a saved state later: versions, world size, git commit."""
    facts = {"python": platform.python_version(), "world_size": str(world_size), **versions}
    commit = _git_commit(os.getcwd())
    if commit:
        facts["git_commit"] = commit
    return facts


def writer_name() -> str:
    """Return user, machine and process, as other jobs' errors name this one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()} (pid {os.getpid()})"


@cache
def _git_commit(directory: str) -> str:
    """Return the commit that is checked out; asked once, since a load is timed in milliseconds."""
    try:
        done = subprocess.run(
            ["git", "-C", directory, "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=2.0, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
