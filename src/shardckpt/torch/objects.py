"""State that is no module and no optimizer: schedulers, scalers, loaders, random numbers, values.

Layer: torch. A stateful object is what its `state_dict()` says: tensors in it become leaves
`<name>/<path>`, the rest one tagged JSON value `<name>`. Values of one rank alone (`PerRank`,
`RngState`, torchdata's StatefulDataLoader) are one JSON value per rank, tensors included.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, final, runtime_checkable

import numpy as np
import torch

from shardckpt import state
from shardckpt.errors import FormatError, StateMismatchError, UnsupportedStateError
from shardckpt.format.tagged import decode, encode
from shardckpt.options import PER_RANK_RULES, PerRankRule
from shardckpt.state import Leaf, PerRank, PerRankValue
from shardckpt.torch import private
from shardckpt.torch.copies import check_fillable
from shardckpt.torch.dtypes import torch_dtype
from shardckpt.torch.values import (
    MAX_PER_RANK_BYTES,
    collector,
    decode_inline,
    encode_inline,
    references,
    resolver,
)

if TYPE_CHECKING:
    from shardckpt.backend import SavedState
    from shardckpt.torch.shards import Leaves


@runtime_checkable
class Stateful(Protocol):
    """An object that says what its state is and takes it back."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state."""


@final
class RngState:
    """Stands for the random generators of this process: Python, NumPy's global one, torch, CUDA.

    Every rank has its own. On another world size there is no right value for each rank, and giving
    all ranks that of rank 0 would make them draw the same numbers; so by default the generators
    then stay as the job seeded them and a warning says so (rule "drop").
    """

    def __init__(self, rule: PerRankRule = "drop") -> None:
        """Choose what another world size does.

        Args:
            rule: "drop" keeps the job's own seeds, "error" refuses, "rank0" gives all ranks those
                of rank 0.

        Raises:
            ValueError: An unknown rule.
        """
        if rule not in PER_RANK_RULES:
            raise ValueError(f"RngState rule is {rule!r}; use one of {', '.join(PER_RANK_RULES)}")
        self.rule: Final = rule

    def state_dict(self) -> dict[str, object]:
        """Return the state of every generator."""
        version, words, gauss = random.getstate()
        state: dict[str, object] = {
            "python": (version, array("I", words).tobytes(), gauss),
            "numpy": np.random.get_state(legacy=True),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every generator; CUDA devices that are not here are left out.

        Raises:
            FormatError: The state is malformed.
        """
        version, words, gauss = state_dict["python"]
        unpacked = array("I")
        unpacked.frombytes(words)
        random.setstate((version, tuple(unpacked), gauss))
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        saved_devices = state_dict.get("cuda", [])
        if not isinstance(saved_devices, list):
            raise FormatError("the random state of CUDA devices is not a list")
        if torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), saved_devices, strict=False):
                torch.cuda.set_rng_state(state, device)


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    """What `give` will hand to one owner.

    Attributes:
        leaves: Tensors to fill.
        tensors: The same tensors by the path that the JSON refers to.
    """

    leaves: tuple[Leaf, ...]
    tensors: dict[str, torch.Tensor]


def as_per_rank(value: object) -> PerRank | None:
    """Return the PerRank that a value is or stands for, or None."""
    if isinstance(value, RngState):
        return PerRank(value, value.rule)
    return state.as_per_rank(value)


def describe_per_rank(name: str, value: PerRank) -> PerRankValue:
    """Return this rank's value as tagged JSON.

    Raises:
        UnsupportedStateError: It cannot be stored exactly.
    """
    inner = value.value.state_dict() if isinstance(value.value, Stateful) else value.value
    extension = partial(encode_inline, max_bytes=MAX_PER_RANK_BYTES)
    return PerRankValue(encode(inner, name, extension=extension), value.rule)


def describe_object(name: str, value: object, leaves: Leaves) -> tuple[list[Leaf], object]:
    """Return the leaves and the tagged JSON of a stateful object or a plain value.

    Raises:
        UnsupportedStateError: It cannot be stored exactly.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = encode(_content(value), name, extension=collector(name, tensors))
    return [
        leaves.leaf(f"{name}/{path}", tensor, "other") for path, tensor in tensors.items()
    ], content


def plan_object(name: str, value: object, saved: SavedState, leaves: Leaves) -> ObjectPlan:
    """Allocate the tensors that the saved value of `name` refers to.

    Raises:
        FormatError: The saved value is malformed.
        StateMismatchError: The value was renamed without its tensors.
        UnsupportedStateError: A sharded tensor has no counterpart in the object now.
    """
    if name not in saved.objects:
        return ObjectPlan((), {})
    found: list[str] = []
    decode(saved.objects[name], extension=references(found), what=name)
    if not found:
        return ObjectPlan((), {})
    present: dict[str, torch.Tensor] = {}
    encode(_content(value), name, extension=collector(name, present))
    planned: list[Leaf] = []
    tensors: dict[str, torch.Tensor] = {}
    for path in found:
        key = f"{name}/{path}"
        like = present.get(path)
        row = saved.leaves.get(saved.aliases.get(key, key))
        if row is None:
            raise StateMismatchError(
                f"{name}: the saved value refers to a tensor {key!r}, which was not saved "
                "under this name; rename an "
                "object together with its tensors"
            )
        if like is not None and leaves.is_dtensor(like):
            tensor = torch.empty_like(like, dtype=torch_dtype(row.spec.dtype, key))
        elif row.is_sharded:
            raise UnsupportedStateError(
                f"{key}: saved as a sharded tensor inside {name}, but the object has no "
                "DTensor there now to show how "
                "it is cut; build the object as it was before restoring"
            )
        else:
            device = "cpu" if like is None else like.device
            tensor = torch.empty(
                row.spec.shape, dtype=torch_dtype(row.spec.dtype, key), device=device
            )
        tensors[path] = tensor
        planned.append(leaves.leaf(key, tensor, "other"))
    return ObjectPlan(tuple(planned), tensors)


def plan_tensor(name: str, tensor: torch.Tensor, leaves: Leaves) -> Leaf:
    """Return the leaf of a tensor of the state itself, to be filled in place.

    Raises:
        UnsupportedStateError: It cannot be filled.
    """
    local = private.local_tensor(tensor) if leaves.is_dtensor(tensor) else tensor
    check_fillable(local, name)
    return leaves.leaf(name, tensor, "other")


def give(name: str, owner: object, saved: object, tensors: dict[str, torch.Tensor]) -> object:
    """Hand a saved value to its owner, or return it where the owner is a plain value.

    Raises:
        StateMismatchError: The owner refused it.
    """
    value = decode(saved, extension=resolver(tensors) if tensors else decode_inline, what=name)
    if not isinstance(owner, Stateful):
        return value
    try:
        owner.load_state_dict(value)
    except Exception as error:
        raise StateMismatchError(
            f"{name}: {type(owner).__module__}.{type(owner).__qualname__}.load_state_dict() "
            "refused the saved value: "
            f"{type(error).__name__}: {error}"
        ) from error
    return owner


def give_per_rank(name: str, owner: object, saved: object) -> object:
    """Hand a rank's own value to its owner, or return what takes its place in the state.

    Raises:
        StateMismatchError: The owner refused it.
    """
    marked = as_per_rank(owner)
    assert marked is not None
    given = give(name, marked.value, saved, {})
    return owner if given is marked.value else replace(marked, value=given)


def _content(value: object) -> object:
    return value.state_dict() if isinstance(value, Stateful) else value
