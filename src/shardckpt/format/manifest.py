"""The manifest: one checkpoint described completely in O(tensors + ranks). Bytes <-> dataclasses.

Layer: format. Tensors and files are columns. A layout is written once and says in closed form which
rank holds which box (`geometry.layout`); irregular ones list their boxes. Where equal copies exist,
`owners` and `writers` say which replicas wrote shares of every shard's bytes (`format.shares`).
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.errors import FormatError
from shardckpt.format.root import FORMAT_VERSION, PACKED_DIGESTS, SOME_WRITERS, check_version
from shardckpt.format.sealed import DIGEST_BYTES, digest, seal, unseal
from shardckpt.format.shard_file import MAX_DIMS
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box
from shardckpt.geometry.dtypes import ITEMSIZE_BYTES
from shardckpt.geometry.layout import BoxLayout, Layout, MeshLayout
from shardckpt.options import PER_RANK_RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MANIFEST_BYTES: Final = 256 << 20
MAX_RANKS: Final = 1 << 20
SPLIT: Final = -1
_MAX_ELEMENTS: Final = 1 << 62
_HEX: Final = 2 * DIGEST_BYTES
_PACKED_FROM_FILES: Final = 1024


class MeshColumn(msgspec.Struct, frozen=True, tag="mesh", tag_field="kind"):
    """A `MeshLayout`; `ranks` as `[start, stop)` runs, flattened."""

    shape: list[int]
    rank_runs: list[int]
    cuts: list[list[int]]


class BoxColumn(msgspec.Struct, frozen=True, tag="boxes", tag_field="kind"):
    """A `BoxLayout`: offsets and shapes of all boxes in one list, ranks of each box."""

    boxes: list[int]
    ranks: list[list[int]]


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """Every shard file, in columns; names follow from rank and number within the rank.

    Attributes:
        counts: Files of each rank.
        sizes: Bytes of each file, rank by rank.
        table_offsets: Where each file's table starts.
        table_bytes: Bytes of each table.
        digests: Digests of the tables, joined: in hex, or base64 of their bytes where the manifest
            has the feature `packed-digests`.
    """

    counts: list[int]
    sizes: list[int]
    table_offsets: list[int]
    table_bytes: list[int]
    digests: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One checkpoint.

    Attributes:
        format: Version of the format.
        features: Features a reader must know.
        store_id: Store it was saved in.
        attempt: Directory name.
        step: Training step.
        world_size: Ranks that saved.
        framework: Backend that saved ("torch").
        keys: Arrays, sorted.
        dtypes: Canonical dtype of each.
        shapes: Global shape of each.
        roles: Role of each.
        layout_ids: Index into `layouts` of each.
        owners: Which replica wrote each, or the first that wrote a share, or -1: all did.
        writers: How many wrote a share of each, from the owner on; with the feature `some-writers`
            only, otherwise one.
        layouts: Distinct layouts.
        aliases: Tied key to stored key.
        objects: Values equal on all ranks, tagged JSON.
        per_rank: Keys of values that differ by rank, with their rule.
        files: Every shard file.
        config: The user's training configuration, tagged JSON.
        environment: Versions, world size, mesh, commit.
    """

    format: int
    features: list[str]
    store_id: str
    attempt: str
    step: int
    world_size: int
    framework: str
    keys: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    roles: list[str]
    layout_ids: list[int]
    owners: list[int]
    writers: list[int] = []
    layouts: list[MeshColumn | BoxColumn]
    aliases: dict[str, str]
    objects: dict[str, msgspec.Raw]
    per_rank: dict[str, str]
    files: Files
    config: msgspec.Raw
    environment: dict[str, str]


