"""The manifest of a large job: packed digests, meshes in closed form, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from shardckpt.errors import FormatError
from shardckpt.format.manifest import (
    Files,
    Manifest,
    MeshColumn,
    decode_manifest,
    encode_manifest,
    file_records,
    joined_digests,
    layout_column,
    mesh_layout,
    tensors,
    writers_column,
)
from shardckpt.format.root import FORMAT_VERSION, PACKED_DIGESTS, SOME_WRITERS
from shardckpt.geometry.layout import MeshLayout


def manifest_of(world_size: int, layout: MeshColumn) -> Manifest:
    digests, features = joined_digests([f"{rank:032x}" for rank in range(world_size)])
    return Manifest(
        format=FORMAT_VERSION, features=features, store_id="s", attempt="a", step=1,
        world_size=world_size, framework="numpy", keys=["w"], dtypes=["float32"],
        shapes=[[world_size, 4]], roles=["param"], layout_ids=[0], owners=[0], layouts=[layout],
        aliases={}, objects={}, per_rank={},
        files=Files(
            counts=[1] * world_size, sizes=[9000] * world_size, table_offsets=[8192] * world_size,
            table_bytes=[744] * world_size, digests=digests,
        ),
        config=msgspec.Raw(b"{}"), environment={},
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [1023, 1024, 4096])
def test_every_file_keeps_its_digest_in_a_manifest_of_any_size(world_size: int) -> None:
    layout = MeshLayout((world_size,), range(world_size), ((0,),))
    manifest = manifest_of(world_size, layout_column(layout))
    assert manifest.features == ([PACKED_DIGESTS] if world_size >= 1024 else [])
    decoded = decode_manifest(encode_manifest(manifest)[0], "m")
    assert tensors(decoded)["w"].layout == layout
    records = file_records(decoded)
    assert [of_rank[0].digest for of_rank in records] == [f"{r:032x}" for r in range(world_size)]


@pytest.mark.parametrize("digests", ["", "AAAA", "not base64!", "0" * 32 * 1024])
def test_packed_digests_that_are_none_are_refused(digests: str) -> None:
    manifest = manifest_of(1024, layout_column(MeshLayout((1024,), range(1024), ((0,),))))
    files = msgspec.structs.replace(manifest.files, digests=digests)
    data, _ = encode_manifest(msgspec.structs.replace(manifest, files=files))
    with pytest.raises(FormatError, match="file columns differ in length"):
        decode_manifest(data, "m")


def test_some_writers_come_back_and_others_leave_no_trace() -> None:
    plain = manifest_of(4, layout_column(MeshLayout((4,), range(4), ())))
    assert b"writers" not in encode_manifest(plain)[0]
    assert tensors(plain)["w"].writers == 1
    writers, features = writers_column([3])
    assert features == [SOME_WRITERS]
    some = msgspec.structs.replace(plain, writers=writers, features=features)
    assert tensors(decode_manifest(encode_manifest(some)[0], "m"))["w"].writers == 3


@pytest.mark.parametrize(
    ("writers", "features"),
    [([3], []), ([], [SOME_WRITERS]), ([0], [SOME_WRITERS]), ([1, 1], [SOME_WRITERS])],
)
def test_writers_that_do_not_fit_are_refused(writers: list[int], features: list[str]) -> None:
    plain = manifest_of(4, layout_column(MeshLayout((4,), range(4), ())))
    wrong = msgspec.structs.replace(plain, writers=writers, features=features)
    with pytest.raises(FormatError, match="the writers do not fit the tensors"):
        decode_manifest(encode_manifest(wrong)[0], "m")


@pytest.mark.parametrize(
    "runs", [[0, 5], [-1, 3], [3, 3], [3, 1], [0, 4, 0], [0, 4] * (1 << 18) + [0, 4]]
)
def test_ranks_outside_the_world_are_refused_before_they_are_listed(runs: list[int]) -> None:
    with pytest.raises(FormatError):
        tensors(manifest_of(4, MeshColumn([4], runs, [[0]])))


@pytest.mark.parametrize("ranks", [range(8), range(1, 17, 2), (3, 1, 2, 0), (0, 0, 1, 1), (5,)])
def test_a_mesh_of_any_ranks_comes_back_as_it_was(ranks: tuple[int, ...]) -> None:
    layout = MeshLayout((len(ranks),), tuple(ranks), ((0,),))
    assert layout == MeshLayout((len(ranks),), ranks, ((0,),))
    assert mesh_layout(layout_column(layout)) == layout
    assert list(layout.ranks) == list(ranks)
