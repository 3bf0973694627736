"""Arrays of zarr 2 and 3, in OCDBT databases or plain directories, through tensorstore.

Layer: convert. tensorstore gives the fill value for a chunk that is not there, so presence is
checked by name before anything is read.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shardckpt.errors import (
    CorruptCheckpointError,
    FormatError,
    MissingDependencyError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import ModuleType

    from shardckpt.geometry.box import Box, Shape

_CACHE_BYTES: Final = 8 << 20
_ZSTD_LEVEL: Final = 3


def tensorstore() -> ModuleType:
    """Return the tensorstore module.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import tensorstore as module
    except ImportError as error:
        raise MissingDependencyError(
            "Orbax checkpoints are read and written with tensorstore, which is not installed: "
            "pip install 'shardckpt[convert]'"
        ) from error
    return module


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array as its zarr metadata describes it.

    Attributes:
        name: Name in its item.
        shape: Elements.
        dtype: Canonical name.
        chunk: Elements of what is decoded at once.
        num_missing: Chunks that are not there.
        missing: Name of the first of them, or "".
    """

    name: str
    shape: Shape
    dtype: str
    chunk: Shape
    num_missing: int
    missing: str


class ArrayFolder:
    """The arrays of one item: a directory that holds an OCDBT database or zarr directories."""

    def __init__(self, folder: Path, *, ocdbt: bool, zarr3: bool) -> None:
        """Take a directory; nothing is opened yet.

        Raises:
            MissingDependencyError: tensorstore is not installed.
        """
        self._ts: Any = tensorstore()
        self._folder = folder
        self._driver = "zarr3" if zarr3 else "zarr"
        self._is_zarr3 = zarr3
        file: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
        self._kvstore: dict[str, Any] = {"driver": "ocdbt", "base": file} if ocdbt else file
        self._context = self._ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def names(self) -> frozenset[str]:
        """Return the names of all metadata files and chunks.

        Raises:
            CorruptCheckpointError: The database is damaged or a part of it is missing.
        """
        try:
            store = self._ts.KvStore.open(self._kvstore, context=self._context).result()
            return frozenset(key.decode() for key in store.list().result())
        except (ValueError, OSError, RuntimeError) as error:
            raise CorruptCheckpointError(
                f"{self._folder}: its database cannot be listed; a file of it is missing or "
                f"damaged (were all ocdbt.process_* directories copied?): {_words(error)}"
            ) from error

    def describe(self, name: str, names: frozenset[str]) -> StoredArray:
        """Return what an array is, and which of its chunks are there.

        Args:
            name: Name of the array.
            names: What `names` returned.

        Raises:
            CorruptCheckpointError: Its metadata is missing or damaged.
            FormatError: It is stored in a way that is not known here.
        """
        metadata_name = f"{name}/{'zarr.json' if self._is_zarr3 else '.zarray'}"
        if metadata_name not in names:
            raise CorruptCheckpointError(
                f"{self._folder}: array {name!r} is listed in _METADATA, but {metadata_name} is "
                "missing. The checkpoint is incomplete; take another step."
            )
        array = self._open(name)
        kvstore = array.kvstore
        try:
            metadata = json.loads(kvstore.read(metadata_name.rpartition("/")[2]).result().value)
            expected = _chunk_names(metadata, tuple(array.shape))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self._folder}/{metadata_name}: {_words(error)}") from error
        num_missing, first = 0, ""
        for chunk in expected:
            if f"{name}/{chunk}" not in names:
                num_missing, first = num_missing + 1, first or f"{name}/{chunk}"
        decoded = array.chunk_layout.read_chunk.shape or ()  # None for an array of 0 dims.
        return StoredArray(
            name, tuple(array.shape), array.dtype.name, tuple(decoded), num_missing, first
        )

    def read(self, wanted: Sequence[tuple[str, Box]]) -> list[np.ndarray[Any, Any]]:
        """Return boxes of arrays, each as a C-order array of its own.

        Raises:
            CorruptCheckpointError: A chunk is damaged or its file is missing; names the array.
        """
        futures = [self._region(self._open(name), box).read() for name, box in wanted]
        found = []
        for (name, box), future in zip(wanted, futures, strict=True):
            try:
                found.append(np.ascontiguousarray(future.result()).reshape(box.shape))
            except (ValueError, OSError, RuntimeError) as error:
                raise CorruptCheckpointError(
                    f"{self._folder}: array {name!r}, {box}: {_words(error)}"
                ) from error
        return found

    def write(
        self,
        created: Sequence[StoredArray],
        parts: Sequence[tuple[str, Box, np.ndarray[Any, Any]]],
    ) -> None:
        """Make new arrays and write boxes that are whole chunks, in one transaction.

        Raises:
            StorageError: Something cannot be written.
        """
        try:
            transaction = self._ts.Transaction()
            opened = {
                array.name: self._ts.open(
                    {
                        "driver": self._driver, "kvstore": self._path(array.name),
                        "metadata": _zarr3_metadata(array),
                        # Else a chunk of zeros would be left out, and look like a lost one.
                        "store_data_equal_to_fill_value": True,
                    },
                    create=True, context=self._context, transaction=transaction,
                )
                for array in created
            }  # fmt: skip
            stores = {name: future.result() for name, future in opened.items()}
            writes = []
            for name, box, values in parts:
                if name not in stores:
                    stores[name] = self._open(name, keep_zeros=True).with_transaction(transaction)
                writes.append(self._region(stores[name], box).write(values))
            for write in writes:
                write.copy.result()
            transaction.commit_async().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise StorageError(f"cannot write arrays to {self._folder}: {_words(error)}") from error

    def _path(self, name: str) -> dict[str, Any]:
        return {**self._kvstore, "path": f"{name}/"} if "base" in self._kvstore else {
            **self._kvstore, "path": f"{self._kvstore['path']}{name}/"
        }  # fmt: skip

    def _open(self, name: str, *, keep_zeros: bool = False) -> Any:
        spec: dict[str, Any] = {"driver": self._driver, "kvstore": self._path(name)}
        if keep_zeros:
            spec["store_data_equal_to_fill_value"] = True
        try:
            return self._ts.open(spec, open=True, context=self._context).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise CorruptCheckpointError(
                f"{self._folder}: array {name!r} cannot be opened: {_words(error)}"
            ) from error

    def _region(self, array: Any, box: Box) -> Any:
        if not box.shape:
            return array
        return array[tuple(slice(a, b) for a, b in zip(box.offsets, box.stop, strict=True))]


def can_store(dtype: str) -> bool:
    """Return whether zarr 3 in tensorstore has a dtype.

    Raises:
        MissingDependencyError: tensorstore is not installed.
    """
    try:
        tensorstore().dtype(dtype)
    except TypeError:
        return False
    return True


def _chunk_names(metadata: dict[str, Any], shape: Shape) -> Iterator[str]:
    """Yield the name of every chunk of an array, relative to the array."""
    if metadata["zarr_format"] == 2:
        chunks, prefix, empty = metadata["chunks"], "", "0"
        separator = metadata.get("dimension_separator", ".")
    else:
        if metadata["chunk_grid"]["name"] != "regular":
            raise ValueError(f"chunk grid {metadata['chunk_grid']['name']!r} is not known")
        chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        encoding = metadata["chunk_key_encoding"]
        is_default = encoding["name"] == "default"
        usual = "/" if is_default else "."
        separator = encoding.get("configuration", {}).get("separator", usual)
        prefix, empty = (f"c{separator}", "c") if is_default else ("", "0")
    if not shape:
        yield empty
        return
    counts = [range(-(-n // c)) for n, c in zip(shape, chunks, strict=True)]
    for index in itertools.product(*counts):
        yield prefix + separator.join(map(str, index))


def _zarr3_metadata(array: StoredArray) -> dict[str, Any]:
    """Return the metadata that Orbax itself writes: one sharded chunk per shard, zstd inside."""
    inner: list[dict[str, Any]] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL}},
    ]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": list(array.chunk), "codecs": inner, "index_codecs": index}
    return {
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _words(error: Exception) -> str:
    """Return the first line of an error; tensorstore appends the whole specification."""
    return str(error).split(" [tensorstore_spec=", 1)[0].splitlines()[0]