class SavedTensor(msgspec.Struct, frozen=True):
    """One array as the manifest describes it."""

    key: str
    spec: ArraySpec
    role: str
    layout: Layout
    owner: int
    writers: int = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One shard file as the manifest describes it."""

    rank: int
    number: int
    nbytes: int
    table_offset: int
    table_bytes: int
    digest: str


def shard_key(attempt: str, rank: int, number: int, world_size: int) -> str:
    """Return the storage key of a shard file; large jobs use one sub-directory per 256 ranks.

    >>> shard_key("a", 3, 0, 4)
    'a/rank-00003.0.shard'
    """
    name = f"rank-{rank:05d}.{number}.shard"
    return f"{attempt}/{name}" if world_size <= 256 else f"{attempt}/ranks-{rank // 256:05d}/{name}"


def encode_manifest(manifest: Manifest) -> tuple[bytes, str]:
    """Return the bytes of a manifest and the digest by which the root names it."""
    data = seal(manifest)
    return data, digest(data)


def decode_manifest(data: bytes, what: str) -> Manifest:
    """Return a manifest after checking that its columns agree.

    Raises:
        CorruptCheckpointError: Torn or flipped.
        FormatError: Another version, an unknown feature, or columns that contradict each other.
    """
    manifest = unseal(data, Manifest, what=what)
    check_version(manifest.format, manifest.features, what)
    problem = _problem(manifest)
    if problem:
        raise FormatError(f"{what}: {problem}")
    return manifest


def tensors(manifest: Manifest, what: str = "manifest") -> dict[str, SavedTensor]:
    """Return every array by key.

    Raises:
        FormatError: A layout does not make sense.
    """
    try:
        layouts = [_layout(c, manifest, i) for i, c in enumerate(manifest.layouts)]
    except (ValueError, IndexError) as error:
        raise FormatError(f"{what}: {error}") from error
    columns = zip(
        manifest.keys, manifest.dtypes, manifest.shapes, manifest.roles, manifest.layout_ids,
        manifest.owners, manifest.writers or [1] * len(manifest.keys), strict=True,
    )  # fmt: skip
    spec_of = cache(ArraySpec)
    return {
        key: SavedTensor(key, spec_of(tuple(shape), dtype), role, layouts[layout_id], owner, count)
        for key, dtype, shape, role, layout_id, owner, count in columns
    }


def file_records(manifest: Manifest) -> list[list[FileRecord]]:
    """Return the files of each rank."""
    files = manifest.files
    digests = files.digests
    if PACKED_DIGESTS in manifest.features:
        digests = base64.b64decode(digests).hex()
    records: list[list[FileRecord]] = []
    index = 0
    for rank, count in enumerate(files.counts):
        of_rank: list[FileRecord] = []
        for number in range(count):
            digest_hex = digests[_HEX * index : _HEX * (index + 1)]
            of_rank.append(
                FileRecord(
                    rank,
                    number,
                    files.sizes[index],
                    files.table_offsets[index],
                    files.table_bytes[index],
                    digest_hex,
                )
            )
            index += 1
        records.append(of_rank)
    return records


def joined_digests(digests: Sequence[str]) -> tuple[str, list[str]]:
    """Return the digests of all files as the manifest holds them, and the features of that.

    Those of a large job are packed: a third less of what is most of its manifest.
    """
    joined = "".join(digests)
    if len(digests) < _PACKED_FROM_FILES:
        return joined, []
    return base64.b64encode(bytes.fromhex(joined)).decode(), [PACKED_DIGESTS]


def writers_column(writers: Sequence[int]) -> tuple[list[int], list[str]]:
    """Return how many wrote each array as the manifest holds it, and the features of that."""
    return (list(writers), [SOME_WRITERS]) if max(writers, default=1) > 1 else ([], [])


def layout_column(layout: Layout) -> MeshColumn | BoxColumn:
    """Return the manifest's form of a layout."""
    if isinstance(layout, MeshLayout):
        return MeshColumn(
            list(layout.mesh_shape), _runs(layout.ranks), [list(c) for c in layout.cuts]
        )
    boxes = [n for box in layout.boxes for n in (*box.offsets, *box.shape)]
    return BoxColumn(boxes, [list(r) for r in layout.ranks])


def mesh_layout(column: MeshColumn) -> MeshLayout:
    """Return the layout of a manifest's form.

    Raises:
        ValueError: Its parts contradict each other.
    """
    pairs = _pairs(column.rank_runs)
    ranks: Sequence[int] = range(*pairs[0]) if len(pairs) == 1 else ()
    if len(pairs) != 1:
        ranks = tuple(rank for start, stop in pairs for rank in range(start, stop))
    return MeshLayout(tuple(column.shape), ranks, tuple(tuple(c) for c in column.cuts))


def _pairs(runs: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(runs[::2], runs[1::2], strict=True))


