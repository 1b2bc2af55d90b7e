"""The head of a message: what it claims, checked before a byte of tensors is believed.

    magic    4 bytes   b"FDGW"
    version  u16       2
    length   u32       of the header
    header   JSON      {"dtype", "rank", "alpha", "base_model", "factors", "reference",
                        "tensors": [[name, [rows, columns]]]}

Every row of a tensor belongs to one rank slice: ``module.B`` is [R, O] (B transposed) and
``module.A`` is [R, I]. So the first ``r`` slices of a factor are the first bytes of its tensor, and
a server stacks the slices of many sites by reading rows one after the other.

``factors`` says which factors travel: "AB", or one of them when rounds train them in turns.
``reference`` is the content digest of the adapter that the message stands on, or "" for a message
that stands alone. A message of changes (int8, int4) and a message of one factor need one.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from federation import blocks
from federation.errors import FedgeError

MAGIC = b"FDGW"
VERSION = 2
PREFIX = struct.Struct("<4sHI")
DIGEST_BYTES = 32
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
DTYPES = (*ITEM_BYTES, *blocks.BLOCKS)
FACTORS = {"AB": ("B", "A"), "B": ("B",), "A": ("A",)}
"""Tensors of a module by ``factors``, in the order of the message."""
MAX_RANK = 1024
"""Bounds the k x k work that one site can make the server do; federation.settings has the same."""
LARGEST = 1e15
"""No factor has a number beyond it, and products of two such are still finite in float32."""
LARGEST_WEIGHT = 1e6
"""No adapter that is trained has a number beyond it: near ``LARGEST``, what the training adds would
decide whether there is an answer at all."""
MAX_ALPHA = 1e6
_MAX_COLUMNS = 1 << 24
_MAX_HEADER_BYTES = 1 << 20
"""Far more than any model's modules need; parsed JSON takes many times its length in memory."""
_NAME = re.compile(r"[\w.-]{0,256}", re.ASCII)
"""Of a module: it stands in logs and terminals, where a control code would act."""
_BASE_MODEL = re.compile(r"[\w.-]{0,64}", re.ASCII)
"""A digest; it stands in logs too, and the other side chooses it."""
_REFERENCE = {True: re.compile("[0-9a-f]{64}"), False: re.compile("")}
"""What stands there, by whether the message needs a reference."""


