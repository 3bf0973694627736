"""What the commands do: read a store, return text for people and data for programs.

Layer: cli. Stores that are read are not taken over; nothing is written to them but a lease where
they allow it. Only `convert` makes new ones.
"""

from __future__ import annotations

import datetime
import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from shardckpt.catalog.store import Catalog
from shardckpt.convert.run import Kind, convert
from shardckpt.errors import CorruptCheckpointError, FormatError, StorageError
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.verify import Verified, verify_checkpoint
from shardckpt.storage.open import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardckpt.format.root import Entry


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a command."""

    text: str
    data: Any
    is_corrupt: bool = False


def list_steps(url: str) -> Report:
    """List the live steps in the log's order.

    Raises:
        StoreNotFoundError: There is no store.
    """
    root = _catalog(url).newest()
    latest = root.latest
    rows = [
        [
            str(e.step), _size(e.nbytes), str(e.world_size), _when(e.saved_unix_s), _marks(e,
            latest), " ".join(f"{k}={v:.6g}" for k, v in e.metrics.items()),
        ]
        for e in root.live
    ]  # fmt: skip
    heads = ["step", "size", "ranks", "saved", "", "metrics"]
    text = _table(heads, rows) if rows else f"{url}: no committed steps"
    return Report(
        text,
        {"store": url, "epoch": root.epoch, "steps": [_entry_data(e, latest) for e in root.live]},
    )


def inspect_step(url: str, step: int | None, *, keys: str) -> Report:
    """Describe one step: arrays, values, configuration, environment.

    Raises:
        StepNotFoundError: It is not committed.
        CorruptCheckpointError: Its manifest is damaged.
    """
    catalog = _catalog(url)
    entry = catalog.find(catalog.newest(), step)
    checkpoint = OpenCheckpoint(catalog.storage, entry.attempt, entry.manifest)
    manifest = checkpoint.manifest
    shown = [t for t in checkpoint.tensors.values() if fnmatch.fnmatchcase(t.key, keys)]
    rows = [
        [t.key, t.spec.dtype, str(list(t.spec.shape)), _size(t.spec.nbytes), t.role] for t in shown
    ]
    total = sum(t.spec.nbytes for t in checkpoint.tensors.values())
    head = [
        f"step {manifest.step} of {url}",
        f"saved on {manifest.world_size} ranks by {manifest.framework}, "
        f"{_when(entry.saved_unix_s)}",
        f"{len(manifest.keys)} arrays, {_size(total)}; {sum(manifest.files.counts)} files, "
        f"{_size(entry.nbytes)}",
        *(f"{name}: {value}" for name, value in sorted(manifest.environment.items())),
        f"config: {msgspec.json.encode(manifest.config).decode()}",
        f"values: {', '.join(sorted(manifest.objects)) or 'none'}",
        f"per rank: {', '.join(f'{k} ({r})' for k, r in manifest.per_rank.items()) or 'none'}",
    ]
    data = {
        "store": url,
        **_entry_data(entry, None),
        "framework": manifest.framework,
        "environment": manifest.environment,
        "config": msgspec.json.decode(manifest.config),
        "values": sorted(manifest.objects),
        "per_rank": manifest.per_rank,
        "aliases": manifest.aliases,
        "arrays": [
            {"key": t.key, "dtype": t.spec.dtype, "shape": list(t.spec.shape), "role": t.role}
            for t in shown
        ],
    }
    return Report(
        "\n".join(head) + "\n\n" + _table(["key", "dtype", "shape", "size", "role"], rows), data
    )


def verify_steps(url: str, step: int | None, *, quick: bool) -> Report:
    """Check one step, or all live ones, and name every damage found.

    Raises:
        StepNotFoundError: It is not committed.
    """
    catalog = _catalog(url)
    root = catalog.newest()
    entries = root.live if step is None else [catalog.find(root, step)]
    lines: list[str] = []
    results: list[dict[str, Any]] = []
    is_corrupt = False
    for entry in entries:
        lease = catalog.lease(entry.attempt)
        try:
            found = _verify(catalog, entry, quick=quick)
        finally:
            if lease is not None:
                lease.release()
        is_corrupt |= bool(found.problems)
        state = "CORRUPT" if found.problems else "ok"
        lines.append(
            f"step {entry.step}: {state}, {_size(found.nbytes)} in {found.num_files} files checked"
        )
        lines += [f"  {problem}" for problem in found.problems]
        results.append(
            {
                "step": entry.step,
                "ok": not found.problems,
                "bytes": found.nbytes,
                "problems": list(found.problems),
            }
        )
    text = "\n".join(lines) if lines else f"{url}: no committed steps"
    return Report(text, {"store": url, "steps": results}, is_corrupt)


def convert_steps(
    source: str,
    target: str,
    *,
    step: int | None,
    item: str | None,
    to: Kind | None,
    keys: str,
    progress: Callable[[str], None],
) -> Report:
    """Convert from Orbax to a store, or from a store to Orbax.

    Raises:
        ShardckptError: Nothing, or not every step, was converted.
        ValueError: The source is of the kind to be written.
    """
    done = convert(source, target, step=step, item=item, to=to, keys=keys, progress=progress)
    speed = done.nbytes / max(done.seconds, 1e-9)
    text = (
        f"{target}: {len(done.steps)} steps for {done.to}, {done.num_arrays} arrays, "
        f"{_size(done.nbytes)} in {done.seconds:.2f} s ({_size(round(speed))}/s)"
    )
    data = {
        "source": source, "target": target, "to": done.to, "steps": list(done.steps),
        "arrays": done.num_arrays, "bytes": done.nbytes, "seconds": done.seconds,
    }  # fmt: skip
    return Report(text, data)


def _verify(catalog: Catalog, entry: Entry, *, quick: bool) -> Verified:
    try:
        checkpoint = OpenCheckpoint(catalog.storage, entry.attempt, entry.manifest)
    except (CorruptCheckpointError, FormatError, StorageError) as error:
        return Verified(0, 0, (str(error),))
    try:
        return verify_checkpoint(checkpoint, payloads=not quick)
    finally:
        checkpoint.close()


def _catalog(url: str) -> Catalog:
    return Catalog(open_storage(url), writer="shardckpt command line")


def _entry_data(entry: Entry, latest: Entry | None) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(entry)
    return {**data, "latest": latest is not None and entry.attempt == latest.attempt}


def _marks(entry: Entry, latest: Entry | None) -> str:
    marks = [
        ("latest", latest is not None and entry.attempt == latest.attempt),
        ("pinned", entry.pinned),
        ("abandoned", entry.abandoned),
    ]
    return ",".join(name for name, is_set in marks if is_set)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _when(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
