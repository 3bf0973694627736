"""Eight CPU devices for every test here, and rank functions that spawned children can import."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
    os.environ.pop(_name, None)
sys.path.insert(0, str(Path(__file__).parent))

jax = pytest.importorskip("jax")
jax.config.update("jax_num_cpu_devices", 8)

from shardckpt.jax import Checkpointer, Restored  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def round_trip(tmp_path: Path) -> Callable[..., Restored]:
    """Return a function that saves its first state and restores its second one from it."""
    numbers = itertools.count()

    def run(source: dict[str, Any], target: dict[str, Any], **options: Any) -> Restored:
        with Checkpointer(tmp_path / str(next(numbers)), timeout_s=30) as checkpointer:
            checkpointer.save(1, source)
            restored = checkpointer.restore(target, **options)
        assert restored is not None
        return restored

    return run