class WireError(FedgeError):
    """Bytes that are not the update they claim to be."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the file."""

    offset: int
    num_rows: int
    num_columns: int

    @property
    def num_numbers(self) -> int:
        """How many numbers the tensor has."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Header:
    """What a message says of itself; believed only as far as its bytes bear it out."""

    raw: bytes
    dtype: str
    rank: int
    alpha: float
    base_model: str
    factors: str
    reference: str
    places: dict[str, Place]
    payload_bytes: int


def holds_changes(dtype: str) -> bool:
    """Tell whether tensors of this dtype are changes of a reference, not the values themselves."""
    return dtype in blocks.BLOCKS


def tensor_bytes(num_numbers: int, dtype: str) -> int:
    """Return the bytes of one tensor in a message."""
    if dtype in ITEM_BYTES:
        return num_numbers * ITEM_BYTES[dtype]
    return blocks.num_bytes(num_numbers, dtype)


def tensor_shapes(
    shapes: Mapping[str, tuple[int, int]], rank: int, factors: str
) -> list[tuple[str, tuple[int, int]]]:
    """Return name and [rows, columns] of every tensor of a message, in its order.

    Args:
        shapes: (out features, in features) by module.
        rank: Rows of every tensor.
        factors: "AB", "A" or "B".
    """
    return [
        (f"{name}.{factor}", (rank, out_features if factor == "B" else in_features))
        for name, (out_features, in_features) in sorted(shapes.items())
        for factor in FACTORS[factors]
    ]


def num_numbers(shapes: Mapping[str, tuple[int, int]], rank: int, factors: str) -> int:
    """Return how many numbers the tensors of a message hold. Arguments as `tensor_shapes`."""
    return sum(rows * columns for _, (rows, columns) in tensor_shapes(shapes, rank, factors))


def payload_bytes(
    shapes: Mapping[str, tuple[int, int]], rank: int, dtype: str, factors: str = "AB"
) -> int:
    """Return the bytes of the tensors of a message: all of it but header and checksum."""
    tensors = tensor_shapes(shapes, rank, factors)
    return sum(tensor_bytes(rows * columns, dtype) for _, (rows, columns) in tensors)


def message_bytes(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    dtype: str,
    factors: str = "AB",
    *,
    alpha: float,
) -> int:
    """Return the length of a whole message, to the byte."""
    head = write_head(
        shapes,
        rank=rank,
        alpha=alpha,
        dtype=dtype,
        factors=factors,
        base_model="0" * 64,
        reference="0" * 64 if holds_changes(dtype) or factors != "AB" else "",
    )
    return len(head) + payload_bytes(shapes, rank, dtype, factors) + DIGEST_BYTES


def write_head(
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    alpha: float,
    dtype: str,
    factors: str,
    base_model: str,
    reference: str,
) -> bytes:
    """Return prefix and header: the same bytes for the same adapter, whoever writes them."""
    header = json.dumps(
        {
            "dtype": dtype,
            "rank": rank,
            "alpha": float(alpha),
            "base_model": base_model,
            "factors": factors,
            "reference": reference,
            "tensors": tensor_shapes(shapes, rank, factors),
        },
        separators=(",", ":"),
    ).encode()
    return PREFIX.pack(MAGIC, VERSION, len(header)) + header


def read_head(read: Callable[[int], bytes], size: int) -> Header:
    """Read prefix and header from the beginning of a message of ``size`` bytes.

    Raises:
        WireError: Another format or version, or a header that contradicts itself or the size.
    """
    prefix = read(PREFIX.size)
    if len(prefix) < PREFIX.size or prefix[:4] != MAGIC:
        raise WireError(f"the message begins with {prefix[:4]!r}: expected an update ({MAGIC!r})")
    _, version, length = PREFIX.unpack(prefix)
    if version != VERSION:
        raise WireError(
            f"the update has wire version {version}, this side reads {VERSION}: "
            "install the same version of fedge on both sides"
        )
    if length > min(size, _MAX_HEADER_BYTES):
        raise WireError(f"the update's header claims {length} bytes of a message of {size}")
    raw = read(length)
    try:
        header = _parsed(prefix + raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = str(error)[:200] or type(error).__name__
        raise WireError(f"the update's header is not readable: {detail}") from None
    remaining = size - len(header.raw) - DIGEST_BYTES
    if remaining != header.payload_bytes:
        # A header may claim 20 digits of bytes: the claim is compared before anything is made.
        raise WireError(
            f"the update has {remaining} bytes of tensors, its header says "
            f"{header.payload_bytes}: it was cut off or altered"
        )
    return header


@lru_cache(maxsize=2)
def _parsed(raw: bytes) -> Header:
    """Parse a header; all sites of a round send the same one, and share what it says in memory."""
    return _lay_out(raw, json.loads(raw[PREFIX.size :]))


def _lay_out(raw: bytes, header: dict[str, Any]) -> Header:
    dtype, rank, alpha = header["dtype"], header["rank"], header["alpha"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank!r}: expected a whole number in [1, {MAX_RANK}]")
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise ValueError(f"alpha {alpha!r}: expected a number in (0, {MAX_ALPHA:g}]")
    factors, reference, base_model = header["factors"], header["reference"], header["base_model"]
    if type(base_model) is not str or not _BASE_MODEL.fullmatch(base_model):
        raise ValueError(f"base_model {str(base_model)[:80]!r}: expected a digest in hex")
    if factors not in FACTORS:
        raise ValueError(f"factors {factors!r}: expected one of {', '.join(FACTORS)}")
    needs_one = holds_changes(dtype) or factors != "AB"
    if type(reference) is not str or not _REFERENCE[needs_one].fullmatch(reference):
        wanted = "a sha256 in hex" if needs_one else "none"
        raise ValueError(f"reference {reference!r}: {dtype} {factors} expects {wanted}")
    places = _places(header["tensors"], len(raw), dtype, rank)
    modules = [{name[:-2] for name in places if name.endswith(f".{f}")} for f in FACTORS[factors]]
    if any(names != modules[0] for names in modules):
        raise ValueError("a module has one factor only")
    if not places or sum(len(names) for names in modules) != len(places):
        raise ValueError(f"tensors that are no factor {' or '.join(FACTORS[factors])}")
    last = list(places.values())[-1]
    return Header(
        raw=raw,
        dtype=dtype,
        rank=rank,
        alpha=float(alpha),
        base_model=base_model,
        factors=factors,
        reference=reference,
        places=places,
        payload_bytes=last.offset + tensor_bytes(last.num_numbers, dtype) - len(raw),
    )


def _places(tensors: Any, offset: int, dtype: str, rank: int) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name, (rows, columns) in tensors:
        whole = type(name) is str and type(rows) is int and type(columns) is int
        if not whole or not 0 < columns <= _MAX_COLUMNS or name in places:
            raise ValueError(f"tensor {name!r} of shape {rows!r} x {columns!r}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"tensor {name[:80]!r}: expected letters, digits, '.', '-' and '_'")
        if rows != rank:
            raise ValueError(f"tensor {name!r} of shape {rows!r} x {columns!r} in rank {rank}")
        places[name] = Place(offset, rows, columns)
        offset += tensor_bytes(rows * columns, dtype)
    return places
