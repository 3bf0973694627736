"""From a box of a target to what must be read of the saved arrays that it is made of.

Layer: load. Reads go straight into the target's memory, through its strides. Only where the saved
order cannot be written so, a part is read into a buffer and copied when all has been read.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import msgspec

from shardckpt.format.manifest import SavedTensor
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.factors import Link, View, views
from shardckpt.load.cast import Temporary, allocate
from shardckpt.load.plan import Wanted
from shardckpt.state import HostArray

if TYPE_CHECKING:
    from shardckpt.geometry.box import Box


class Source(msgspec.Struct, frozen=True, gc=False):
    """Saved arrays of one dtype that a target array is made of."""

    parts: tuple[tuple[SavedTensor, Link], ...]

    @property
    def spec(self) -> ArraySpec:
        """The spec of the first of them."""
        return self.parts[0][0].spec


def expand(source: Source, box: Box, target: HostArray) -> tuple[list[Wanted], list[Temporary]]:
    """Return what to read for a target box, and the copies to make afterwards.

    Args:
        source: What the target is made of.
        box: Region of the target.
        target: Its memory, of the saved dtype.
    """
    wanted: list[Wanted] = []
    copies: list[Temporary] = []
    for tensor, link in source.parts:
        for view in views(link, box, target.strides_bytes):
            if view.is_direct:
                memory = _at(target, view.offset_bytes, view.box.shape, view.strides_bytes)
                wanted.append(Wanted(tensor, view.box, memory))
                continue
            buffer = allocate(view.box.shape, source.spec.dtype)
            wanted.append(Wanted(tensor, view.box, buffer))
            copies.append(_copy(buffer, view, target, source.spec.dtype))
    return wanted, copies


def filled(value: int, target: HostArray, dtype: str) -> Temporary:
    """Return a copy of one number to every element of a target."""
    spec = ArraySpec((), "int64")
    number = allocate((), spec.dtype)
    ctypes.c_int64.from_address(number.address).value = value
    every = (0,) * len(target.shape)
    source = HostArray(number.address, target.shape, every, spec.itemsize_bytes, number)
    return Temporary(source, spec.dtype, target, dtype)


def _copy(buffer: HostArray, view: View, target: HostArray, dtype: str) -> Temporary:
    shape = tuple(axis[0] for axis in view.axes)
    item = buffer.itemsize_bytes
    return Temporary(
        _at(buffer, 0, shape, tuple(axis[1] * item for axis in view.axes)), dtype,
        _at(target, view.offset_bytes, shape, tuple(axis[2] for axis in view.axes)), dtype,
    )  # fmt: skip


def _at(
    memory: HostArray, offset_bytes: int, shape: tuple[int, ...], strides_bytes: tuple[int, ...]
) -> HostArray:
    return HostArray(
        memory.address + offset_bytes, shape, strides_bytes, memory.itemsize_bytes, memory
    )
