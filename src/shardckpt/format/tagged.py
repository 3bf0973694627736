"""Tagged JSON: plain Python values that come back exactly as they were. No pickle, no code.

Layer: format. JSON scalars, lists and string-keyed dicts stand for themselves. Everything else is
an object with a `$` field: tuples, sets, bytes, non-string keys, special floats, Counter,
OrderedDict, complex, numpy arrays. The decoder believes nothing: every tag has one exact shape,
and all else is a FormatError.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np

from shardckpt.errors import FormatError, UnsupportedStateError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Encode: TypeAlias = Callable[[object, str], object | None]
Decode: TypeAlias = Callable[[object], object]

MAX_DEPTH: Final = 64
_INT_BITS: Final = 63
# By name, because numpy parses far more than names: structures, objects, nested shapes.
_ARRAY_DTYPES: Final = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)
# Equal hashes make a dict or set quadratic. Honest keys share theirs by rare accident only.
_MOST_EQUAL_HASHES: Final = 64
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
    if isinstance(value, str) and kind is str:
        return value if _is_utf8(value) else {"$": "str", "v": _base64(_surrogates(value))}
    if value is None or kind is bool:
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
            items = [inner(item, i) for i, item in enumerate(value)]
            if isinstance(value, (set, frozenset)):
                # The same on every rank, whatever the order of iteration in this process.
                items.sort(key=lambda item: msgspec.json.encode(item, order="deterministic"))
            encoded: dict[str, Json] = {"$": named, "v": items}
            if isinstance(value, deque):
                encoded["maxlen"] = value.maxlen
            return encoded
    if isinstance(value, (bytes, bytearray)) and kind in (bytes, bytearray):
        return {"$": kind.__name__, "v": _base64(value)}
    if isinstance(value, complex) and kind is complex:
        return {"$": "complex", "v": [inner(value.real, "re"), inner(value.imag, "im")]}
    # A subclass of ndarray means more than its elements (a mask, a file), so only the class itself.
    if (kind is np.ndarray or isinstance(value, np.generic)) and _dtype_name(value) is not None:
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


def decode(
    value: object, *, extension: Decode | None = None, what: str = "value", _depth: int = 0
) -> object:
    """Return the Python value of tagged JSON.

    Args:
        value: What a JSON parser returned.
        extension: Turns the content that `encode`'s extension returned back into its value.
        what: Key of the value, for messages.

    Raises:
        FormatError: An unknown tag, a malformed one, or too deep a nesting.
    """
    if _depth > MAX_DEPTH:
        raise FormatError(f"{what}: nested deeper than {MAX_DEPTH} levels")

    def inner(item: object) -> object:
        return decode(item, extension=extension, what=what, _depth=_depth + 1)

    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: inner(item) for key, item in value.items()}
    try:
        return _decode_tag(value, inner, extension)
    except FormatError:
        raise
    except (
        *(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError),
        *(TypeError, ValueError),
    ) as error:
        # Only text is shown: the repr of a hostile nesting would not end well.
        shown = value["$"][:40] if isinstance(value["$"], str) else type(value["$"]).__name__
        raise FormatError(f"{what}: malformed {shown!r} value: {error}") from error


def _encode_dict(value: dict[object, object], inner: Callable[[object, object], Json]) -> Json:
    named = {OrderedDict: "OrderedDict", Counter: "Counter"}.get(type(value))
    plain = all(type(key) is str and _is_utf8(key) for key in value) and "$" not in value
    if named is None and plain:
        return {str(key): inner(item, key) for key, item in value.items()}
    pairs: list[Json] = [[inner(key, "key"), inner(item, key)] for key, item in value.items()]
    return {"$": named or "dict", "v": pairs}


def _dtype_name(value: object) -> str | None:
    """Return the name under which an array's dtype is stored, or None where it cannot be."""
    assert isinstance(value, (np.ndarray, np.generic))
    name = value.dtype.newbyteorder("=").name
    return name if name in _ARRAY_DTYPES else None


