"""Every private attribute of torch that is used here; tests/torch/test_private.py is the contract.

Layer: torch. Classes of optional parts (DTensor, DDP, FSDP1) are looked up among the imported
modules: where a module was never imported, no object of its class can exist, and importing it
would cost seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from shardckpt.errors import UnsupportedStateError

if TYPE_CHECKING:
    from collections.abc import Iterator

WRAPPER_PARTS: Final = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)
EXTRA_STATE: Final = "_extra_state"
_GATHERED: Final = (
    "{name}: FSDP parameters are gathered at the moment (after a forward pass without a "
    "backward pass). "
    "Restore before the first forward pass, or after a whole training step."
)


@dataclass(frozen=True, slots=True)
class FlatPart:
    """One original parameter under FSDP1: its elements `[start, stop)` lie in `local`, 1-D.

    Attributes:
        param: The parameter that the optimizer knows.
        shape: Its global shape.
        local: This rank's elements.
        start: First element.
        stop: One past the last one.
    """

    param: nn.Parameter
    shape: tuple[int, ...]
    local: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A DTensor placement as plain data: `dim` is None for a replica, `split` 1 unless strided."""

    dim: int | None
    split: int


def dtensor_class() -> type[torch.Tensor] | None:
    """Return DTensor, or None where nobody imported it."""
    return _imported("torch.distributed.tensor", "DTensor")


def local_tensor(dtensor: Any) -> torch.Tensor:
    """Return a DTensor's local tensor itself, which `to_local` would wrap for autograd."""
    local: torch.Tensor = dtensor._local_tensor
    return local


def spec_of(tensor: torch.Tensor) -> object:
    """Return mesh, placements and global shape of a DTensor as one object; None for others."""
    return getattr(tensor, "_spec", None)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or a DTensor's local one."""
    dtensor = dtensor_class()
    return local_tensor(tensor) if dtensor is not None and isinstance(tensor, dtensor) else tensor


def cut_of(placement: Any, what: str) -> Cut:
    """Return a placement as plain data.

    Raises:
        UnsupportedStateError: It is neither a shard nor a replica.
    """
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    if type(placement) is Replicate:
        return Cut(None, 1)
    if type(placement) is Shard:
        return Cut(placement.dim, 1)
    if type(placement) is _StridedShard:
        return Cut(placement.dim, int(placement.split_factor))
    raise UnsupportedStateError(
        f"{what}: DTensor with placement {placement} cannot be stored; redistribute it to "
        "Shard or Replicate "
        "(a Partial tensor holds sums that are not reduced yet)"
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and torch.compile."""
    ddp = _imported("torch.nn.parallel", "DistributedDataParallel")
    compiled = _imported("torch._dynamo.eval_frame", "OptimizedModule")
    while True:
        if ddp is not None and isinstance(module, ddp):
            module = module.module
        elif compiled is not None and isinstance(module, compiled):
            module = module._orig_mod
        else:
            return module


def classes_in(module: nn.Module) -> set[type]:
    """Return the classes of the module and of all its parts."""
    return set(map(type, module.modules()))


def inner_ddp_paths(module: nn.Module, classes: set[type]) -> list[str]:
    """Return the names of submodules wrapped in DistributedDataParallel, innermost first.

    Args:
        module: The module.
        classes: Those in it.
    """
    ddp = _imported("torch.nn.parallel", "DistributedDataParallel")
    if ddp is None or not any(issubclass(kind, ddp) for kind in classes):
        return []
    paths = [name for name, part in module.named_modules() if isinstance(part, ddp)]
    return sorted(paths, key=len, reverse=True)


def has_fsdp1(classes: set[type]) -> bool:
    """Return whether FullyShardedDataParallel is one of the classes in a module."""
    fsdp = _imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    return fsdp is not None and any(issubclass(kind, fsdp) for kind in classes)


def flat_parts(module: nn.Module, what: str) -> Iterator[tuple[str, FlatPart]]:
    """Yield raw name and part of every parameter that FSDP1 keeps flat and sharded.

    Raises:
        UnsupportedStateError: FSDP1 without original parameters.
    """
    fsdp = _imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    for path, wrapper in module.named_modules():
        handle = wrapper._handle if fsdp is not None and isinstance(wrapper, fsdp) else None
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise UnsupportedStateError(
                f"{what}: FullyShardedDataParallel at {path or 'the root'} hides its parameters; "
                "pass use_orig_params=True"
            )
        if any(extension is not None for extension in handle.flat_param._param_extensions):
            raise UnsupportedStateError(
                f"{what}: FullyShardedDataParallel over tensor-parallel parameters cannot be "
                "stored; use fully_shard"
            )
        if handle.uses_sharded_strategy:
            for name, part in _parts_of(handle):
                yield (f"{path}.{name}" if path else name), part


def flat_aliases(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield raw names of the tied parameters inside FSDP1 and the names they are stored under."""
    fsdp = _imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    for path, wrapper in module.named_modules():
        if fsdp is not None and isinstance(wrapper, fsdp) and wrapper._handle is not None:
            for info in wrapper._handle.flat_param._shared_param_infos:
                yield (
                    _joined(path, info.module_name, info.param_name),
                    _joined(path, info.prim_module_name, info.prim_param_name),
                )


def refuse_gathered(module: nn.Module, name: str) -> None:
    """Refuse to fill FSDP1 parameters of which a gathered copy is in use.

    Raises:
        UnsupportedStateError: They are gathered.
    """
    fsdp = _imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    for wrapper in module.modules():
        if fsdp is not None and isinstance(wrapper, fsdp) and wrapper._handle is not None:
            handle = wrapper._handle
            if handle.uses_sharded_strategy and not handle.is_sharded(handle.flat_param):
                raise UnsupportedStateError(_GATHERED.format(name=name))


def persistent_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield raw name and tensor of parameters and persistent buffers; `state_dict`, no hooks."""
    for path, part in module.named_modules(remove_duplicate=False):
        for name, param in part._parameters.items():
            if param is not None:
                yield _joined(path, "", name), param
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield _joined(path, "", name), buffer


def extra_states(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield raw key and value of every `get_extra_state`."""
    for path, part in module.named_modules(remove_duplicate=False):
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield _joined(path, "", EXTRA_STATE), part.get_extra_state()


def runs_step_hooks(optimizer: type) -> bool:
    """Return whether the class's `step` is wrapped by torch, which calls the hooks."""
    return bool(getattr(getattr(optimizer, "step", None), "hooked", False))


def default_store() -> Any:
    """Return the key-value store of the default process group."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _parts_of(handle: Any) -> Iterator[tuple[str, FlatPart]]:
    flat = handle.flat_param
    # Between a gather and the next reshard the flat parameter shows the gathered copy; the shard
    # is kept aside.
    shard = flat.data if handle.is_sharded(flat) else flat._local_shard
    rows = zip(flat._fqns, flat._params, flat._shapes, flat._shard_param_infos, strict=True)
    for name, param, shape, info in rows:
        if info.in_shard:
            first = info.offset_in_shard
            local = shard[first : first + info.numel_in_shard]
            start, stop = info.intra_param_start_idx, info.intra_param_end_idx + 1
        else:
            local, start, stop = shard[:0], 0, 0
        yield name, FlatPart(param, tuple(shape), local.detach(), start, stop)


def _imported(module: str, name: str) -> Any:
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
