"""The benchmarks run, and their results have the shape that the report reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STALL_FIGURES = {
    f"{mode}_bound_{figure}"
    for mode in ("device", "compute")
    for figure in (
        "stall_median_ms", "stall_p99_ms", "stall_per_stall_of_best_dcp", "inflation_per_save_s",
        "inflation_per_inflation_of_best_dcp", "time_before_update_per_copy_time",
    )
} | {
    "device_bound_step_time_during_flush_per_undisturbed",
    "device_bound_cpu_s_per_rank_and_save",
    "stall_median_largest_less_smallest_over_sizes_ms",
}  # fmt: skip
DURABLE_FIGURES = {
    "save_gb_per_s_1_ranks", "load_cold_gb_per_s_1_ranks", "load_warm_gb_per_s_1_ranks",
    "load_warm_per_plain_read_1_ranks",
}  # fmt: skip


def run(script: str, *arguments: str) -> str:
    """Return the output of a benchmark script."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result_of(output: str, path: Path) -> dict[str, Any]:
    """Return the result, after looking at what all results have in common."""
    result: dict[str, Any] = json.loads(path.read_text())
    assert json.loads(output.splitlines()[-1]) == result
    assert {"cpu", "cores", "memory_gib", "torch", "shardckpt", "command"} <= set(result["facts"])
    for figure in result["figures"].values():
        assert set(figure) == {"value", "must", "ok"}
        assert isinstance(figure["value"], float)
        assert figure["must"] is None or figure["must"].startswith((">= ", "<= "))
    return result


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_results_have_every_figure_and_the_report_shows_them(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shared = ("--directory", str(tmp_path), "--json")
    path = results / "stall.json"
    stall = result_of(run("stall", "--quick", *shared, str(path)), path)
    assert set(stall["figures"]) == STALL_FIGURES
    assert set(stall["series"]["device shardckpt"]["parts_ms"]) == {
        "back-pressure", "save()", "fence", "dispatch",
    }  # fmt: skip
    assert len(stall["series"]["compute shardckpt"]["stall_ms"]) >= 2

    path = results / "durable.json"
    small = ("--gib", "0.1", "--rounds", "1", "--ranks", "1")
    durable = result_of(run("durable", *small, *shared, str(path)), path)
    assert set(durable["figures"]) >= DURABLE_FIGURES
    has_fio = isinstance(durable["facts"]["fio"], list)
    assert has_fio == ("save_per_fio_write_1_ranks" in durable["figures"])

    run("report", "--results", str(results))
    page = (results / "README.md").read_text()
    for result in (stall, durable):
        for name, figure in result["figures"].items():
            assert f"| {name} | {figure['value']:g} |" in page
    for picture in ("stall.svg", "steps.svg", "sizes.svg", "durable.svg"):
        assert f"]({picture})" in page
        assert (results / picture).stat().st_size > 0


def test_the_policy_is_judged_in_every_scenario(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    result = result_of(run("policy", "--quick", "--json", str(path)), path)
    assert len(result["figures"]) == len(result["series"]) == 6
    for scenario in result["series"].values():
        # Saving far too rarely loses more than the policy does, or nothing was simulated.
        assert 0 < scenario["policy"] < scenario["lost"][-1] < 1
    run("report", "--results", str(tmp_path))
    assert "](policy.svg)" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_jax_beside_orbax_has_a_figure_for_every_claim(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    path = tmp_path / "jax_peers.json"
    output = run(
        "jax_peers", "--quick", "--processes", "1", "--directory", str(tmp_path), "--json",
        str(path),
    )  # fmt: skip
    figures = result_of(output, path)["figures"]
    for what in ("stall", "inflation", "save_speed", "restore_other_mesh", "memory", "small"):
        assert any(what in name and figure["must"] for name, figure in figures.items()), what


@pytest.mark.timeout(120)
def test_scale_judges_every_bound_and_its_model_tells_every_outcome(tmp_path: Path) -> None:
    results = tmp_path / "results"
    path = results / "scale.json"
    output = run("scale", "--quick", "--directory", str(tmp_path), "--json", str(path))
    result = result_of(output, path)
    judged = {name for name, figure in result["figures"].items() if figure["must"]}
    for what in (
        "first_plan_of_a_rank_at", "steady_plan_of_a_rank_at", "commit_at_the_coordinator_at",
        "manifest_at", "first_plan_of_a_rank_exponent", "commit_at_the_coordinator_exponent",
        "load_plan_of_a_rank",
    ):  # fmt: skip
        assert any(name.startswith(what) for name in judged), what
    assert result["series"]["dcp"]
    for name, scenario in result["series"]["cluster"].items():
        assert len(scenario["outcomes"]) == 1, "ranks disagree"
        (words,) = scenario["outcomes"]
        if "dies" in name:
            assert words.startswith("DeadlineError")
            assert "no report from rank" in words
        elif "disk" in name:
            assert "no space left on device" in words
        else:
            assert words in ("committed", "restored")
    run("report", "--results", str(results))
    assert (results / "scale.svg").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(120)
def test_many_ranks_counts_what_real_processes_ask_of_their_store(tmp_path: Path) -> None:
    results = tmp_path / "results"
    path = results / "many_ranks.json"
    output = run("many_ranks", "--quick", "--directory", str(tmp_path), "--json", str(path))
    result = result_of(output, path)
    figure = result["figures"]["torch_operations_of_an_ordinary_rank_per_save"]
    assert figure["ok"]
    assert 4 <= figure["value"] <= 8
    run("report", "--results", str(results))
    assert (results / "many_ranks.svg").stat().st_size > 0