def _encode_array(value: object) -> Json:
    assert isinstance(value, (np.ndarray, np.generic))
    array = np.asarray(value)
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return {
        "$": "ndarray" if isinstance(value, np.ndarray) else "scalar",
        "dtype": _dtype_name(value),
        "shape": list(array.shape),
        "v": _base64(little.tobytes()),
    }


def _decode_array(value: dict[str, Any]) -> object:
    name, shape = value["dtype"], value["shape"]
    if not isinstance(name, str) or name not in _ARRAY_DTYPES:
        raise FormatError(f"an array of dtype {name!r} is not stored by this format")
    if not all(type(size) is int and size >= 0 for size in _list(shape)):
        raise FormatError(f"an array cannot have shape {shape!r}")
    dtype = np.dtype(name)
    data = _bytes(value["v"])
    if math.prod(shape) * dtype.itemsize != len(data):
        raise FormatError(f"an array of {name}{shape} does not have {len(data)} bytes")
    if value["$"] == "scalar" and shape:
        raise FormatError(f"a scalar has shape {shape}")
    array = np.frombuffer(data, dtype=dtype.newbyteorder("<")).astype(dtype).reshape(shape)
    return array if value["$"] == "ndarray" else array[()]


def _decode_tag(
    value: dict[str, Any], inner: Callable[[object], Any], extension: Decode | None
) -> object:
    tag, content = value["$"], value["v"]
    match tag:
        case "dict" | "OrderedDict" | "Counter":
            return _decode_dict(tag, content, inner)
        case "tuple" | "set" | "frozenset" | "deque":
            return _decode_sequence(tag, [inner(item) for item in _list(content)], value)
        case "bytes":
            return _bytes(content)
        case "bytearray":
            return bytearray(_bytes(content))
        case "str":
            return _bytes(content).decode("utf-8", "surrogatepass")
        case "int" if isinstance(content, str):
            return int(content, 16)
        case "float" if content in ("nan", "inf", "-inf"):
            return float(content)
        case "complex":
            real, imag = (inner(part) for part in _list(content))
            return complex(_real(real), _real(imag))
        case "ndarray" | "scalar":
            return _decode_array(value)
        case "x" if extension is not None:
            return extension(content)
    raise FormatError(f"a value of kind {tag!r} is not known to this version")


def _decode_dict(tag: str, content: object, inner: Callable[[object], Any]) -> object:
    keys, items = [], []
    for pair in _list(content):
        key, item = _list(pair)
        keys.append(inner(key))
        items.append(inner(item))
    _check_hashes(keys)
    pairs = dict(zip(keys, items, strict=True))
    if len(pairs) != len(keys):
        raise FormatError(f"a {tag} names a key twice")
    if tag == "Counter":
        return Counter(pairs)
    return OrderedDict(pairs) if tag == "OrderedDict" else pairs


def _decode_sequence(tag: str, items: list[Any], value: dict[str, Any]) -> object:
    if tag == "tuple":
        return tuple(items)
    if tag == "deque":
        maxlen = value["maxlen"]
        if maxlen is not None and (type(maxlen) is not int or maxlen < len(items)):
            raise FormatError(f"a deque of {len(items)} items has maxlen {maxlen!r}")
        return deque(items, maxlen=maxlen)
    _check_hashes(items)
    return set(items) if tag == "set" else frozenset(items)


def _check_hashes(keys: list[Any]) -> None:
    if len(keys) - len({hash(key) for key in keys}) > _MOST_EQUAL_HASHES:
        raise FormatError(f"{len(keys)} keys collide in their hashes")


def _list(content: object) -> list[Any]:
    if not isinstance(content, list):
        raise FormatError(f"a {type(content).__name__} stands where a list belongs")
    return content


def _real(content: object) -> float:
    if not isinstance(content, float):
        raise FormatError(f"a {type(content).__name__} stands where a float belongs")
    return content


def _bytes(content: object) -> bytes:
    if not isinstance(content, str):
        raise FormatError(f"a {type(content).__name__} stands where base64 text belongs")
    return base64.b64decode(content, validate=True)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogates(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
