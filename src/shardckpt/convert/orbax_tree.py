"""The tree of an Orbax item: `_METADATA` to nodes and back. Pure.

Layer: convert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardckpt.convert.paths import Path, sequences_of
from shardckpt.errors import FormatError, UnsupportedStateError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

SEQUENCE: Final = 1
DICT: Final = 2
ARRAY_KINDS: Final = ("jax.Array", "np.ndarray", "scalar")
EMPTY_KINDS: Final = ("None", "Dict", "List", "Tuple", "NamedTuple")
STRING: Final = "string"


@dataclass(frozen=True, slots=True)
class Node:
    """One leaf of the tree, or an empty node.

    Attributes:
        path: Names and numbers from the root.
        kind: Orbax's word: an array, a scalar, a string, or what is empty.
        write_shape: Shape of what one device wrote, for jax.Array.
    """

    path: Path
    kind: str
    write_shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The name under which Orbax stores it."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class Tree:
    """What `_METADATA` says.

    Attributes:
        nodes: Leaves and empty nodes.
        dicts: Dicts whose entries are named 0, 1, 2, ..., which a key cannot tell from a list.
        is_ocdbt: Whether arrays lie in an OCDBT database; None where it does not say.
        is_zarr3: Whether arrays are zarr 3.
        keeps_fill: Whether chunks that hold nothing but zeros were stored.
    """

    nodes: tuple[Node, ...]
    dicts: frozenset[Path]
    is_ocdbt: bool | None
    is_zarr3: bool
    keeps_fill: bool


def parse_tree(data: Any, what: str) -> Tree:
    """Return the tree of a decoded `_METADATA`.

    Raises:
        FormatError: It has another form, a kind of value that is not known, or two leaves share a
            name.
    """
    nodes: list[Node] = []
    numbered: set[Path] = set()
    try:
        for entry in data["tree_metadata"].values():
            keys, value = entry["key_metadata"], entry["value_metadata"]
            path = tuple(str(key["key"]) for key in keys)
            for depth, key in enumerate(keys):
                if key["key_type"] == SEQUENCE:
                    numbered.add(path[:depth])
                elif key["key_type"] != DICT:
                    raise FormatError(f"{what}: {path} has a key of type {key['key_type']!r}")
            shape = value.get("write_shape")
            nodes.append(
                Node(path, str(value["value_type"]), None if shape is None else tuple(shape))
            )
        tree = Tree(
            tuple(nodes),
            frozenset(sequences_of(node.path for node in nodes) - numbered),
            data.get("use_ocdbt"),
            bool(data.get("use_zarr3", False)),
            bool(data.get("store_array_data_equal_to_fill_value", False)),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"{what}: not the tree of an Orbax checkpoint: {error!r}") from error
    for node in tree.nodes:
        if node.kind not in (*ARRAY_KINDS, *EMPTY_KINDS, STRING):
            raise FormatError(
                f"{what}: {node.name!r} is a {node.kind!r}, which is not known here. Save the item "
                "without it, or choose other arrays by --keys."
            )
    problem = _shared_name(tree.nodes)
    if problem:
        raise FormatError(f"{what}: {problem}")
    return tree


def tree_json(nodes: Sequence[Node], dicts: Collection[Path]) -> dict[str, Any]:
    """Return the `_METADATA` of a tree, with arrays in OCDBT and zarr 3.

    Args:
        nodes: Leaves and empty nodes.
        dicts: Dicts whose entries are named 0, 1, 2, ...

    Raises:
        UnsupportedStateError: Two leaves would share a name, or one lies inside another.
    """
    problem = _shared_name(nodes)
    if problem:
        raise UnsupportedStateError(f"Orbax cannot hold this state: {problem}. Rename one of them.")
    lists = sequences_of(node.path for node in nodes) - set(dicts)
    entries: dict[str, Any] = {}
    for node in nodes:
        keys = [
            {"key": name, "key_type": SEQUENCE if node.path[:depth] in lists else DICT}
            for depth, name in enumerate(node.path)
        ]
        value: dict[str, Any] = {
            "value_type": node.kind,
            "skip_deserialize": node.kind in EMPTY_KINDS,
        }
        if node.write_shape is not None:
            value["write_shape"] = list(node.write_shape)
        entries[str(node.path)] = {"key_metadata": keys, "value_metadata": value}
    return {
        "tree_metadata": entries,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _shared_name(nodes: Iterable[Node]) -> str:
    """Say which leaves cannot be told apart, or ""."""
    by_name: dict[str, Path] = {}
    for node in nodes:
        other = by_name.setdefault(node.name, node.path)
        if other != node.path:
            return f"{other} and {node.path} are both stored as {node.name!r}"
    paths = set(by_name.values())
    for path in paths:
        for depth in range(1, len(path)):
            if path[:depth] in paths:
                return f"{path[:depth]} is a leaf and holds {path}"
    return ""