def _layout(column: MeshColumn | BoxColumn, manifest: Manifest, layout_id: int) -> Layout:
    if isinstance(column, MeshColumn):
        runs = column.rank_runs
        if any(not 0 <= a < b <= manifest.world_size for a, b in _pairs(runs)):
            raise ValueError(
                f"layout {layout_id} names a rank outside the world of {manifest.world_size}"
            )
        if sum(b - a for a, b in _pairs(runs)) > MAX_RANKS:
            raise ValueError(f"layout {layout_id} has more than {MAX_RANKS} places on its mesh")
        return mesh_layout(column)
    users = [i for i, used in enumerate(manifest.layout_ids) if used == layout_id]
    num_dims = len(manifest.shapes[users[0]]) if users else 0
    if len(column.boxes) != 2 * num_dims * len(column.ranks):
        raise ValueError(f"layout {layout_id} has {len(column.boxes)} numbers for its boxes")
    boxes = []
    for i in range(len(column.ranks)):
        numbers = column.boxes[2 * num_dims * i : 2 * num_dims * (i + 1)]
        boxes.append(Box(tuple(numbers[:num_dims]), tuple(numbers[num_dims:])))
    if any(not 0 <= r < manifest.world_size for ranks in column.ranks for r in ranks):
        raise ValueError(
            f"layout {layout_id} names a rank outside the world of {manifest.world_size}"
        )
    return BoxLayout(tuple(boxes), tuple(tuple(r) for r in column.ranks))


@lru_cache(maxsize=64)
def _runs_cached(ranks: Sequence[int]) -> tuple[int, ...]:
    if isinstance(ranks, range) and ranks.step == 1:
        return (ranks.start, ranks.stop) if ranks else ()
    runs: list[int] = []
    for rank in ranks:
        if runs and runs[-1] == rank:
            runs[-1] = rank + 1
        else:
            runs += [rank, rank + 1]
    return tuple(runs)


def _runs(ranks: Sequence[int]) -> list[int]:
    return list(_runs_cached(ranks))


def _problem(manifest: Manifest) -> str | None:
    """Say what contradicts in a manifest, or None."""
    num = len(manifest.keys)
    columns = (
        manifest.dtypes,
        manifest.shapes,
        manifest.roles,
        manifest.layout_ids,
        manifest.owners,
    )
    if any(len(column) != num for column in columns):
        return "the tensor columns differ in length"
    has_writers = SOME_WRITERS in manifest.features
    if len(manifest.writers) != (num if has_writers else 0) or min(manifest.writers, default=1) < 1:
        return "the writers do not fit the tensors"
    if len(set(manifest.keys)) != num:
        return "a key is listed twice"
    if (
        not 1 <= manifest.world_size <= MAX_RANKS
        or len(manifest.files.counts) != manifest.world_size
    ):
        return f"{len(manifest.files.counts)} ranks have files, the world has {manifest.world_size}"
    unknown = sorted(set(manifest.dtypes) - ITEMSIZE_BYTES.keys())
    if unknown:
        return f"unknown dtypes {unknown}"
    for shape, key in dict(zip(map(tuple, manifest.shapes), manifest.keys, strict=True)).items():
        is_negative = bool(shape) and min(shape) < 0
        if len(shape) > MAX_DIMS or is_negative or math.prod(shape) > _MAX_ELEMENTS:
            return f"key {key!r} has the impossible shape {list(shape)}"
    if any(not 0 <= i < len(manifest.layouts) for i in manifest.layout_ids):
        return "a tensor has no layout"
    if set(manifest.per_rank.values()) - set(PER_RANK_RULES):
        return f"unknown per-rank rules {sorted(set(manifest.per_rank.values()))}"
    files = manifest.files
    total = sum(files.counts)
    if (
        any(count < 0 for count in files.counts)
        or any(
            len(column) != total for column in (files.sizes, files.table_offsets, files.table_bytes)
        )
        or _digests_length(manifest) != _HEX * total
    ):
        return "the file columns differ in length"
    return None


def _digests_length(manifest: Manifest) -> int:
    """Return how many hex digits the digests of all files have; -1 where they are no digests."""
    digests = manifest.files.digests
    if PACKED_DIGESTS not in manifest.features:
        return len(digests)
    try:
        return 2 * len(base64.b64decode(digests, validate=True))
    except ValueError:
        return -1


VERSION: Final = FORMAT_VERSION
