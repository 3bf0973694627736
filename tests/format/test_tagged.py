"""Tagged JSON gives back exactly what went in, and refuses everything that it never wrote."""

from __future__ import annotations

import copy
import math
import random
import struct
from collections import Counter, OrderedDict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardckpt.errors import FormatError, UnsupportedStateError
from shardckpt.format.tagged import MAX_DEPTH, decode, encode

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]

hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**80), max_value=2**80)
    | st.floats()
    | st.text(alphabet=st.characters())
    | st.binary(max_size=8)
    | st.complex_numbers(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
arrays = st.builds(
    lambda name, shape, seed: (
        np.frombuffer(random.Random(seed).randbytes(16 * math.prod(shape)), dtype=np.uint8)
        .view("u1")[: math.prod(shape) * np.dtype(name).itemsize]
        .view(name if name != "bool" else "u1")
        .astype(name)
        .reshape(shape)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
values = st.recursive(
    hashable
    | st.binary(max_size=8).map(bytearray)
    | arrays
    | arrays.map(lambda a: a.flat[0] if a.size else a.dtype.type()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(hashable, st.integers(), max_size=3).map(Counter)
        | st.sets(hashable, max_size=3)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, len(items) + 1))
    ),
    max_leaves=12,
)


def through_bytes(value: object) -> object:
    """Return what another process reads of a value."""
    return decode(msgspec.json.decode(msgspec.json.encode(encode(value, "state"))))


def canonical(value: Any) -> object:
    """Return a description that is equal only for values equal in type, bits and order."""
    kind = type(value).__name__
    if isinstance(value, float) and type(value) is float:
        return kind, "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, complex) and type(value) is complex:
        return kind, canonical(value.real), canonical(value.imag)
    if isinstance(value, (np.ndarray, np.generic)):
        return kind, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return kind, [(canonical(k), canonical(v)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(canonical(v)) for v in value)
    if isinstance(value, deque):
        return kind, value.maxlen, [canonical(v) for v in value]
    if isinstance(value, (list, tuple)):
        return kind, [canonical(v) for v in value]
    return kind, value


@given(values)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_every_value_comes_back_with_its_types_its_bits_and_its_order(value: object) -> None:
    assert canonical(through_bytes(value)) == canonical(value)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-08}, id="AdamW"),
        pytest.param({"milestones": Counter({30: 1, 80: 2}), "gamma": 0.1}, id="MultiStepLR"),
        pytest.param(random.Random(7).getstate(), id="random"),
        pytest.param(np.random.RandomState(7).get_state(), id="numpy legacy"),
        pytest.param(np.random.default_rng(7).bit_generator.state, id="numpy PCG64"),
        pytest.param(np.random.Generator(np.random.MT19937(7)).bit_generator.state, id="MT19937"),
        pytest.param(
            [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308], id="floats"
        ),
        pytest.param([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000, -(10**5000)], id="ints"),
        pytest.param(OrderedDict(a=OrderedDict(b=(1, OrderedDict())), c=b"\x00\xff"), id="nested"),
        pytest.param({"$": "tuple", "v": [1]}, id="a dict that looks like a tag"),
        pytest.param({"\ud800": "\udfff", "a\x00b": "\u20ac"}, id="surrogates"),
        pytest.param({1: "int", "1": "str", (1,): "tuple", None: "none"}, id="keys"),
        pytest.param(
            [True, 1, 1.0, np.float64(1), np.bool_(True), np.array(1)], id="equal, not same"
        ),
        pytest.param(np.arange(6, dtype=">i4").astype("i4").reshape(2, 3).T, id="strided array"),
    ],
)
def test_real_state_comes_back_exactly(value: object) -> None:
    assert canonical(through_bytes(value)) == canonical(value)


def test_random_generators_go_on_where_they_stopped() -> None:
    python, numpy = random.Random(3), np.random.RandomState(3)
    restored_python, restored_numpy = random.Random(), np.random.RandomState()
    restored_python.setstate(through_bytes(python.getstate()))  # type: ignore[arg-type]
    restored_numpy.set_state(through_bytes(numpy.get_state()))  # type: ignore[arg-type]
    assert [python.random() for _ in range(700)] == [restored_python.random() for _ in range(700)]
    assert numpy.randn(700).tolist() == restored_numpy.randn(700).tolist()


def test_arrays_come_back_writable() -> None:
    array = through_bytes(np.zeros(3))
    assert isinstance(array, np.ndarray)
    array[0] = 1.0


def test_equal_sets_give_equal_bytes_whatever_their_order_of_iteration() -> None:
    one, other = set(), set()
    for number in range(0, 4096, 8):
        one.add(number)
    for number in reversed(range(0, 4096, 8)):
        other.add(number)
    nested = [{frozenset(one), 1}, {1, frozenset(other)}]
    assert list(one) != list(other) or [*nested[0]] == [*nested[1]]
    assert encode(nested[0], "s") == encode(nested[1], "s")


class Masked(np.ndarray):
    """An array with a meaning of its own."""


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        pytest.param(np.array(["a"], dtype=object), id="object array"),
        pytest.param(np.zeros(2, dtype=[("a", "i4")]), id="structure"),
        pytest.param(np.zeros(2, dtype="M8[s]"), id="dates"),
        pytest.param(np.longdouble(1), id="a float that differs by machine"),
        pytest.param(np.ma.masked_array([1, 2], [0, 1]), id="masked array"),
        pytest.param(np.zeros(2).view(Masked), id="array of a subclass"),
        pytest.param(type("Name", (str,), {})("a"), id="str of a subclass"),
        pytest.param(type("Pair", (tuple,), {})((1, 2)), id="tuple of a subclass"),
        pytest.param(print, id="function"),
    ],
)
def test_what_would_not_come_back_exactly_is_refused_with_its_path(value: object) -> None:
    with pytest.raises(UnsupportedStateError, match="state/a/1"):
        encode({"a": [0, value]}, "state")


