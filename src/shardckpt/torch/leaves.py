"""Modules as leaves: names, tied tensors, extra state.

Layer: torch. Keys are those of `state_dict()` on the plain module: wrappers
(DistributedDataParallel, torch.compile, activation checkpointing, FSDP1) leave no trace, so a
state saved under one wrapper loads under another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from torch import nn

from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.torch import private
from shardckpt.torch.copies import check_fillable
from shardckpt.torch.private import EXTRA_STATE, WRAPPER_PARTS, FlatPart

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardckpt.state import Leaf
    from shardckpt.torch.shards import Leaves

_NOBODY: Final[Mapping[int, int]] = {}


@dataclass(frozen=True, slots=True)
class ParamRef:
    """A parameter by its name in the module.

    Attributes:
        name: Name in the module, or the name under which a tied parameter is stored.
        param: What the optimizer knows it by.
        flat: Its part of FSDP1's flat memory, if it lies there.
        tied_names: Its other names.
    """

    name: str
    param: torch.Tensor
    flat: FlatPart | None
    tied_names: tuple[str, ...] = ()


@final
class ModuleView:
    """One module of the state, looked at once."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """Look at the module; FSDP2 goes back to its shards, without communication.

        Args:
            name: Its name in the state.
            module: The module, wrapped or not.

        Raises:
            UnsupportedStateError: Two tensors get one name, or FSDP1 hides its parameters.
        """
        self.name = name
        self.module = private.unwrapped(module)
        self.tensors: dict[str, torch.Tensor] = {}
        self.flat: dict[str, FlatPart] = {}
        self.aliases: dict[str, str] = {}
        self.extra: dict[str, object] = {}
        classes = private.classes_in(self.module)
        self._ddp_paths = private.inner_ddp_paths(self.module, classes)
        if private.has_fsdp1(classes):
            self._look_at_fsdp1()
        else:
            # Keeping variables gives the module's own tensors: no detached copies, and parameters
            # are recognised.
            self._add(self.module.state_dict(keep_vars=True).items())
        self._find_ties()

    def params(self) -> dict[int, ParamRef]:
        """Return the parameters by identity."""
        tied: dict[str, tuple[str, ...]] = {}
        for alias, stored in self.aliases.items():
            tied[stored] = (*tied.get(stored, ()), alias)
        refs = {
            id(part.param): ParamRef(name, part.param, part, tied.get(name, ()))
            for name, part in self.flat.items()
        }
        for name, tensor in self.tensors.items():
            refs.setdefault(id(tensor), ParamRef(name, tensor, None, tied.get(name, ())))
        return refs

    def leaves(self, leaves: Leaves, owners: Mapping[int, int] = _NOBODY) -> list[Leaf]:
        """Return the module's leaves, tied tensors once.

        Args:
            leaves: Makes them.
            owners: Fence of the optimizer that owns a parameter, by the parameter's identity.

        Raises:
            UnsupportedStateError: A tensor cannot be stored exactly.
        """
        prefix = f"{self.name}/"
        found = [
            leaves.leaf(prefix + name, tensor, "param", owners.get(id(tensor), 0))
            if isinstance(tensor, nn.Parameter)
            else leaves.leaf(prefix + name, tensor, "buffer")
            for name, tensor in self.tensors.items()
        ]
        found += [
            leaves.flat(prefix + name, part, part.local, "param", owners.get(id(part.param), 0))
            for name, part in self.flat.items()
        ]
        return found

    def causes(self, owners: Mapping[int, int]) -> object:
        """Return what the leaves follow from besides the tensors; cheap to compare."""
        return [*self.tensors], [owners.get(id(tensor), 0) for tensor in self.tensors.values()]

    def check_fillable(self) -> None:
        """Refuse a module whose tensors cannot be filled in place.

        Raises:
            UnsupportedStateError: A tensor is a copy made for `state_dict`, is gathered, or shares
                memory.
        """
        if self.flat:
            private.refuse_gathered(self.module, self.name)
        own = {id(tensor) for _, tensor in private.persistent_tensors(self.module)}
        foreign = [
            name
            for name, tensor in self.tensors.items()
            if id(tensor) not in own and tensor.numel()
        ]
        if foreign:
            # A hook may give a view of the module's memory, which is as good as the tensor itself.
            memory = {_storage(tensor) for _, tensor in private.persistent_tensors(self.module)}
            for name in foreign:
                if _storage(self.tensors[name]) not in memory:
                    raise UnsupportedStateError(
                        f"{self.name}/{name}: state_dict() gives a copy that a hook made, not "
                        "the module's own tensor, "
                        "so it cannot be filled in place. Wrap the module in an object with "
                        "its own load_state_dict()."
                    )
        for name, tensor in self.tensors.items():
            check_fillable(private.plain(tensor), f"{self.name}/{name}")

    def set_extra(self, name: str, value: object) -> None:
        """Hand an extra state to the submodule it belongs to.

        Raises:
            StateMismatchError: The submodule refused it.
        """
        for raw, part in self.module.named_modules(remove_duplicate=False):
            if self._clean(f"{raw}.{EXTRA_STATE}" if raw else EXTRA_STATE) == name:
                try:
                    part.set_extra_state(value)
                except Exception as error:
                    raise StateMismatchError(
                        f"{self.name}/{name}: {type(part).__qualname__}.set_extra_state() "
                        "refused the saved value: "
                        f"{error}"
                    ) from error
                return

    def _look_at_fsdp1(self) -> None:
        # state_dict() of FSDP1 gathers; its parts are read from the flat parameters instead.
        for raw, part in private.flat_parts(self.module, self.name):
            self.flat[self._clean(raw)] = part
        ties = {
            self._clean(raw): self._clean(stored)
            for raw, stored in private.flat_aliases(self.module)
        }
        self.aliases.update(ties)
        skipped = self.flat.keys() | ties.keys()
        raws = private.persistent_tensors(self.module)
        self._add((raw, tensor) for raw, tensor in raws if self._clean(raw) not in skipped)
        self._add(private.extra_states(self.module))

    def _add(self, items: Iterable[tuple[str, object]]) -> None:
        for raw, value in items:
            name = self._clean(raw)
            if name in self.tensors or name in self.extra:
                raise UnsupportedStateError(
                    f"{self.name}/{name}: two tensors of the module have this name"
                )
            if name.rpartition(".")[2] == EXTRA_STATE:
                self.extra[name] = value
            elif isinstance(value, torch.Tensor):
                self.tensors[name] = value
            else:
                raise UnsupportedStateError(
                    f"{self.name}/{name}: state_dict() holds a {type(value).__qualname__}; "
                    "only tensors and "
                    "get_extra_state() values can be restored into a module"
                )

    def _clean(self, raw: str) -> str:
        for path in self._ddp_paths:
            inner = f"{path}.module." if path else "module."
            if raw.startswith(inner):
                raw = (f"{path}." if path else "") + raw[len(inner) :]
        if not any(part in raw for part in WRAPPER_PARTS):
            return raw
        return ".".join(part for part in raw.split(".") if part not in WRAPPER_PARTS)

    def _find_ties(self) -> None:
        """Keep the first name of each tied tensor; the other names become aliases."""
        by_object: dict[int, str] = {}
        by_memory: dict[tuple[object, ...], str] = {}
        dtensor = private.dtensor_class()
        for name, tensor in list(self.tensors.items()):
            first = by_object.setdefault(id(tensor), name)
            # Identity only for DTensors: a rank with an empty shard could not see the tie in its
            # memory.
            if (
                first == name
                and (dtensor is None or not isinstance(tensor, dtensor))
                and _has_memory(tensor)
            ):
                memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                first = by_memory.setdefault(memory, name)
            if first != name:
                self.aliases[name] = first
                del self.tensors[name]


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _storage(tensor: torch.Tensor) -> int:
    local = private.plain(tensor)
    return local.untyped_storage().data_ptr() if _has_memory(local) else 0
