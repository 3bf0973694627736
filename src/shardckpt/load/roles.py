"""Where a framework keeps the optimizer state of a parameter, by role. Pure.

Layer: load. torch: `<optimizer>/state/<parameter>/<name>`. JAX: the path of an optax state ends
with a field (`mu`, `nu`, `trace`) and the path of the parameter, whatever chain stands around it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from shardckpt.load.rules import Side

COUNT: Final = "count"
SCHEDULE: Final = "schedule"
TORCH_STATE: Final = {
    "adam_m": "exp_avg",
    "adam_v": "exp_avg_sq",
    "adam_v_max": "max_exp_avg_sq",
    "momentum": "momentum_buffer",
    COUNT: "step",
}
_OF_TORCH: Final = {name: role for role, name in TORCH_STATE.items()}
_OF_OPTAX: Final = {"mu": "adam_m", "nu": "adam_v", "nu_max": "adam_v_max", "trace": "momentum"}
_MOMENTS: Final = frozenset(_OF_OPTAX.values())
_TORCH_KEY: Final = re.compile(r"(.+?)/state/(.+)/([^/]+)")


@dataclass(slots=True)
class OptimizerSlots:
    """Keys of optimizer state.

    Attributes:
        moments: By role and name of the parameter; more than one key where it is ambiguous.
        counts: Steps that were made.
        schedules: Steps that a schedule has made.
        others: Everything else outside of the model.
    """

    moments: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    counts: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is no state that a first step makes."""
        return not self.moments and not self.counts


def optimizer_slots(
    side: Side, roles: Mapping[str, str], params: Collection[str], model: str
) -> OptimizerSlots:
    """Return the optimizer state among some keys.

    Args:
        side: The framework.
        roles: Role of every array, by key.
        params: Names of the model's arrays.
        model: Name of the model in the state; its own keys are left out.
    """
    slots = OptimizerSlots()
    for key, told in roles.items():
        if key.startswith(f"{model}/"):
            continue
        if side == "torch":
            role, param = _torch_slot(key, params, model)
        else:
            role, param = _jax_slot(key, told, params)
        if role == COUNT:
            slots.counts.append(key)
        elif role == SCHEDULE:
            slots.schedules.append(key)
        elif role:
            slots.moments.setdefault((role, param), []).append(key)
        else:
            slots.others.append(key)
    return slots


def _torch_slot(key: str, params: Collection[str], model: str) -> tuple[str, str]:
    found = _TORCH_KEY.fullmatch(key)
    if found is None:
        return "", ""
    # An optimizer over several modules says which.
    param = found[2] if found[2] in params else found[2].removeprefix(f"{model}.")
    return (_OF_TORCH.get(found[3], ""), param) if param in params else ("", "")


def _jax_slot(key: str, told: str, params: Collection[str]) -> tuple[str, str]:
    if told in (COUNT, SCHEDULE):
        return told, ""
    for parent, path in _suffixes(key):
        if path in params:
            named = _OF_OPTAX.get(parent, "")
            return told if told in _MOMENTS else named, path
    return (COUNT if key.rsplit("/", 1)[-1] == COUNT else ""), ""


def _suffixes(key: str) -> Iterator[tuple[str, str]]:
    """Yield every path at the end of a key, the longest first, and the part before it."""
    parts = key.split("/")
    for at in range(1, len(parts)):
        yield parts[at - 1], "/".join(parts[at:])
