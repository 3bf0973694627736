"""The door to CUDA on machines without it; csrc/tests has the rest, on a driver of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shardckpt import native, pure


def run_python(code: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif(not native.IS_NATIVE, reason="the extension looks for drivers")
def test_a_driver_that_is_missing_is_told_and_is_no_error_until_it_is_needed() -> None:
    code = (
        "from shardckpt import native\n"
        "print(native.cuda_probe())\n"
        "try: native.device_stage(0, 1 << 25, 1)\n"
        "except RuntimeError as error: print(error)\n"
    )
    probed, refused = run_python(code, SHARDCKPT_LIBCUDA="/nowhere/libcuda.so.1")
    assert probed.startswith("(0, 0, 'the CUDA driver /nowhere/libcuda.so.1 cannot be loaded")
    assert refused.startswith("the CUDA driver /nowhere/libcuda.so.1 cannot be loaded")


def test_importing_it_looks_for_no_driver() -> None:
    code = "import shardckpt.native\nprint('libcuda' in open('/proc/self/maps').read())\n"
    assert run_python(code) == ["False"]


def test_the_pure_path_says_that_it_has_no_cuda() -> None:
    assert pure.cuda_probe()[:2] == (0, 0)
    with pytest.raises(RuntimeError, match="need the compiled extension"):
        pure.DeviceStage(0, 1 << 25, 1)
