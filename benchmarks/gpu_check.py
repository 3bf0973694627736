"""CUDA staging on this machine's GPU: the C++ scenarios, and the figures that they rest on.

Without a GPU the scenarios run on the fake driver alone, and the result says so.

`python benchmarks/gpu_check.py [--state-gib 3] [--core-tests DIRECTORY]`
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
from array import array
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch
from harness import GIB, MIB, Report, arguments, say, timed

from shardckpt import native

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardckpt.native import DeviceStage

REPOSITORY: Final = Path(__file__).parents[1]
PIECE_BYTES: Final = 32 * MIB
TIMEOUT_MS: Final = 60_000
REPEATS: Final = 5
STEPS: Final = 8
ITEMS: Final = 400


def main() -> int:
    """Run what this machine has the parts for."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--state-gib", type=float, default=3, help="parameters and optimizer state")
    parser.add_argument("--core-tests", type=Path, help="where core_tests is built already")
    told = parser.parse_args()
    report = Report("gpu_check")
    version, num_devices, problem = native.cuda_probe()
    report.facts |= {"cuda_driver": version, "cuda_devices": num_devices, "cuda_problem": problem}
    programs = told.core_tests or build_core_tests()
    report.add("failures_on_the_fake_driver", failures(programs / "core_tests"), at_most=0)
    report.add("seeded_mistakes_unnoticed", failures(programs / "core_mistakes"), at_most=0)
    if num_devices == 0 or not torch.cuda.is_available():
        say("no CUDA device to measure: " + (problem or "the driver or torch sees none"))
        return report.finish(told)
    report.facts["gpu"] = torch.cuda.get_device_name(0)
    real = failures(programs / "core_tests", SHARDCKPT_TEST_CUDA="real")
    report.add("failures_on_the_real_driver", real, at_most=0)
    measure_copies(report)
    measure_items(report)
    measure_reserve(report)
    measure_steps(report, int(told.state_gib * GIB))
    return report.finish(told)


