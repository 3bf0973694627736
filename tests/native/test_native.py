"""The native and the pure path against each other, the published vectors and numpy."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import native, pure

if TYPE_CHECKING:
    from types import ModuleType

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "src" / "shardckpt"
CORE = REPOSITORY / "csrc" / "core"

both_paths = pytest.mark.parametrize("path", [native, pure], ids=["native", "pure"])


def address_of(data: npt.NDArray[np.uint8]) -> int:
    return int(data.ctypes.data)


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_extension_is_built_here_unless_the_pure_path_is_asked_for() -> None:
    assert (os.environ.get("SHARDCKPT_PURE_PYTHON", "") in ("", "0")) == native.IS_NATIVE


def test_the_pure_path_is_taken_when_asked_for() -> None:
    code = "from shardckpt import native; print(native.IS_NATIVE, native.crc32c(b'123456789'))"
    assert run_python(code, SHARDCKPT_PURE_PYTHON="1") == f"False {0xE3069283}"


@pytest.mark.skipif(not native.IS_NATIVE, reason="chooses among native paths")
def test_every_path_chosen_by_environment_gives_the_same_crc() -> None:
    code = (
        "from shardckpt import _native; "
        "print(_native.crc32c_path(), _native.crc32c(bytes(range(256)) * 40))"
    )
    expected = pure.crc32c(bytes(range(256)) * 40)
    chosen = {}
    for name in ("vpclmul", "sse42", "armv8", "table"):
        path, crc = run_python(code, SHARDCKPT_CRC=name).split()
        chosen[name] = path
        assert int(crc) == expected, f"{name} (took {path})"
    assert chosen["table"] == "table"


@both_paths
def test_crc_of_the_published_vectors(path: ModuleType) -> None:
    assert path.crc32c(b"123456789") == 0xE3069283
    assert path.crc32c(bytes(32)) == 0x8A9136AA
    assert path.crc32c(bytearray(b"\xff" * 32)) == 0x62A8AB43
    assert path.crc32c(memoryview(b"")) == 0
    assert path.crc32c(b"", 7) == 7


@given(data=st.binary(max_size=3000), cut=st.integers(0, 3000), initial=st.integers(0, 2**32 - 1))
def test_crc_is_equal_on_both_paths_and_continues_over_a_cut(
    data: bytes, cut: int, initial: int
) -> None:
    expected = pure.crc32c(data, initial)
    assert native.crc32c(data, initial) == expected
    assert native.crc32c(data[cut:], native.crc32c(data[:cut], initial)) == expected
    memory = np.frombuffer(data, np.uint8)
    assert native.crc32c_at(address_of(memory), len(data), initial) == expected
    assert pure.crc32c_at(address_of(memory), len(data), initial) == expected


@both_paths
def test_crc_of_a_buffer_with_gaps_is_refused(path: ModuleType) -> None:
    with pytest.raises(BufferError):
        path.crc32c(memoryview(b"abcdef")[::2])


@given(
    lengths=st.lists(st.integers(0, 700), max_size=6),
    offsets=st.lists(st.integers(0, 2**62), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    chunk_bytes=st.integers(1, 300),
)
def test_chunk_crcs_are_equal_on_both_paths_and_bound_to_seed_and_place(
    lengths: list[int], offsets: list[int], seed: int, chunk_bytes: int
) -> None:
    memory = np.arange(1000, dtype=np.uint32).view(np.uint8)
    rows = array("q")
    expected = b""
    for start, (nbytes, offset) in enumerate(zip(lengths, offsets, strict=False)):
        rows.extend((address_of(memory) + start, nbytes, offset))
        for at in range(0, nbytes, chunk_bytes):
            chunk = memory[start + at : start + min(at + chunk_bytes, nbytes)].tobytes()
            place = pure.crc32c((offset + at).to_bytes(8, "little"), seed)
            expected += (pure.crc32c(chunk) ^ place).to_bytes(4, "little")
    assert native.chunk_crcs(rows, seed, chunk_bytes) == expected
    assert pure.chunk_crcs(rows, seed, chunk_bytes) == expected


@both_paths
@pytest.mark.parametrize(
    ("rows", "chunk_bytes"),
    [
        ((1, 2), 64),
        ((4096, -1, 0), 64),
        ((4096, 1, -1), 64),
        ((0, 1, 0), 64),
        ((4096, 2**62, 2**62), 64),
        ((4096, 0, 0), 0),
    ],
)
def test_chunk_crcs_of_nonsense_are_refused(
    path: ModuleType, rows: tuple[int, ...], chunk_bytes: int
) -> None:
    with pytest.raises(ValueError, match="chunk_crcs"):
        path.chunk_crcs(array("q", rows), 0, chunk_bytes)


@both_paths
def test_rows_that_are_no_integers_are_refused(path: ModuleType) -> None:
    with pytest.raises(ValueError, match="64-bit integers"):
        path.chunk_crcs(array("d", (1.0, 2.0, 3.0)), 0, 64)
    with pytest.raises(ValueError, match="64-bit integers"):
        path.copy_rows(array("i", (1, 2, 3, 4)), 1)


def copy_row(target: npt.NDArray[np.generic], source: npt.NDArray[np.generic]) -> list[int]:
    """Return the table row that copies `source` into `target`."""
    assert target.shape == source.shape
    head = [target.ctypes.data, source.ctypes.data, source.itemsize, source.ndim]
    return [*head, *source.shape, *target.strides, *source.strides]


@st.composite
def strided_views(draw: st.DrawFn) -> tuple[list[int], str, list[tuple[list[int], list[int]]]]:
    """Draw a shape, a dtype, and for target and source the order of dims and a step for each."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(["u1", "<u2", "<f4", "<f8", "<c16", "V3"]))
    views = [
        (
            draw(st.permutations(range(len(shape)))),
            draw(st.lists(st.sampled_from([1, 2, -1, -3]), min_size=4, max_size=4)),
        )
        for _ in range(2)
    ]
    return shape, dtype, views


