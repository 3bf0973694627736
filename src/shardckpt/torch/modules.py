"""Modules to named tensors: parameters, persistent buffers, extra state. No communication.

Layer: torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from shardckpt.errors import UnsupportedStateError
from shardckpt.torch.private import FlatRange, flat_ranges, is_fsdp1, unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

_WRAPPERS: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_EXTRA: Final = "_extra_state"


@dataclass(slots=True)
class NamedTensors:
    """What one module holds.

    Attributes:
        tensors: By canonical name.
        parameters: Names that are parameters.
        flat: For FSDP1, the part of each parameter held here, by id.
        extra: Modules with extra state, by name.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    flat: dict[int, FlatRange] = field(default_factory=dict)
    extra: dict[str, nn.Module] = field(default_factory=dict)


def named_tensors(key: str, module: nn.Module) -> NamedTensors:
    """Return every parameter and persistent buffer of a module under its canonical name.

    Raises:
        UnsupportedStateError: FSDP1 without `use_orig_params=True`.
    """
    module = unwrapped(module)
    found = NamedTensors()
    if any(is_fsdp1(part) for part in module.modules()):
        ranges = flat_ranges(module)
        if ranges is None:
            raise UnsupportedStateError(
                f"{key}: FullyShardedDataParallel keeps one flat parameter, whose original "
                "shapes cannot be saved "
                "without communication. Wrap with use_orig_params=True, or use fully_shard."
            )
        found.flat = ranges
        tensors: Mapping[str, torch.Tensor] = _walk(module)
    else:
        # The hooks of fully_shard bring parameters into their sharded form here.
        tensors = {
            k: v
            for k, v in module.state_dict(keep_vars=True).items()
            if isinstance(v, torch.Tensor)
        }
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] != _EXTRA:
            found.tensors[canonical(name)] = tensor
    found.parameters = {n for n, t in found.tensors.items() if isinstance(t, nn.Parameter)}
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            found.extra[canonical(f"{name}.{_EXTRA}" if name else _EXTRA)] = part
    return found


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return the name of every parameter by id; several modules prefix theirs."""
    names: dict[int, str] = {}
    for key, module in sorted(modules.items()):
        prefix = f"{key}." if len(modules) > 1 else ""
        pairs = unwrapped(module).named_parameters(remove_duplicate=False)
        for name, parameter in _sorted(pairs):
            names.setdefault(id(parameter), prefix + name)
    return names


def canonical(name: str) -> str:
    """Return a parameter's name without the parts that wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _sorted(pairs: Any) -> list[tuple[str, nn.Parameter]]:
    return sorted(((canonical(n), p) for n, p in pairs), key=lambda pair: pair[0])


def _walk(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for name, part in module.named_modules(remove_duplicate=False):
        for buffer_name, buffer in part._buffers.items():
            if buffer is not None and buffer_name not in part._non_persistent_buffers_set:
                tensors[f"{name}.{buffer_name}" if name else buffer_name] = buffer
    return tensors
