"""Tagged JSON: plain Python values that come back exactly as they were. No pickle, no code.

Layer: format. JSON scalars, lists and string-keyed dicts stand for themselves. Everything else is
an object with a `$` field: tuples, sets, bytes, non-string keys, special floats, Counter,
OrderedDict, complex, numpy arrays.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np

from shardckpt.errors import FormatError, UnsupportedStateError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Encode: TypeAlias = Callable[[object, str], object | None]
Decode: TypeAlias = Callable[[object], object]

MAX_DEPTH: Final = 64
_INT_BITS: Final = 63
_ARRAY_KINDS: Final = "biufc"
_SEQUENCES: Final[dict[type, str]] = {
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
}


def encode(value: object, path: str, *, extension: Encode | None = None, _depth: int = 0) -> Json:
    """Return the tagged JSON of `value`.

    Args:
        value: Any nesting of the supported kinds.
        path: Key of the value, for messages.
        extension: Turns a value of an unknown kind into a JSON-able one, or returns None.

    Raises:
        UnsupportedStateError: Some part is of an unknown kind or nested too deep; names its path.
    """
    if _depth > MAX_DEPTH:
        raise UnsupportedStateError(f"{path}: nested deeper than {MAX_DEPTH} levels")

    def inner(item: object, step: object) -> Json:
        return encode(item, f"{path}/{step}", extension=extension, _depth=_depth + 1)

    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value  # type: ignore[return-value]
    if kind is int:
        assert isinstance(value, int)
        return value if value.bit_length() <= _INT_BITS else {"$": "int", "v": hex(value)}
    if kind is float:
        assert isinstance(value, float)
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
    if isinstance(value, list) and kind is list:
        return [inner(item, i) for i, item in enumerate(value)]
    if isinstance(value, dict) and kind in (dict, OrderedDict, Counter):
        return _encode_dict(value, inner)
    if isinstance(value, (tuple, set, frozenset, deque)):
        named = _SEQUENCES.get(kind)
        if named is not None:
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            encoded: dict[str, Json] = {"$": named, "v": [inner(x, i) for i, x in enumerate(items)]}
            if isinstance(value, deque):
                encoded["maxlen"] = value.maxlen
            return encoded
    if isinstance(value, (bytes, bytearray)) and kind in (bytes, bytearray):
        return {"$": kind.__name__, "v": base64.b64encode(value).decode()}
    if isinstance(value, complex) and kind is complex:
        return {"$": "complex", "v": [inner(value.real, "re"), inner(value.imag, "im")]}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in _ARRAY_KINDS:
        return _encode_array(value)
    if extension is not None:
        extended = extension(value, path)
        if extended is not None:
            return {"$": "x", "v": extended}  # type: ignore[dict-item]
    raise UnsupportedStateError(
        f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be stored exactly. Keep plain "
        "values, "
        "arrays and tensors in the state, or give the object state_dict() and load_state_dict()."
    )


def decode(value: object, *, extension: Decode | None = None, what: str = "value") -> object:
    """Return the Python value of tagged JSON.

    Raises:
        FormatError: An unknown tag or a malformed one.
    """
    if isinstance(value, list):
        return [decode(item, extension=extension, what=what) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {k: decode(v, extension=extension, what=what) for k, v in value.items()}
    try:
        return _decode_tag(value, lambda v: decode(v, extension=extension, what=what), extension)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{what}: malformed {value.get('$')!r} value: {error}") from error


def _encode_dict(value: dict[object, object], inner: Callable[[object, object], Json]) -> Json:
    named = {OrderedDict: "OrderedDict", Counter: "Counter"}.get(type(value))
    if named is None and all(type(key) is str for key in value) and "$" not in value:
        return {str(key): inner(item, key) for key, item in value.items()}
    pairs: list[Json] = [[inner(key, "key"), inner(item, key)] for key, item in value.items()]
    return {"$": named or "dict", "v": pairs}


def _encode_array(value: np.ndarray | np.generic) -> Json:
    array = np.asarray(value)
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return {
        "$": "ndarray" if isinstance(value, np.ndarray) else "scalar",
        "dtype": array.dtype.newbyteorder("=").name,
        "shape": list(array.shape),
        "v": base64.b64encode(little.tobytes()).decode(),
    }


def _decode_array(value: dict[str, object]) -> object:
    dtype = np.dtype(str(value["dtype"]))
    shape = value["shape"]
    if dtype.kind not in _ARRAY_KINDS or not isinstance(shape, list):
        raise FormatError(f"array of dtype {dtype} is not stored by this format")
    data = base64.b64decode(str(value["v"]), validate=True)
    array = np.frombuffer(data, dtype=dtype.newbyteorder("<")).astype(dtype).reshape(shape)
    return array if value["$"] == "ndarray" else array[()]


def _decode_tag(
    value: dict[str, Any], inner: Callable[[object], Any], extension: Decode | None
) -> object:
    tag, content = value["$"], value["v"]
    if tag in ("dict", "OrderedDict", "Counter"):
        pairs = [(inner(k), inner(v)) for k, v in content]
        if tag == "Counter":
            return Counter(dict(pairs))
        return OrderedDict(pairs) if tag == "OrderedDict" else dict(pairs)
    if tag in ("tuple", "set", "frozenset", "deque"):
        items = [inner(item) for item in content]
        if tag == "deque":
            return deque(items, maxlen=value.get("maxlen"))
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](items)
    if tag in ("bytes", "bytearray"):
        data = base64.b64decode(str(content), validate=True)
        return data if tag == "bytes" else bytearray(data)
    if tag == "int":
        return int(str(content), 16)
    if tag == "float":
        return float(str(content))
    if tag == "complex":
        real, imag = (inner(part) for part in content)
        return complex(real, imag)
    if tag in ("ndarray", "scalar"):
        return _decode_array(value)
    if tag == "x" and extension is not None:
        return extension(content)
    raise FormatError(f"value of kind {tag!r} is not known to this version")
