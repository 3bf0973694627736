"""Everything of JAX that is not public, in one place; tests/jax/test_private.py is the contract.

Layer: jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import jax
from jax._src import distributed, sharding_impls
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

_layouts: Final[dict[Any, Any]] = {}


def client() -> Any:
    """Return the client of the distributed runtime's key-value store; None where there is none."""
    return distributed.global_state.client


def key_words(array: Any) -> jax.Array:
    """Return the uint32 array that a typed key array is made of, without a computation.

    `jax.random.key_data` is traced and compiled, and would follow the mesh that is in use.
    """
    words: jax.Array = array._base_array
    return words


def device_layout(array: Any) -> Any:
    """Return how the elements of each part of an array lie in memory; None where unknown."""
    try:
        own = array._pjrt_layout
    except jax.errors.JaxRuntimeError:  # Not every runtime tells.
        return array.format.layout
    # The public form is made anew at every call, and thousands of arrays share a few.
    if own not in _layouts:
        _layouts[own] = array.format.layout
    return _layouts[own]


def key_impl(dtype: Any) -> tuple[str, tuple[int, ...]]:
    """Return name of the implementation and words of a key, of the dtype of a key array."""
    return dtype._impl.name, tuple(dtype._impl.key_shape)


def words_sharding(keys: Any, shape: tuple[int, ...]) -> Any:
    """Return the sharding of the words of typed keys, each key whole on its device.

    Args:
        keys: Description of the keys, with a sharding.
        shape: Shape of the words.
    """
    sharding = keys.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (len(keys.shape) - len(sharding.spec)))
        extra = len(shape) - len(keys.shape)
        return sharding.update(spec=PartitionSpec(*spec, *[None] * extra))
    return sharding_impls.physical_sharding(keys, sharding)


def is_variable(value: object) -> bool:
    """Return whether a value is a Variable of Flax nnx, which holds one value of the state."""
    return _is_of("flax.nnx", "Variable", type(value).__mro__)


def is_optimizer_state(value: object) -> bool:
    """Return whether a value is a named tuple of optax, or named like those that have roles."""
    kind = type(value)
    if not (isinstance(value, tuple) and hasattr(kind, "_fields")):
        return False
    return kind.__module__.split(".")[0] == "optax" or kind.__name__ in ROLES


# By type and field. Optimizers of other packages use the names of optax for what means the same.
ROLES: dict[str, dict[str, str]] = {
    "ScaleByAdamState": {"count": "count", "mu": "adam_m", "nu": "adam_v"},
    "ScaleByAmsgradState": {"count": "count", "mu": "adam_m", "nu": "adam_v"},
    "ScaleByScheduleState": {"count": "schedule"},
    "TraceState": {"trace": "momentum"},
}


def _is_of(package: str, name: str, classes: Iterable[type]) -> bool:
    return any(
        c.__name__ == name and (c.__module__ == package or c.__module__.startswith(f"{package}."))
        for c in classes
    )
