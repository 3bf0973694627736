"""`save_every=Auto()` in a training loop, with the real clock and the real disk."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from pathlib import Path


def test_a_training_loop_saves_by_itself_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from shardckpt import Auto
    from shardckpt.torch import Checkpointer

    caplog.set_level(logging.INFO, "shardckpt")
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = []
    # A job that fails every 2 s: worth a save at every few steps.
    rule = Auto(mtbf_s=2, max_overhead=0.9, restart_s=0)
    with Checkpointer(tmp_path, save_every=rule) as checkpointer:
        for step in range(80):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            time.sleep(0.01)
            if checkpointer.should_save(step):
                checkpointer.save(step, {"model": model, "optimizer": optimizer})
                saved.append(step)
        checkpointer.fence()
    assert saved[0] == 4
    assert len(saved) >= 3
    reasons = [r.getMessage() for r in caplog.records if "saving at every" in r.getMessage()]
    assert reasons
    assert "failures come every 2 s (given)" in reasons[0]
    caplog.clear()
    with Checkpointer(tmp_path, save_every=rule) as checkpointer:
        restored = checkpointer.restore({"model": model, "optimizer": optimizer})
        assert restored is not None
        assert not any("save_" in line for line in restored.differences)
        for step in range(8):
            assert not checkpointer.should_save(step) or step > 4
            time.sleep(0.01)
    # It chose before it saved, by what the job before had learned.
    assert any("saving at every" in r.getMessage() for r in caplog.records)
