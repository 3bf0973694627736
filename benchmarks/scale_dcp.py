"""What torch's distributed checkpointing plans for the same jobs, in its own code.

A rank's arrays are given to its planner by the protocol that DTensor itself follows, so that any
rank can be planned for in one process; that spares it the offsets that DTensor works out. Left out:
the collectives by which plans, results and metadata travel, and the place of every shard in the
files, which its metadata holds as well.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from harness import resident_bytes
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shardckpt.staging.collector import no_garbage_collection

if TYPE_CHECKING:
    from scale_layouts import Job

    from shardckpt.geometry.layout import MeshLayout

PROPERTIES: Final = TensorProperties(dtype=torch.bfloat16)


@final
class Shard:
    """A rank's part of an array, as DTensor presents itself to the planner."""

    def __init__(
        self, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        """Take the box and the global shape."""
        self._offsets = offsets
        self._sizes = sizes
        self._shape = shape

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what DTensor returns."""
        offsets, sizes = torch.Size(self._offsets), torch.Size(self._sizes)
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                    properties=PROPERTIES,
                    size=torch.Size(self._shape),
                ),
            )
        ]


@dataclass(slots=True)
class DcpCase:
    """DCP's figures for one job.

    Attributes:
        local_plan_s: A rank's own plan, the mean over all ranks.
        global_plan_s: The coordinator's plan, deduplicated and validated.
        plans_bytes: Pickled plans of all ranks, which travel to the coordinator (from one rank's).
        metadata_bytes: Pickled metadata.
        unpickle_s: Time in which every rank that loads reads it.
        total_s: All of it in this process.
        memory_bytes: What the plans and the metadata take.
    """

    local_plan_s: float
    global_plan_s: float
    plans_bytes: int
    metadata_bytes: int
    unpickle_s: float
    total_s: float
    memory_bytes: int


def measure_dcp(job: Job) -> DcpCase:
    """Plan one save of a job, every rank's part of it."""
    resident = resident_bytes()
    began = time.perf_counter()
    layouts: dict[int, MeshLayout] = {}
    plans, local_s = [], 0.0
    coordinator = DefaultSavePlanner()
    with no_garbage_collection():
        for group in job.groups:
            for rank in group.ranks:
                state: dict[str, Any] = {}
                for tensor in group.tensors:
                    layout = layouts.get(id(tensor.mesh))
                    if layout is None:
                        layout = layouts[id(tensor.mesh)] = tensor.mesh.layout()
                    coordinate = layout.coordinate(rank)
                    assert coordinate is not None
                    box = layout.box_at(coordinate, tensor.shape)
                    state[tensor.key] = Shard(box.offsets, box.shape, tensor.shape)
                planner = DefaultSavePlanner() if rank else coordinator
                started = time.perf_counter()
                planner.set_up_planner(state, is_coordinator=rank == 0)
                plans.append(planner.create_local_plan())
                local_s += time.perf_counter() - started
        started = time.perf_counter()
        _, metadata = coordinator.create_global_plan(plans)
        global_s = time.perf_counter() - started
    data = pickle.dumps(metadata)
    started = time.perf_counter()
    pickle.loads(data)
    unpickle_s = time.perf_counter() - started
    return DcpCase(
        local_plan_s=local_s / job.world_size,
        global_plan_s=global_s,
        plans_bytes=job.world_size * len(pickle.dumps(plans[-1])),
        metadata_bytes=len(data),
        unpickle_s=unpickle_s,
        total_s=time.perf_counter() - began,
        memory_bytes=max(0, resident_bytes() - resident),
    )
