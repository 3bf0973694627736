"""Keys and the paths of a tree: one convention for everything that comes from a pytree. Pure.

Layer: convert. A key is the path's elements joined by `/`: names of dict entries and NamedTuple
fields, numbers of tuple and list entries. Inside an element `%`, `/` and control characters are
written as `%` and two hex digits, as `shardckpt.jax` writes them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

Path = tuple[str, ...]

# A typed random key is two leaves below its own key, as `shardckpt.jax` keeps it.
KEY_DATA: Final = "key_data"
KEY_IMPL: Final = "impl"

_ADAM: Final = {"mu": "adam_m", "nu": "adam_v"}
_ODD: Final = re.compile(r"[%/\x00-\x1f\x7f\ud800-\udfff]")


def key_of(path: Iterable[str]) -> str:
    """Return the key of a path.

    >>> key_of(("params", "a/b", "0"))
    'params/a%2Fb/0'
    """

    def code(found: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))

    return "/".join(_ODD.sub(code, element) for element in path)


def path_of(key: str) -> Path:
    """Return the path of a key.

    >>> path_of("params/a%2Fb/0")
    ('params', 'a/b', '0')
    """
    return tuple(unquote(part, errors="surrogatepass") for part in key.split("/"))


def roles_of(paths: Collection[Path]) -> dict[Path, str]:
    """Return the role of each array by the names that optax and the usual training states give.

    Adam's moments are what lies below `mu` and `nu`, where both are there.

    >>> roles_of([("params", "w"), ("opt", "0", "mu", "w"), ("opt", "0", "nu", "w")])[
    ...     ("opt", "0", "mu", "w")
    ... ]
    'adam_m'
    """
    parents = {path[: depth + 1] for path in paths for depth in range(len(path))}
    return {path: _role(path, parents) for path in paths}


def sequences_of(paths: Iterable[Path]) -> set[Path]:
    """Return the nodes whose children are numbered 0, 1, 2, ... without a gap: tuples and lists."""
    children: dict[Path, set[str]] = {}
    for path in paths:
        for depth in range(len(path)):
            children.setdefault(path[:depth], set()).add(path[depth])
    return {
        node for node, names in children.items() if names == {str(i) for i in range(len(names))}
    }


def _role(path: Path, parents: set[Path]) -> str:
    for depth, element in enumerate(path):
        before = path[:depth]
        if element in _ADAM and all((*before, name) in parents for name in _ADAM):
            return _ADAM[element]
    if path[-1] == "count":
        return "count"
    return "param" if "params" in path else "other"