def build_core_tests() -> Path:
    """Build the C++ tests beside the repository's other builds, and return where."""
    build = REPOSITORY / "build" / "gpu-check"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        raise RuntimeError("no cmake to build core_tests with; install it or pass --core-tests.")
    options = ["-DSHARDCKPT_PYTHON=OFF", "-DSHARDCKPT_TESTS=ON"]
    for command in (
        [cmake, "-S", str(REPOSITORY / "csrc"), "-B", str(build), *options],
        [cmake, "--build", str(build), "-j", str(os.cpu_count())],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return build


def failures(program: Path, **environment: str) -> int:
    """Run the CUDA tests of a C++ test program and return how many expectations failed."""
    names = ["Cuda"] if program.name == "core_tests" else []
    result = subprocess.run(
        [program, *names],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    say(result.stdout + result.stderr)
    counted = re.search(r"(\d+) tests, (\d+) failures", result.stdout)
    if counted is None or int(counted.group(1)) == 0:
        raise RuntimeError(f"{program.name} did not end; exit status {result.returncode}.")
    return int(counted.group(2))


class HostMemory:
    """Anonymous memory in huge pages, touched."""

    def __init__(self, nbytes: int) -> None:
        """Map and touch it."""
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self.nbytes = nbytes
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensor.fill_(1)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


@contextmanager
def staging(memory: HostMemory, piece_bytes: int, num_in_flight: int) -> Iterator[DeviceStage]:
    """Give a stage of device 0 with pinned memory."""
    stage = native.device_stage(0, piece_bytes, num_in_flight)
    stage.pin(memory.address, memory.nbytes)
    try:
        yield stage
    finally:
        stage.wait(TIMEOUT_MS)
        stage.unpin(memory.address)
        stage.close(TIMEOUT_MS)


def rows_of(tensors: Sequence[torch.Tensor], memory: HostMemory) -> array[int]:
    """Return copies of the tensors, one behind the other in host memory."""
    rows: array[int] = array("q")
    at = memory.address
    for tensor in tensors:
        rows.extend((at, tensor.data_ptr(), tensor.nbytes))
        at += tensor.nbytes
    return rows


def stream() -> int:
    """Return the handle of the stream that torch computes on."""
    return int(torch.cuda.current_stream().cuda_stream)


def measure_copies(report: Report) -> None:
    """Bytes per second by size of a piece, one and two in flight, and all at once."""
    source = torch.ones(GIB, dtype=torch.uint8, device="cuda")
    memory = HostMemory(GIB)
    rows = rows_of([source], memory)

    def gb_per_s(stage: DeviceStage, *, is_burst: bool) -> float:
        def copy() -> None:
            stage.after(stream())
            stage.add(rows)
            if is_burst:
                stage.fence(stream())
            stage.wait(TIMEOUT_MS)

        torch.cuda.synchronize()
        copy()
        return statistics.median(source.nbytes / timed(copy) / 1e9 for _ in range(REPEATS))

    by_size: dict[tuple[int, int], float] = {}
    for num_in_flight in (1, 2):
        for piece_mib in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            with staging(memory, piece_mib * MIB, num_in_flight) as stage:
                speed = gb_per_s(stage, is_burst=False)
            by_size[piece_mib, num_in_flight] = speed
            report.add(f"to_host_{piece_mib}_mib_{num_in_flight}_in_flight_gb_per_s", speed)
    with staging(memory, PIECE_BYTES, 1) as stage:
        burst = gb_per_s(stage, is_burst=True)
    report.add("to_host_burst_gb_per_s", burst)
    report.add("paced_of_burst", by_size[32, 1] / burst, at_least=0.9)


def measure_items(report: Report) -> None:
    """How long the trainer's own `.item()` takes: idle, beside paced copies, beside a burst."""
    source = torch.ones(4 * GIB, dtype=torch.uint8, device="cuda")
    memory = HostMemory(4 * GIB)
    rows = rows_of([source], memory)
    value = torch.zeros((), device="cuda")
    # Held back in place of the stream that `.item()` runs on.
    beside = torch.cuda.Stream()

    def item() -> float:
        value.add_(1)
        torch.cuda.current_stream().synchronize()
        return timed(value.item) * 1e6

    def during(stage: DeviceStage, *, is_burst: bool) -> list[float]:
        seen: list[float] = []
        while len(seen) < ITEMS:
            stage.after(stream())
            stage.add(rows)
            if is_burst:
                stage.fence(beside.cuda_stream)
            while True:
                seen.append(item())
                try:
                    stage.wait(0)
                except TimeoutError:
                    continue
                break
        return seen

    def tell(name: str, seen: list[float]) -> float:
        cuts = statistics.quantiles(seen, n=100)
        report.add(f"item_{name}_p50_us", cuts[49])
        report.add(f"item_{name}_p99_us", cuts[98])
        return cuts[98]

    tell("idle", [item() for _ in range(ITEMS)])
    with staging(memory, PIECE_BYTES, 1) as stage:
        paced = tell("paced", during(stage, is_burst=False))
        burst = tell("burst", during(stage, is_burst=True))
    report.add("item_p99_paced_of_burst", paced / burst)


def measure_reserve(report: Report) -> None:
    """Seconds per GiB to get pinned memory: the driver's own, and touched huge pages registered."""
    report.add(
        "reserve_host_alloc_s_per_gib",
        timed(lambda: torch.empty(GIB, dtype=torch.uint8, pin_memory=True)),
    )
    stage = native.device_stage(0, PIECE_BYTES, 1)
    started = perf_counter()
    memory = HostMemory(GIB)
    stage.pin(memory.address, memory.nbytes)
    report.add("reserve_registered_s_per_gib", perf_counter() - started)
    stage.unpin(memory.address)
    stage.close(TIMEOUT_MS)


def measure_steps(report: Report, state_bytes: int) -> None:
    """Seconds of a training step without a save, with one that overlaps, with one that blocks."""
    width = 4096
    # Parameters and two moments, of four bytes each.
    num_layers = max(1, state_bytes // (12 * width * width))
    layers = [torch.nn.Linear(width, width, bias=False, device="cuda") for _ in range(num_layers)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(8192, width, device="cuda")

    def backward() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()

    backward()
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    tensors = [*(parameter.detach() for parameter in model.parameters()), *moments]
    memory = HostMemory(sum(tensor.nbytes for tensor in tensors))
    rows = rows_of(tensors, memory)
    fence_us: list[float] = []
    seconds: dict[str, list[float]] = {"none": [], "overlap": [], "block": []}
    num_torn = 0

    def step(stage: DeviceStage, mode: str) -> None:
        if mode != "none":
            stage.after(stream())
            stage.add(rows)
        if mode == "block":
            stage.wait(TIMEOUT_MS)
        backward()
        if mode == "overlap":
            fence_us.append(timed(lambda: stage.fence(stream())) * 1e6)
        optimizer.step()
        torch.cuda.synchronize()

    with staging(memory, PIECE_BYTES, 1) as stage:
        for _ in range(STEPS):
            for mode, times in seconds.items():
                before = tensors[-1].clone()
                torch.cuda.synchronize()
                started = perf_counter()
                step(stage, mode)
                times.append(perf_counter() - started)
                if mode == "none":
                    continue
                stage.wait(TIMEOUT_MS)
                staged = memory.tensor[-before.nbytes :].view(before.dtype).reshape(before.shape)
                num_torn += not torch.equal(staged, before.cpu())
    report.facts["state_gib"] = round(memory.nbytes / GIB, 2)
    for mode, times in seconds.items():
        report.add(f"step_{mode}_s", statistics.median(times))
    base = statistics.median(seconds["none"])
    report.add("step_overlap_of_none", statistics.median(seconds["overlap"]) / base)
    report.add("step_block_of_none", statistics.median(seconds["block"]) / base)
    report.add("fence_host_us", statistics.median(fence_us))
    report.add("torn_copies", num_torn, at_most=0)


if __name__ == "__main__":
    sys.exit(main())
