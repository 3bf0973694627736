"""The command line: tables, JSON, and an exit code for every outcome."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardckpt.catalog.store import Catalog
from shardckpt.cli.main import run
from shardckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Sequence

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    place = tmp_path / "store"
    shutil.copytree(GOLDEN, place)
    return place


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def shard(store: Path, rank: int) -> Path:
    return next(store.glob(f"step-*/rank-{rank:05d}.0.shard"))


def data_of(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], code: int) -> dict:
    assert run(arguments) == code
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_list_shows_steps_ranks_marks_and_metrics(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = Catalog(LocalStorage(store), writer="operator")
    catalog.pin(catalog.find(catalog.newest(), 3).attempt, pinned=True)
    assert run(["list", str(store)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "ranks", "saved", "metrics"]
    assert row.split()[0] == "3"
    assert "latest,pinned" in row
    assert "loss=0.5" in row
    (entry,) = data_of(capsys, ["list", str(store), "--json"], 0)["steps"]
    assert (entry["step"], entry["world_size"], entry["latest"]) == (3, 2, True)


def test_inspect_shows_arrays_values_and_where_they_came_from(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(store), "--keys", "r*"]) == 0
    text = capsys.readouterr().out
    assert "made_by: golden" in text
    assert "rows" in text
    assert "copies" not in text.split("\n\n")[1]
    found = data_of(capsys, ["inspect", str(store), "--json"], 0)
    assert {a["key"]: a["shape"] for a in found["arrays"]}["rows"] == [7, 5]
    assert found["config"] == {"width": 5}
    assert found["per_rank"] == {"own": "rank0"}


def test_verify_names_the_file_rank_and_key_of_a_flipped_byte(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(store)]) == 0
    assert "step 3: ok" in capsys.readouterr().out
    flip(shard(store, 1), 4096 + 5)
    assert run(["verify", str(store), "--quick"]) == 0
    capsys.readouterr()
    assert run(["verify", str(store)]) == 4
    text = capsys.readouterr().out
    assert "CORRUPT" in text
    assert "rank-00001.0.shard (rank 1), key 'rows'" in text
    (step,) = data_of(capsys, ["verify", str(store), "--json"], 4)["steps"]
    assert not step["ok"]


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_verify_finds_a_truncated_file_without_reading_payloads(
    store: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    path = shard(store, 0)
    path.write_bytes(path.read_bytes()[:-cut])
    assert run(["verify", str(store), "--quick"]) == 4
    assert "the manifest says" in capsys.readouterr().out


def test_what_is_not_there_is_exit_code_3(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["list", str(tmp_path / "nowhere")]) == 3
    assert "no checkpoint store here" in capsys.readouterr().err
    assert run(["inspect", str(store), "--step", "9"]) == 3
    assert "committed steps are [3]" in capsys.readouterr().err
    found = data_of(capsys, ["inspect", str(store), "--step", "9", "--json"], 3)
    assert found["error"] == "StepNotFoundError"


def test_a_damaged_manifest_or_log_is_exit_code_4(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = next(store.glob("step-*/MANIFEST.json"))
    flip(manifest, 200)
    assert run(["inspect", str(store)]) == 4
    assert run(["verify", str(store)]) == 4
    for root in (store / "roots").iterdir():
        flip(root, 100)
    assert run(["list", str(store)]) == 4
    assert "Restore the roots/ directory" in capsys.readouterr().err


def test_another_error_is_exit_code_1_and_wrong_usage_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["list", "s3://bucket/prefix"]) == 1
    assert "not supported" in capsys.readouterr().err
    for arguments in ([], ["list"], ["nonsense", str(tmp_path)], ["verify", "x", "--step", "two"]):
        with pytest.raises(SystemExit) as stopped:
            run(arguments)
        assert stopped.value.code == 2
