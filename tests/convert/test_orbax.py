"""Orbax writes, we convert; we convert, Orbax restores: bit for bit, or a typed error."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from orbax_process import run_side
from orbax_side import STEPS, VARIANTS, arrays

from shardckpt.catalog.store import Catalog
from shardckpt.checkpointer import Restored, load_once
from shardckpt.cli.main import run
from shardckpt.convert.run import convert
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import (
    CorruptCheckpointError,
    FormatError,
    MissingDependencyError,
    StepNotFoundError,
    StorageError,
    StoreNotFoundError,
    UnsupportedStateError,
)
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load.loader import LoadOptions
from shardckpt.load.open import OpenCheckpoint
from shardckpt.state import PerRank
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import ArrayBackend, shard_of
from shardckpt.testing.jobs import ThreadJob

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("orbax_root")
VALUES = {"step": 7, "lr": 0.5, "on": True}


def loaded(store: Path, wanted: dict[str, Any], step: int | None = None) -> Restored:
    """Load a store by the numpy backend and compare it with what is wanted, bit for bit."""
    state: dict[str, Any] = {
        key: np.full_like(value, 1) if isinstance(value, np.ndarray) else None
        for key, value in wanted.items()
    }
    restored = load_once(
        LocalStorage(store), ArrayBackend(), SingleCoord(), state, step=step,
        options=LoadOptions(), timeout_s=10, namespace="test", environment={},
    )  # fmt: skip
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape), key
            assert state[key].tobytes() == value.tobytes(), key
        else:
            assert (type(state[key]), state[key]) == (type(value), value), key
    return restored


@pytest.mark.parametrize("name", ["standard", *VARIANTS])
def test_what_orbax_wrote_loads_and_goes_back_bit_for_bit(
    orbax_root: Path, tmp_path: Path, name: str
) -> None:
    done = convert(orbax_root / name, tmp_path / "store", budget_bytes=1 << 20)
    assert (done.to, done.steps, done.num_arrays) == ("shardckpt", (0,), len(arrays()))
    text = {} if name == "standard" else {"text": "hello"}
    loaded(tmp_path / "store", {**arrays(), **VALUES, **text})
    assert run(["verify", str(tmp_path / "store")]) == 0
    if name == "standard":
        convert(tmp_path / "store", tmp_path / "back", budget_bytes=1 << 20)
        run_side("restore", str(tmp_path / "back" / "0" / "default"))


def test_all_steps_items_and_metrics_of_a_manager_come_over_and_go_back(
    orbax_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "manager"
    shutil.copytree(orbax_root / "manager", root)
    (root / "40.orbax-checkpoint-tmp").mkdir()
    told: list[str] = []
    done = convert(root, tmp_path / "store", progress=told.append)
    assert done.steps == STEPS
    assert "40.orbax-checkpoint-tmp" in told[0]
    for step in STEPS:
        wanted = {f"state/{key}": value for key, value in arrays(step).items()}
        values = {f"state/{key}": value for key, value in VALUES.items()}
        found = loaded(tmp_path / "store", {**wanted, **values, "data": {"at": step}}, step)
        assert found.metrics == {"loss": 1 / step}
    convert(tmp_path / "store", tmp_path / "back")
    run_side("restore_manager", str(tmp_path / "back"))


def test_one_item_of_one_step_is_the_whole_state(orbax_root: Path, tmp_path: Path) -> None:
    convert(orbax_root / "manager", tmp_path / "store", step=20, item="state")
    assert loaded(tmp_path / "store", {**arrays(20), **VALUES}).step == 20


def test_roles_tell_parameters_from_moments(orbax_root: Path, tmp_path: Path) -> None:
    convert(orbax_root / "standard", tmp_path / "store")
    catalog = Catalog(LocalStorage(tmp_path / "store"), writer="test")
    entry = catalog.find(catalog.newest(), None)
    checkpoint = OpenCheckpoint(catalog.storage, entry.attempt, entry.manifest)
    assert checkpoint.manifest.framework == "jax", "model maps read it as a state of JAX"
    tensors = checkpoint.tensors
    roles = {key: tensors[key].role for key in ("params/w", "opt/0/mu/w", "opt/0/nu/w")}
    assert list(roles.values()) == ["param", "adam_m", "adam_v"]
    assert tensors["opt/0/count"].role == "count"


def test_typed_random_keys_keep_their_kind_on_the_way_back(
    orbax_root: Path, tmp_path: Path
) -> None:
    convert(orbax_root / "keys", tmp_path / "store")
    convert(tmp_path / "store", tmp_path / "back")
    run_side("restore_keys", str(tmp_path / "back" / "0" / "default"))


@pytest.mark.parametrize("name", ["standard", "keys"])
def test_jax_restores_what_was_converted_into_the_same_tree(
    orbax_root: Path, tmp_path: Path, name: str
) -> None:
    convert(orbax_root / name, tmp_path / "store")
    run_side(f"resume_{name}", str(tmp_path / "store"))


def sharded_store(place: Path) -> None:
    job = ThreadJob([LocalStorage(place)] * 4)
    assert job.save(3) == [True] * 4
    job.close()


def test_chunks_are_the_shards_and_orbax_reads_them(tmp_path: Path) -> None:
    sharded_store(tmp_path / "store")
    assert run(["convert", str(tmp_path / "store"), str(tmp_path / "out"), "--item", "model"]) == 0
    item = tmp_path / "out" / "3" / "model"
    run_side("restore_odd", str(item))
    import tensorstore as ts

    database = {"driver": "ocdbt", "base": f"file://{item}/", "path": "table/"}
    table = ts.open({"driver": "zarr3", "kvstore": database}, open=True).result()
    assert table.chunk_layout.write_chunk.shape == (7, 40)


def test_empty_nodes_that_nobody_saved_are_named_by_the_user(tmp_path: Path) -> None:
    job = ThreadJob([LocalStorage(tmp_path / "store")])
    (handle,) = job.each(lambda core, _: core.save(1, {**arrays(), **VALUES}))
    handle.wait()
    job.close()
    named = ["--empty", "opt/1", "--empty", "nothing", "--empty", "empty"]
    assert run(["convert", str(tmp_path / "store"), str(tmp_path / "out"), *named]) == 0
    run_side("restore", str(tmp_path / "out" / "1" / "default"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4", "float8_e8m0fnu", "complex128"])
def test_other_dtypes_go_out_and_come_back(tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = {"x/0": np.arange(8).astype(kind), "x/1": np.zeros((0, 3), kind)}
    job = ThreadJob([LocalStorage(tmp_path / "a")])
    (handle,) = job.each(lambda core, _: core.save(1, dict(values)))
    handle.wait()
    job.close()
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    loaded(tmp_path / "c", values)


# What must not pass.


def copied(orbax_root: Path, tmp_path: Path, name: str) -> Path:
    place = tmp_path / "source"
    shutil.copytree(orbax_root / name, place)
    return place


def test_missing_or_empty_metadata_is_told(orbax_root: Path, tmp_path: Path) -> None:
    source = copied(orbax_root, tmp_path, "standard")
    (source / "_METADATA").write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"_METADATA is empty \(0 bytes\)"):
        convert(source, tmp_path / "store")
    (source / "_METADATA").unlink()
    with pytest.raises(CorruptCheckpointError, match="_METADATA is missing"):
        convert(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_lost_process_directory_is_told(orbax_root: Path, tmp_path: Path) -> None:
    source = copied(orbax_root, tmp_path, "standard")
    shutil.rmtree(source / "ocdbt.process_0")
    with pytest.raises(CorruptCheckpointError, match="source"):
        convert(source, tmp_path / "store")


@pytest.mark.parametrize(("name", "chunk"), [("files-zarr2", "2.1"), ("files-zarr3", "c/2/1")])
def test_a_lost_chunk_is_told_and_never_read_as_zeros(
    orbax_root: Path, tmp_path: Path, name: str, chunk: str
) -> None:
    source = copied(orbax_root, tmp_path, name)
    (source / "params.w" / chunk).unlink()
    with pytest.raises(CorruptCheckpointError, match=rf"params\.w.*1 of its chunks.*{chunk}"):
        convert(source, tmp_path / "store")


def test_an_older_orbax_that_left_zeros_out_is_taken_at_its_word_aloud(
    orbax_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = copied(orbax_root, tmp_path, "files-zarr2")
    metadata = json.loads((source / "_METADATA").read_text())
    metadata["store_array_data_equal_to_fill_value"] = False
    (source / "_METADATA").write_text(json.dumps(metadata))
    (source / "params.zeros" / "0.0").unlink()
    with caplog.at_level(logging.WARNING):
        convert(source, tmp_path / "store")
    assert "1 chunks are absent" in caplog.text
    loaded(tmp_path / "store", {**arrays(), **VALUES, "text": "hello"})


def test_a_damaged_chunk_is_told(orbax_root: Path, tmp_path: Path) -> None:
    source = copied(orbax_root, tmp_path, "files-zarr2")
    chunk = source / "params.w" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(CorruptCheckpointError, match=r"params\.w"):
        convert(source, tmp_path / "store")
    with pytest.raises(StepNotFoundError):
        loaded(tmp_path / "store", {})


def test_an_uncommitted_step_is_refused(orbax_root: Path, tmp_path: Path) -> None:
    source = copied(orbax_root, tmp_path, "manager")
    (source / "20" / "commit_success.txt").unlink()
    (source / "30").rename(source / "30.orbax-checkpoint-tmp")
    with pytest.raises(CorruptCheckpointError, match="never committed"):
        convert(source, tmp_path / "a", step=20)
    with pytest.raises(StepNotFoundError, match=r"committed steps are \[10\]"):
        convert(source, tmp_path / "a", step=30)
    assert convert(source, tmp_path / "a").steps == (10,)


def test_unknown_handlers_items_and_kinds_are_named(orbax_root: Path, tmp_path: Path) -> None:
    source = copied(orbax_root, tmp_path, "manager")
    facts = json.loads((source / "10" / "_CHECKPOINT_METADATA").read_text())
    facts["item_handlers"]["data"] = "grain.PyGrainCheckpointHandler"
    (source / "10" / "_CHECKPOINT_METADATA").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match="'data' was written by PyGrainCheckpointHandler"):
        convert(source, tmp_path / "store", step=10)
    with pytest.raises(StepNotFoundError, match="no item 'model'"):
        convert(source, tmp_path / "store", step=10, item="model")
    metadata = source / "20" / "state" / "_METADATA"
    metadata.write_text(metadata.read_text().replace('"scalar"', '"Mystery"'))
    with pytest.raises(FormatError, match="'lr' is a 'Mystery'"):
        convert(source, tmp_path / "store", step=20)


def test_nothing_is_written_over_or_without_room(
    orbax_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(StorageError, match="not empty"):
        convert(orbax_root / "standard", tmp_path / "taken")
    sharded_store(tmp_path / "store")
    with pytest.raises(StorageError, match="not empty"):
        convert(tmp_path / "store", tmp_path / "taken")
    monkeypatch.setattr("shardckpt.convert.run.free_bytes", lambda _: 4096)
    for source in (orbax_root / "standard", tmp_path / "store"):
        with pytest.raises(StorageError, match=r"4096 are free\. Nothing was written"):
            convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_tensorstore_the_message_says_what_to_install(
    orbax_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'shardckpt\[convert\]'"):
        convert(orbax_root / "standard", tmp_path / "store")


def test_what_orbax_cannot_hold_is_listed_and_can_be_left_out(tmp_path: Path) -> None:
    job = ThreadJob([LocalStorage(tmp_path / "store")])
    state = {"w": np.ones(3), "own": PerRank(1), "odd": b"bytes"}
    (handle,) = job.each(lambda core, _: core.save(1, state))
    handle.wait()
    job.close()
    with pytest.raises(UnsupportedStateError, match=r"(?s)odd: a bytes.*own: values that differ"):
        convert(tmp_path / "store", tmp_path / "out")
    assert convert(tmp_path / "store", tmp_path / "out", keys="w").num_arrays == 1


def test_a_failed_conversion_leaves_no_step_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded_store(tmp_path / "store")

    def broken(_: Path) -> None:
        raise StorageError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("shardckpt.convert.to_orbax.sync_tree", broken)
        with pytest.raises(StorageError, match="the disk is gone"):
            convert(tmp_path / "store", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["3.orbax-checkpoint-tmp"]
    for shard in (tmp_path / "store").glob("step-*/*.shard"):
        data = bytearray(shard.read_bytes())
        data[4200] ^= 1
        shard.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        convert(tmp_path / "store", tmp_path / "other")
    assert not (tmp_path / "other" / "3").exists()


def test_the_command_line_reports_and_has_an_exit_code_for_every_outcome(
    orbax_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(orbax_root / "manager"), str(tmp_path / "store")
    assert run(["convert", source, target, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["steps"] == list(STEPS)
    assert "step 20: 15 arrays" in told.err
    assert run(["convert", source, target]) == 1
    assert run(["convert", source, target, "--to", "orbax"]) == 1
    assert run(["convert", source, str(tmp_path / "x"), "--step", "11"]) == 3
    assert run(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 3
    with pytest.raises(StoreNotFoundError, match="neither a store"):
        convert(tmp_path, tmp_path / "x")


_MEMORY = """
import re, sys
import numpy as np, tensorstore
from pathlib import Path
from shardckpt.convert.run import convert

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

import shardckpt.load.read
before = peak()
convert(sys.argv[1], sys.argv[2], budget_bytes=16 << 20)
print(peak() - before)
"""


def test_neither_way_takes_more_memory_than_its_budget_allows(tmp_path: Path) -> None:
    """192 MiB, with a budget of 16: what libraries and their threads keep is in the rest of 128."""
    job = ThreadJob([LocalStorage(tmp_path / "a")])
    big = np.random.default_rng(0).integers(0, 255, (3072, 65536), np.uint8)
    layout = MeshLayout((1,), (0,), ((0,),))
    (handle,) = job.each(
        lambda core, _: core.save(1, {"x": {"big": 1}, "w": shard_of(big, layout, 0)})
    )
    handle.wait()
    job.close()
    for source, target in (("a", "b"), ("b", "c")):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(tmp_path / source), str(tmp_path / target)],
            capture_output=True, text=True, timeout=55, check=True,
        )  # fmt: skip
        assert int(done.stdout) < 128 << 20, (source, int(done.stdout) >> 20)
    loaded(tmp_path / "c", {"w": big, "x/big": 1})
