"""The scripts beside what else there is: they run, and their arithmetic is right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Return what a Python ended with that was started with these words."""
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def script(name: str) -> str:
    return str(BENCHMARKS / f"{name}.py")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_goodput_is_that_of_a_hand_computed_case(module: Any) -> None:
    goodput = module("goodput")
    job = goodput.Job(step_s=2.0, durable_s=5.0, restart_s=70.0, mtbf_s=1000.0)
    # 20 s of use in a cycle of 25 s. A failure costs 12.5 + 5 + 70 = 87.5 s, and there are 0.025
    # failures in a cycle: 2.1875 s. So 20 of 27.1875 s are useful.
    assert goodput.goodput(job, 10, 5.0) == pytest.approx(20 / 27.1875)


def test_the_best_interval_is_near_the_square_root_of_twice_cost_times_mtbf(module: Any) -> None:
    goodput = module("goodput")
    job = goodput.Job(step_s=1.0, durable_s=0.0, restart_s=0.0, mtbf_s=100_000.0)
    interval, share = goodput.best(job, {1: 2.0})
    assert interval == pytest.approx((2 * 2.0 * 100_000) ** 0.5, rel=0.02)
    assert share == goodput.goodput(job, interval, 2.0)
    cheap, better = goodput.best(job, {1: 0.02})
    assert cheap < interval
    assert better > share


def test_the_cost_between_measured_intervals_lies_on_a_line_over_the_logarithm(module: Any) -> None:
    goodput = module("goodput")
    costs = {1: 3.0, 100: 1.0}
    assert goodput.cost_at(costs, 1) == 3.0
    assert goodput.cost_at(costs, 10) == pytest.approx(2.0)
    assert goodput.cost_at(costs, 5000) == 1.0


def test_steps_under_a_save_are_judged_by_those_around_on_the_slowest_rank(module: Any) -> None:
    runs = module("overhead_runs")

    def rank(longer_s: float, stall_s: float, pace: float) -> dict[Any, Any]:
        saves = [
            runs.Save(0.1, stall_s - 0.1, 2, 0.0, 2.0, 2), runs.Save(0.0, stall_s, 7, 0.0, 2.0, 2)
        ]  # fmt: skip
        # In the second half the machine is slower, which no save is to blame for.
        idle = [runs.Run(5, [1.0] * 5, 5.0), runs.Run(5, [pace] * 5, 5.0)]
        steps_s = [1.0] * 10
        for at, part in ((2, 0.6), (3, 0.4), (7, 0.6), (8, 0.4)):
            steps_s[at] += part * longer_s
        run = runs.Run(10, steps_s, sum(steps_s), 0.5, saves)
        return {(0, 5, runs.NONE): idle, (0, 5, "x"): [run]}

    judged = runs.judge([rank(0.5, 0.2, 1.4), rank(1.0, 0.3, 1.4)], ["x"])
    found = judged.found["x"][5]
    assert judged.step_s == pytest.approx(1.0)
    assert judged.noise == 0.0
    assert found.overheads == [pytest.approx(0.2)]
    assert found.loop_overheads == [pytest.approx(0.0)]
    assert found.costs_s == [pytest.approx(1.0)]
    assert found.stalls_s == [pytest.approx(0.3), pytest.approx(0.3)]


@pytest.mark.parametrize("name", ["overhead_vs_frequency", "peers"])
def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    done = run(script(name), "--gib", "1e6", "--sides", "torch", "--directory", str(tmp_path))
    assert done.returncode == 2
    assert "bytes are needed in" in done.stderr
    assert "are free" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["overhead_vs_frequency", "peers"])
def test_without_any_framework_it_says_what_to_install(tmp_path: Path, name: str) -> None:
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'jax')));"
        f"sys.argv = [{name!r}, '--directory', {str(tmp_path)!r}];"
        f"sys.path.insert(0, {str(BENCHMARKS)!r});"
        f"runpy.run_path({script(name)!r}, run_name='__main__')"
    )
    done = run("-c", code)
    assert done.returncode == 2, done.stderr
    assert "torch: not installed: pip install torch" in done.stdout
    assert "jax: not installed: pip install jax" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_costs_in_the_readme_are_those_of_the_results(module: Any) -> None:
    readme = (BENCHMARKS.parent / "README.md").read_text()
    path = BENCHMARKS / "results" / "overhead_vs_frequency.json"
    results = json.loads(path.read_text()) if path.exists() else None
    assert module("report").with_costs(readme, results) == readme


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(300)
@pytest.mark.parametrize("side", ["torch", "jax"])
def test_overhead_has_a_figure_and_pictures_for_every_system(tmp_path: Path, side: str) -> None:
    needed = {"torch": ("torch",), "jax": ("jax", "optax", "grain", "orbax.checkpoint")}[side]
    for name in ("matplotlib", *needed):
        pytest.importorskip(name)
    path = tmp_path / "results" / "overhead_vs_frequency.json"
    done = run(
        script("overhead_vs_frequency"), "--quick", "--sides", side,
        "--directory", str(tmp_path), "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    systems = result["series"][side]["systems"]
    assert result["facts"]["cannot run here"] == {}
    assert set(systems) > {"shardckpt"}
    for name, system in systems.items():
        assert set(system["intervals"]) == {"1", "5"}, name
        assert all(s > 0 for s in system["intervals"]["1"]["stalls_s"]), name
        assert system["restore_s"] > 0, name
        assert f"{side}_best_interval_steps, {name}" in result["figures"]
    for picture in ("overhead_vs_frequency", "goodput_vs_frequency"):
        for kind in ("svg", "png"):
            assert (path.parent / f"{picture}.{kind}").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_the_page_of_peers_has_a_row_for_every_system_or_a_reason(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "results" / "peers.json"
    done = run(
        script("peers"), "--quick", "--sides", "torch", "--directory", str(tmp_path),
        "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = path.with_suffix(".md").read_text()
    ran = json.loads(path.read_text())["series"]["torch"]["seconds"]
    assert {"shardckpt", "dcp.save", "torch.save, file per rank"} <= set(ran)
    told = [*(f"| {name} | " for name in ran)]
    told += [f"- torch: {name}: " for name in _every_torch_peer() if name not in ran]
    for line in told:
        assert line in page, line


def _every_torch_peer() -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import peers_torch as p;"
    done = run("-c", code + "print(*p.NAMES, sep='\\n')")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
