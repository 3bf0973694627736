"""The side of JAX in peers.py: arrays of the torch side's shapes on two devices of one process.

Raw TensorStore writes one zarr3 array per array of the state, a chunk per device, uncompressed, all
at once: no tree, no commit, no metadata of a checkpoint; it is what the others build on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from files import flush_names, flush_share, keep_only, size_of
from harness import drop_from_cache, read_into_cache, say
from overhead_jax import Orbax, Shardckpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardckpt.testing.ranks import RankContext

NUM_DEVICES: Final = 2
WIDTH: Final = 2048  # Of a layer, as on the side of torch.
OURS: Final = "shardckpt"
ORBAX: Final = "orbax AsyncCheckpointer, default"
ORBAX_PLAIN: Final = "orbax AsyncCheckpointer, no compression"
ORBAX_SYNC: Final = "orbax Checkpointer, no compression"
TENSORSTORE: Final = "raw TensorStore, zarr3, no compression"
NAMES: Final = (OURS, ORBAX, ORBAX_PLAIN, ORBAX_SYNC, TENSORSTORE)


class Arrays:
    """The state: per layer a weight, a bias, and two moments of each."""

    def __init__(self, nbytes: int) -> None:
        """Make it on all devices."""
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ.pop(name, None)
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
        rows = NamedSharding(jax.make_mesh((NUM_DEVICES,), ("data",)), PartitionSpec("data"))
        num_layers = max(1, nbytes // (3 * 4 * WIDTH * (WIDTH + 1)))
        shapes = {
            f"{kind}-{layer}-{name}": shape
            for kind in ("param", "mu", "nu")
            for layer in range(num_layers)
            for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
        }
        self.blank: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
            for name, shape in shapes.items()
        }
        keys = jax.random.split(jax.random.key(0), len(shapes))
        make = jax.jit(jax.random.normal, static_argnums=1, out_shardings=rows)
        self.state = {
            name: make(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        jax.block_until_ready(self.state)
        self.nbytes = sum(leaf.nbytes for leaf in self.state.values())

    def check(self, found: dict[str, Any], what: str) -> None:
        """Compare what was loaded with the state.

        Raises:
            AssertionError: A bit differs.
        """
        import numpy as np

        for name, wanted in self.state.items():
            if not np.array_equal(np.asarray(found[name]), np.asarray(wanted)):
                raise AssertionError(f"{what}: array {name} differs from what was saved")


class TensorStore:
    """Arrays as zarr3, without anything around them."""

    def __init__(self, arrays: Arrays, place: Path) -> None:
        """Take the state and a new directory."""
        import tensorstore

        self._ts, self._arrays, self.place = tensorstore, arrays, place / "tensorstore"
        self._step = 0
        self._done: list[Any] = []

    @property
    def newest(self) -> Path:
        """Return where the last save lies."""
        return self.place / str(self._step)

    def save(self, step: int) -> None:
        """Write all; returns when all is copied."""
        self._step = step
        self.newest.mkdir(parents=True)
        asyncio.run(self._write())

    def wait(self) -> None:
        """Return when all is written and flushed."""
        while self._done:
            self._done.pop().result()

    def load(self) -> dict[str, Any]:
        """Return all arrays, on their devices."""
        return asyncio.run(self._read())

    def _spec(self, name: str) -> dict[str, Any]:
        path = str(self.newest / name)
        return {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}

    async def _write(self) -> None:
        import numpy as np

        async def write(name: str, array: Any) -> None:
            chunk = array.sharding.shard_shape(array.shape)
            spec = self._spec(name)
            spec["metadata"] = {
                "shape": array.shape, "data_type": "float32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            }  # fmt: skip
            store = await self._ts.open(spec, create=True)
            for shard in array.addressable_shards:
                future = store[shard.index].write(np.asarray(shard.data))
                self._done.append(future)
                await future.copy

        await asyncio.gather(*(write(name, array) for name, array in self._arrays.state.items()))

    async def _read(self) -> dict[str, Any]:
        import jax

        async def read(name: str, like: Any) -> Any:
            store = await self._ts.open(self._spec(name), open=True)
            indices = like.sharding.addressable_devices_indices_map(like.shape)
            parts = await asyncio.gather(*(store[index].read() for index in indices.values()))
            on_devices = [jax.device_put(p, d) for p, d in zip(parts, indices, strict=True)]
            return jax.make_array_from_single_device_arrays(like.shape, like.sharding, on_devices)

        blank = self._arrays.blank
        found = await asyncio.gather(*(read(name, like) for name, like in blank.items()))
        return dict(zip(blank, found, strict=True))


@dataclass(frozen=True, slots=True)
class Entry:
    """One system, as it is measured.

    Attributes:
        save: Begin a save; returns when arrays may be donated.
        wait: Return when the save is done.
        load: Return the arrays.
        newest: Where the last save lies.
        tidy: Delete older saves.
        close: End it.
    """

    save: Callable[[int], object]
    wait: Callable[[], object]
    load: Callable[[], Any]
    newest: Callable[[], Path]
    tidy: Callable[[], object]
    close: Callable[[], object]


def open_entry(name: str, arrays: Arrays, place: Path) -> Entry:
    """Return a system by its name."""
    if name == OURS:
        ours = Shardckpt(arrays, place)
        return Entry(
            ours.save, ours.wait, ours.load,
            lambda: max(ours.place.glob("step-*")), ours.tidy, ours.close,
        )  # fmt: skip
    if name == TENSORSTORE:
        raw = TensorStore(arrays, place)
        return Entry(
            raw.save, raw.wait, raw.load, lambda: raw.newest, lambda: keep_only(raw.newest),
            lambda: None,
        )  # fmt: skip
    orbax = Orbax(arrays, place, background=name != ORBAX_SYNC, compress=name == ORBAX)
    return Entry(
        orbax.save, orbax.wait, orbax.load, lambda: orbax.newest, orbax.tidy, orbax.close
    )  # fmt: skip


class Bench:
    """The process's side."""

    def __init__(self, place: Path, nbytes: int, names: tuple[str, ...]) -> None:
        """Make the state and open every system; each saves once, loads once and is compared."""
        self.arrays = Arrays(nbytes)
        self.entries: dict[str, Entry] = {}
        self.unable: dict[str, str] = {}
        self.seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.disk_bytes: dict[str, int] = {}
        for name in names:
            try:
                entry = open_entry(name, self.arrays, place)
                self._turn(name, entry, 0)
            except Exception as error:  # What cannot run here is told, not left out.
                self.unable[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            else:
                self.entries[name] = entry
        self.seconds.clear()

    def run(self, rounds: int) -> None:
        """Give every system its turns, the order swapped from round to round."""
        for round_ in range(1, rounds + 1):
            names = list(self.entries)
            for name in names if round_ % 2 else names[::-1]:
                self._turn(name, self.entries[name], round_)
            say(f"jax: round {round_} is done")

    def _turn(self, name: str, entry: Entry, step: int) -> None:
        import jax

        seconds = self.seconds[name]
        began = time.perf_counter()
        entry.save(step)
        seconds["blocks"].append(time.perf_counter() - began)
        entry.wait()
        if name != OURS:
            flush_share(entry.newest(), 0, 1)
            flush_names(entry.newest())
        seconds["save"].append(time.perf_counter() - began)
        entry.tidy()
        os.sync()
        self.disk_bytes[name] = size_of(entry.newest())
        for kind, prepare in (("load cold", drop_from_cache), ("load warm", read_into_cache)):
            prepare(entry.newest())
            began = time.perf_counter()
            found = jax.block_until_ready(entry.load())
            seconds[kind].append(time.perf_counter() - began)
            self.arrays.check(found, f"{name}, {kind}")
            del found


def measure(
    told: RankContext, place: Path, nbytes: int, rounds: int, names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the seconds of every timed part."""
    del told
    bench = Bench(place, nbytes, names)
    bench.run(rounds)
    for entry in bench.entries.values():
        entry.close()
    return {
        "seconds": {name: dict(of) for name, of in bench.seconds.items()},
        "unable": bench.unable, "disk_bytes": bench.disk_bytes, "rank_bytes": bench.arrays.nbytes,
    }  # fmt: skip
