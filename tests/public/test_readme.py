"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import shardckpt
from shardckpt.cli.main import run

if TYPE_CHECKING:
    import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_example_of_the_readme_saves_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)

    def train(model: torch.nn.Module, num_steps: int) -> int:
        opt = torch.optim.AdamW(model.parameters())
        sched = torch.optim.lr_scheduler.StepLR(opt, 100)
        seen: list[int] = []

        def train_one(step: int) -> float:
            seen.append(step)
            model(torch.ones(1, 3)).sum().backward()
            opt.step()
            sched.step()
            return 1.0 / (step + 1)

        exec(
            blocks[0],
            {
                "model": model,
                "opt": opt,
                "sched": sched,
                "train_one": train_one,
                "num_steps": num_steps,
            },
        )
        return seen[0]

    assert train(torch.nn.Linear(3, 2), 601) == 0
    again = torch.nn.Linear(3, 2)
    assert train(again, 510) == 501
    assert run(["list", "runs/llama/ckpt"]) == 0
    assert "val_loss=0.00199601" in capsys.readouterr().out


def test_every_public_name_exists_and_is_documented() -> None:
    for name in shardckpt.__all__:
        assert getattr(shardckpt, name).__doc__, name