def strided(
    shape: list[int], dtype: str, view: tuple[list[int], list[int]], fill: int
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Return (whole memory, the view into it)."""
    order, steps = view
    stretched = [shape[dim] * abs(steps[dim]) for dim in order]
    nbytes = int(np.prod(stretched)) * np.dtype(dtype).itemsize
    memory = (np.arange(nbytes) * 7 + fill).astype(np.uint8)
    array_ = memory.view(dtype).reshape(stretched).transpose(np.argsort(order))
    return memory, array_[(..., *(slice(None, None, step) for step in steps[: len(shape)]))]


@given(case=strided_views(), num_threads=st.integers(1, 3))
def test_strided_copies_equal_numpy_on_both_paths_and_touch_nothing_else(
    case: tuple[list[int], str, list[tuple[list[int], list[int]]]], num_threads: int
) -> None:
    shape, dtype, (target_view, source_view) = case
    source = strided(shape, dtype, source_view, 1)[1]
    expected_memory, expected = strided(shape, dtype, target_view, 100)
    expected[...] = source
    for path in (native, pure):
        memory, target = strided(shape, dtype, target_view, 100)
        path.copy_rows(array("q", copy_row(target, source)), num_threads)
        assert memory.tobytes() == expected_memory.tobytes(), path.__name__


def test_a_table_of_large_and_small_rows_is_copied_whole_by_several_threads() -> None:
    random = np.random.default_rng(0)
    sources = [
        random.integers(0, 255, 11_000_003, np.uint8),
        random.integers(0, 255, (1501, 1003), np.uint8).T,
        random.random((3, 0)),
        np.array(1.5),
        np.broadcast_to(np.float32(2.5), (100,)),
    ]
    targets = [np.zeros(source.shape, source.dtype) for source in sources]
    rows = array("q")
    for target, source in zip(targets, sources, strict=True):
        rows.extend(copy_row(target, source))
    native.copy_rows(rows, 4)
    for target, source in zip(targets, sources, strict=True):
        np.testing.assert_array_equal(target, source)


TARGET = np.full(8, 1, np.uint8)
SOURCE = np.full(8, 2, np.uint8)
T, S = address_of(TARGET), address_of(SOURCE)


@both_paths
@pytest.mark.parametrize(
    "row",
    [
        (T,),
        (T, S, 8, 1, 1, 8),
        (T, S, 0, 0),
        (T, S, 8, -1),
        (T, S, 8, 33),
        (T, S, 8, 1, -1, 8, 8),
        (T, S, 8, 1, 2, 0, 8),
        (0, S, 8, 0),
        (T, 0, 8, 0),
        (T, S, 8, 1, 2**62, 8, 8),
        (T, S, 2**62, 1, 2, 1, 1),
    ],
)
def test_a_table_with_one_bad_row_copies_nothing(path: ModuleType, row: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="copy_rows: row 1"):
        path.copy_rows(array("q", (T, S, 8, 0, *row)), 1)
    assert TARGET.tolist() == [1] * 8


@both_paths
@pytest.mark.parametrize("num_threads", [0, -1, 65])
def test_an_impossible_number_of_threads_is_refused(path: ModuleType, num_threads: int) -> None:
    with pytest.raises(ValueError, match="num_threads"):
        path.copy_rows(array("q"), num_threads)


@both_paths
def test_written_bytes_are_read_back_and_a_read_ends_with_the_file(
    path: ModuleType, tmp_path: Path
) -> None:
    data = np.arange(100_000, dtype=np.uint32).view(np.uint8)
    back = np.full(data.nbytes + 10, 0xEE, np.uint8)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        path.write_full(fd, address_of(data), data.nbytes, 4096)
        path.write_full(fd, address_of(data), 0, 0)
        assert os.fstat(fd).st_size == 4096 + data.nbytes
        assert path.read_full(fd, address_of(back), back.nbytes, 4096) == data.nbytes
        assert path.read_full(fd, address_of(back), 10, 10**9) == 0
    finally:
        os.close(fd)
    np.testing.assert_array_equal(back[: data.nbytes], data)
    assert back[data.nbytes :].tolist() == [0xEE] * 10


@both_paths
def test_a_refused_write_or_read_raises_the_systems_error(path: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    memory = np.zeros(8, np.uint8)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
            path.write_full(fd, address_of(memory), 8, 0)
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(fd)
    pipe_in, pipe_out = os.pipe()
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ESPIPE)):
            path.read_full(pipe_in, address_of(memory), 8, 0)
    finally:
        os.close(pipe_in)
        os.close(pipe_out)


@both_paths
def test_a_full_device_raises_enospc(path: ModuleType) -> None:
    memory = np.zeros(4096, np.uint8)
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
            path.write_full(fd, address_of(memory), 4096, 0)
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)


@both_paths
def test_ranges_that_are_none_are_refused(path: ModuleType) -> None:
    for call in (path.write_full, path.read_full):
        with pytest.raises(ValueError, match=call.__name__):
            call(0, S, 8, -1)
        with pytest.raises(ValueError, match=call.__name__):
            call(0, 0, 8, 0)
    with pytest.raises(ValueError, match="crc32c_at"):
        path.crc32c_at(0, 1)


def test_the_core_knows_no_python_never_throws_and_owns_no_naked_memory() -> None:
    files = sorted([*CORE.glob("*.h"), *CORE.glob("*.cc")])
    assert files
    for file in files:
        code = re.sub(r"//.*", "", file.read_text())
        for banned in (r"Python\.h", r"\bnanobind\b", r"\bthrow\b", r"\bnew\b", r"\bmalloc\b"):
            assert not re.search(banned, code), f"{file.name}: {banned}"


def test_only_the_one_door_imports_the_extension() -> None:
    importers = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(from|import)\b.*\b_native\b", file.read_text(), re.MULTILINE)
    }
    assert importers == {"native.py"}


@pytest.mark.parametrize("module", ["shardckpt", "shardckpt.native"])
def test_importing_it_loads_no_framework_and_no_numpy(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'jax', 'numpy'})"
    )
    assert run_python(code) == ""


def test_no_module_uses_torch_distributed_checkpoint() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert "distributed.checkpoint" not in file.read_text(), file


@both_paths
def test_chunks_that_make_no_sense_are_refused(path: ModuleType) -> None:
    data = np.zeros(100, np.uint8)
    good = native.ChunkRange(0, 100, array("q", (0, 100, 0, 0)), array("q"), b"\0" * 8, 0, 64)
    for change in (
        {"start": -1},
        {"stop": (64 << 20) + 1},
        {"stop": 99},
        {"start": 1},
        {"pieces": array("q", (0, 100, 1, 0))},
        {"pieces": array("q", (0, 100, -1, 0))},
        {"pieces": array("q", (0, -1, 0, 0))},
        {"pieces": array("q", (0, 100, 0))},
        {"crcs": b"\0" * 7},
        {"chunk_bytes": 0},
    ):
        bad = good._replace(**change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="chunks: "):
            _implementation(path).read_chunks(-1, -1, 0, *bad)
        with pytest.raises(ValueError, match="chunks: "):
            _implementation(path).place_chunks(address_of(data), *bad)


def _implementation(path: ModuleType) -> ModuleType:
    """Return the module behind the door, so that the door's own tuples are not needed."""
    return pure if path is pure else native._impl


@given(st.data())
def test_both_paths_place_the_same_chunks_and_find_the_same_damage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chunk_bytes = data.draw(st.sampled_from([1, 64, 4096]))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    content = random.integers(0, 256, data.draw(st.integers(1, 20_000)), np.uint8)
    start = data.draw(st.integers(0, len(content) - 1))
    stop = data.draw(st.integers(start + 1, len(content)))
    targets = np.zeros((2, 3, len(content)), np.uint8)
    pieces: list[list[tuple[int, int, int, int]]] = [[], []]
    crcs = b""
    for number in range(data.draw(st.integers(1, 3))):
        offset = data.draw(st.integers(start, stop - 1))
        nbytes = data.draw(st.integers(0, stop - offset))
        is_placed = data.draw(st.booleans())
        for side in (0, 1):
            address = address_of(targets[side, number]) if is_placed else 0
            pieces[side].append((offset, nbytes, len(crcs) // 4, address))
        row = array("q", (address_of(content) + offset, nbytes, offset))
        crcs += pure.chunk_crcs(row, 5, chunk_bytes)
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
    cut = data.draw(st.sampled_from([len(content), len(content) // 2]))
    file = tmp_path_factory.getbasetemp() / "chunks"
    file.write_bytes(content[:cut].tobytes())
    has_rows = data.draw(st.booleans())
    found: list[list[tuple[int, int, int]]] = [[], []]
    fd = os.open(file, os.O_RDONLY)
    try:
        for side, path in enumerate((native._impl, pure)):
            rows = array("q")
            if has_rows and stop - start >= 8:
                scattered = targets[side, 2]
                rows.extend((address_of(scattered), 1, 1, 1, 4, 2, 2))
            flat = array("q", [n for piece in pieces[side] for n in piece])
            rest = (start, stop, flat, rows, crcs, 5, chunk_bytes)
            memory = address_of(content) + start
            found[side].append(tuple(path.place_chunks(memory, *rest)))
            placed = targets[side].copy()
            targets[side] = 0
            found[side].append(tuple(path.read_chunks(fd, -1, 0, *rest)))
            if cut == len(content) and found[side][0][1] < 0:
                assert np.array_equal(placed, targets[side])
    finally:
        os.close(fd)
    assert found[0][0] == found[1][0]
    is_whole = found[1][1][0] == stop
    if is_whole:
        assert found[0][1] == found[1][1]
    if is_whole and found[0][0][1] < 0:
        assert np.array_equal(targets[0], targets[1])
