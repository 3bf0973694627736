"""Any pytree as named leaves: keys that say nothing of containers, and what leaves mean.

Layer: jax. A key is the names, fields and indices on the way to a leaf, joined by `/`. Whether a
list, a tuple, a dict or a dataclass stood there is not part of it, so that states whose paths agree
fit each other. The one value of a Flax nnx Variable has the key of the Variable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import jax
from jax import numpy as jnp
from jax import tree_util

from shardckpt.errors import UnsupportedStateError
from shardckpt.jax import private
from shardckpt.state import check_distinct

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Role of arrays outside of any optimizer's state; `shards` makes it "param" or "other" by dtype.
OUTSIDE: Final = ""
OTHER: Final = "other"
_ODD: Final = re.compile(r"[%/\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Tree:
    """One named value of the state, taken apart.

    Attributes:
        leaves: Its leaves, in JAX's order.
        keys: Key of each.
        roles: Role of each.
        structure: What puts new leaves together again.
    """

    leaves: list[Any]
    keys: tuple[str, ...]
    roles: tuple[str, ...]
    structure: Any


@dataclass(frozen=True, slots=True)
class _Known:
    structure: Any
    keys: tuple[str, ...]
    roles: tuple[str, ...]


@final
class Trees:
    """Takes values apart; what depends on their structure alone is found once."""

    def __init__(self) -> None:
        """Start with nothing known."""
        self._known: dict[str, _Known] = {}

    def of(self, state: Mapping[str, Any]) -> dict[str, Tree]:
        """Return every named value of the state, taken apart.

        Raises:
            UnsupportedStateError: No mapping of names, keys that JAX cannot sort, or two leaves of
                one key.
        """
        if not hasattr(state, "items"):
            raise UnsupportedStateError(
                f"the state is a {type(state).__qualname__}; pass a mapping such as "
                "{'params': params, 'opt_state': opt_state}"
            )
        trees: dict[str, Tree] = {}
        for name, value in state.items():
            if not isinstance(name, str) or not name:
                raise UnsupportedStateError(f"the state: names are non-empty strings, got {name!r}")
            trees[name] = self._tree(name, value)
        return trees

    def _tree(self, name: str, value: Any) -> Tree:
        try:
            leaves, structure = tree_util.tree_flatten(value)
        except ValueError as error:
            raise UnsupportedStateError(
                f"{name}: JAX cannot take this value apart: {error}"
            ) from error
        known = self._known.get(name)
        if known is None or known.structure != structure:
            named = list(_walk(value, escaped(name), OUTSIDE))
            keys = tuple(key for key, _ in named)
            check_distinct(keys)
            assert len(keys) == len(leaves)
            known = _Known(structure, keys, tuple(role for _, role in named))
            self._known[name] = known
        return Tree(leaves, known.keys, known.roles, structure)


def escaped(part: str) -> str:
    """Return one part of a key, in which nothing can be taken for a separator.

    >>> escaped("a/b%")
    'a%2Fb%25'
    """

    def code(found: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))

    return _ODD.sub(code, part)


def _walk(node: Any, prefix: str, role: str) -> Iterator[tuple[str, str]]:
    """Yield key and role of every leaf below a node, in JAX's order."""

    def stops(inner: Any) -> bool:
        return inner is not node and _is_named(inner)

    if private.is_optimizer_state(node):
        roles = private.ROLES.get(type(node).__name__, {})
        for field in type(node)._fields:
            yield from _walk(getattr(node, field), f"{prefix}/{field}", roles.get(field, OTHER))
        return
    # The value of a Variable has the path of the Variable itself.
    skipped = 1 if private.is_variable(node) else 0
    for path, leaf in tree_util.tree_flatten_with_path(node, is_leaf=stops)[0]:
        key = "/".join([prefix, *(_part(step) for step in path[skipped:])])
        if leaf is not node and _is_named(leaf):
            yield from _walk(leaf, key, role)
        else:
            yield key, role


def _is_named(node: Any) -> bool:
    return private.is_optimizer_state(node) or private.is_variable(node)


def _part(step: Any) -> str:
    match step:
        case tree_util.DictKey(key=key) | tree_util.FlattenedIndexKey(key=key):
            return escaped(str(key))
        case tree_util.SequenceKey(idx=index):
            return str(index)
        case tree_util.GetAttrKey(name=name):
            return escaped(name)
    return escaped(str(step))


def is_key_array(value: Any) -> bool:
    """Return whether an array or its description holds typed random keys."""
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))
