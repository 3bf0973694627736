"""Canonical dtype names and the bytes one element takes.

Layer: geometry (integers only). Names are those of ml_dtypes and numpy; both frameworks map onto
them.
"""

from __future__ import annotations

from typing import Final

ITEMSIZE_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float8_e3m4": 1,
    "float8_e4m3": 1,
    "float8_e4m3b11fnuz": 1,
    "float4_e2m1fn_x2": 1,
    # One value per byte, as ml_dtypes keeps them on the host.
    "float4_e2m1fn": 1,
    "int2": 1,
    "int4": 1,
    "uint2": 1,
    "uint4": 1,
}


def itemsize_bytes(dtype: str) -> int:
    """Return the bytes of one element of `dtype`.

    Raises:
        ValueError: The name is not a canonical dtype.
    """
    try:
        return ITEMSIZE_BYTES[dtype]
    except KeyError:
        raise ValueError(
            f"dtype {dtype!r} is not known; known are {', '.join(sorted(ITEMSIZE_BYTES))}"
        ) from None