def test_a_loop_or_a_deep_nesting_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        encode(loop, "state")


def test_the_deepest_nesting_that_is_written_is_read() -> None:
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = (value,)
    assert through_bytes(value) == value
    with pytest.raises(UnsupportedStateError):
        encode((value,), "state")


def test_extensions_carry_other_values() -> None:
    def extend(value: object, path: str) -> object | None:
        return {"range": [value.start, value.stop]} if isinstance(value, range) else None

    def shrink(content: Any) -> object:
        return range(*content["range"])

    encoded = encode({"r": [range(2, 5)]}, "state", extension=extend)
    assert decode(encoded, extension=shrink) == {"r": [range(2, 5)]}
    with pytest.raises(FormatError, match="'x'"):
        decode(encoded)


@pytest.mark.parametrize(
    "hostile",
    [
        {"$": "os.system", "v": "true"},
        {"$": "tuple"},
        {"$": "tuple", "v": "abc"},
        {"$": "tuple", "v": {"a": 1}},
        {"$": ["tuple"], "v": []},
        {"$": {}, "v": []},
        {"$": None, "v": []},
        {"$": "set", "v": [[1]]},
        {"$": "dict", "v": ["ab"]},
        {"$": "dict", "v": [[1, 2, 3]]},
        {"$": "dict", "v": [[1]]},
        {"$": "dict", "v": [[[1], 2]]},
        {"$": "dict", "v": [[1, 2], [1, 3]]},
        {"$": "dict", "v": [[1, 2], [True, 3]]},
        {"$": "Counter", "v": {"a": 1}},
        {"$": "deque", "v": [1, 2], "maxlen": 1},
        {"$": "deque", "v": [1, 2], "maxlen": -1},
        {"$": "deque", "v": [1, 2], "maxlen": True},
        {"$": "deque", "v": []},
        {"$": "bytes", "v": 5},
        {"$": "bytes", "v": "not base64!"},
        {"$": "bytes", "v": None},
        {"$": "str", "v": "/w=="},
        {"$": "int", "v": "12z"},
        {"$": "int", "v": 12},
        {"$": "float", "v": "1e999"},
        {"$": "float", "v": "infinity"},
        {"$": "float", "v": 1.0},
        {"$": "complex", "v": [1.0]},
        {"$": "complex", "v": ["1", "2"]},
        {"$": "complex", "v": "ab"},
        {"$": "x", "v": 1},
        {"$": "ndarray", "dtype": "O", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "object", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "(2,)f4", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "f4,f4", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": ["float32"], "shape": [2], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "shape": [-1], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "shape": [2.0], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "shape": [True, 2], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "shape": [3], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "shape": [2**62, 2**62], "v": ""},
        {"$": "ndarray", "dtype": "float32", "shape": [1] * 65 + [2], "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "shape": [2**70, 0], "v": ""},
        {"$": "ndarray", "dtype": "float32", "shape": 2, "v": "AAAAAAAAAAA="},
        {"$": "ndarray", "dtype": "float32", "v": ""},
        {"$": "scalar", "dtype": "float32", "shape": [2], "v": "AAAAAAAAAAA="},
        {"$": "set", "v": [{"$": "int", "v": hex(k * (2**61 - 1))} for k in range(100)]},
        {"$": "dict", "v": [[{"$": "int", "v": hex(k * (2**61 - 1))}, 0] for k in range(100)]},
    ],
    ids=lambda value: str(value)[:60],
)
def test_hostile_input_gets_a_typed_error(hostile: object) -> None:
    with pytest.raises(FormatError):
        decode(hostile)


@pytest.mark.parametrize("tag", ["", "tuple", "nonsense"])
def test_a_nesting_bomb_gets_a_typed_error(tag: str) -> None:
    bomb: object = []
    for _ in range(5_000):
        bomb = {"$": tag, "v": [bomb]} if tag else [bomb]
    for hostile in (
        bomb,
        {"$": bomb, "v": []},
        {"$": "ndarray", "dtype": bomb, "shape": [1], "v": ""},
        {"$": "ndarray", "dtype": "int8", "shape": [bomb], "v": ""},
        {"$": "deque", "v": [], "maxlen": bomb},
        {"$": "bytes", "v": bomb},
    ):
        with pytest.raises(FormatError):
            decode(hostile)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
tags = st.sampled_from(
    [
        *("dict", "OrderedDict", "Counter", "tuple", "set", "frozenset", "deque", "bytes"),
        *("bytearray", "str", "int", "float", "complex", "ndarray", "scalar", "x", "nonsense"),
    ]
)
tagged = st.recursive(
    json_values,
    lambda inner: st.fixed_dictionaries(
        {"$": tags, "v": inner | st.lists(inner, max_size=3) | st.lists(st.lists(inner))},
        optional={
            "maxlen": inner,
            "dtype": st.sampled_from(DTYPES) | inner,
            "shape": st.lists(st.integers(-1, 3), max_size=3) | inner,
        },
    ),
    max_leaves=6,
)


@given(tagged)
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_decodes_or_gets_a_typed_error_and_is_left_alone(value: object) -> None:
    before = copy.deepcopy(value)
    try:
        decoded = decode(value)
    except FormatError:
        pass
    else:
        # What it accepts, it would have written: the value is a fixed point.
        assert canonical(through_bytes(decoded)) == canonical(decoded)
    assert value == before
