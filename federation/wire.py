"""An adapter as bytes: what crosses between a site and the server.

One byte array a message, because Flower spends its time per array, not per byte (448 arrays cost
126 s a round where one costs 15 to 32). The layout, all little-endian:

    magic    4 bytes   b"FDGW"
    version  u16       1
    length   u32       of the header
    header   JSON      {"dtype", "rank", "alpha", "base_model", "tensors": [[name, [rows, cols]]]}
    tensors  bytes     row-major, in the header's order, no gaps; B then A of each module
    digest   32 bytes  sha256 of everything before it

`Update` reads one module at a time from a file, so that a server folding 16 sites holds one module
of each and never a whole adapter. bfloat16 is our own (Flower's arrays refuse it): the upper half
of a float32, rounded to nearest even.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.adapter import Adapter, LowRank
from federation.errors import FedgeError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"FDGW"
VERSION = 1
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_PREFIX = struct.Struct("<4sHI")
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 16 << 20
MAX_RANK = 1024
"""Bounds the k x k work that one site can make the server do; federation.settings has the same."""
MAX_ALPHA = 1e6


class WireError(FedgeError):
    """Bytes that are not the update they claim to be."""


def encode(adapter: Adapter, *, dtype: str, base_model: str) -> bytes:
    """Return an adapter as one byte string.

    Args:
        adapter: What to send.
        dtype: "float32" (exact) or "bfloat16" (half the bytes, 8 bits of mantissa).
        base_model: Digest of the base model it belongs to.

    Raises:
        WireError: A factor holds NaN or infinity.
    """
    import torch

    tensors: list[tuple[str, Tensor]] = []
    for name, factors in adapter.modules.items():
        tensors += [(f"{name}.B", factors.b_OR), (f"{name}.A", factors.a_RI)]
    pieces = []
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise WireError(f"{name} holds NaN or infinity: lower the learning rate")
        cast = tensor.contiguous().to(getattr(torch, dtype))
        pieces.append(cast.view(torch.uint8).numpy().tobytes())
    header = json.dumps(
        {
            "dtype": dtype,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "base_model": base_model,
            "tensors": [[name, list(tensor.shape)] for name, tensor in tensors],
        },
        separators=(",", ":"),
    ).encode()
    body = b"".join([_PREFIX.pack(MAGIC, VERSION, len(header)), header, *pieces])
    return body + hashlib.sha256(body).digest()


@dataclass(frozen=True)
class Update:
    """An adapter on disk, checked, read one module at a time."""

    path: Path
    sha256: str
    """Of the whole message: what the lineage names."""
    num_bytes: int
    rank: int
    alpha: float
    base_model: str
    dtype: str
    places: dict[str, tuple[int, tuple[int, int]]]
    """Tensor name to offset in the file and shape."""

    @property
    def modules(self) -> list[str]:
        """Module names in the order of the message."""
        return [name.removesuffix(".B") for name in self.places if name.endswith(".B")]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out features, in features) by module."""
        return {
            name: (self.places[f"{name}.B"][1][0], self.places[f"{name}.A"][1][1])
            for name in self.modules
        }

    def read(self, module: str) -> LowRank:
        """Return the factors of one module, float32."""
        return LowRank(self._tensor(f"{module}.B"), self._tensor(f"{module}.A"))

    def adapter(self) -> Adapter:
        """Return the whole adapter."""
        return Adapter(self.rank, self.alpha, {name: self.read(name) for name in self.modules})

    def _tensor(self, name: str) -> Tensor:
        import torch

        offset, shape = self.places[name]
        length = shape[0] * shape[1] * ITEM_BYTES[self.dtype]
        with self.path.open("rb") as file:
            file.seek(offset)
            raw = bytearray(file.read(length))
        flat = torch.frombuffer(raw, dtype=getattr(torch, self.dtype))
        return flat.reshape(shape).to(torch.float32)


def open_update(path: Path) -> Update:
    """Check a message on disk from its first to its last byte and return its table of contents.

    Raises:
        WireError: Another format or version, a wrong checksum, a length that does not match the
            header, or a value that is not finite; the value seen and the one expected are named.
    """
    import torch

    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        header = _read_header(file.read, prefix, size)
        digest.update(prefix + header.raw)
        remaining = size - _PREFIX.size - len(header.raw) - _DIGEST_BYTES
        if remaining != header.payload_bytes:
            raise WireError(
                f"the update has {remaining} bytes of tensors, its header says "
                f"{header.payload_bytes}: it was cut off or altered"
            )
        while remaining:
            piece = file.read(min(1 << 20, remaining))
            remaining -= len(piece)
            digest.update(piece)
        seen = file.read(_DIGEST_BYTES)
    if seen != digest.digest():
        raise WireError(
            f"the update's checksum is {seen.hex()[:16]}…, its content gives "
            f"{digest.hexdigest()[:16]}…: it was damaged on the way"
        )
    digest.update(seen)
    update = Update(
        path=path,
        sha256=digest.hexdigest(),
        num_bytes=size,
        rank=header.rank,
        alpha=header.alpha,
        base_model=header.base_model,
        dtype=header.dtype,
        places=header.places,
    )
    for module in update.modules:
        factors = update.read(module)
        if not (torch.isfinite(factors.b_OR).all() and torch.isfinite(factors.a_RI).all()):
            raise WireError(f"the update's factors of {module} hold NaN or infinity")
    return update


@dataclass(frozen=True)
class _Header:
    raw: bytes
    dtype: str
    rank: int
    alpha: float
    base_model: str
    places: dict[str, tuple[int, tuple[int, int]]]
    payload_bytes: int


def _read_header(read: Any, prefix: bytes, size: int) -> _Header:
    if len(prefix) < _PREFIX.size or prefix[:4] != MAGIC:
        raise WireError(f"the message begins with {prefix[:4]!r}: expected an update ({MAGIC!r})")
    _, version, length = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise WireError(
            f"the update has wire version {version}, this side reads {VERSION}: "
            "install the same version of fedge on both sides"
        )
    if length > min(size, _MAX_HEADER_BYTES):
        raise WireError(f"the update's header claims {length} bytes of a message of {size}")
    raw = read(length)
    try:
        return _lay_out(raw, json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = str(error)[:200] or type(error).__name__
        raise WireError(f"the update's header is not readable: {detail}") from None


def _lay_out(raw: bytes, header: dict[str, Any]) -> _Header:
    dtype, rank, alpha = header["dtype"], header["rank"], header["alpha"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(ITEM_BYTES)}")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank!r}: expected a whole number in [1, {MAX_RANK}]")
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise ValueError(f"alpha {alpha!r}: expected a number in (0, {MAX_ALPHA:g}]")
    places: dict[str, tuple[int, tuple[int, int]]] = {}
    offset = _PREFIX.size + len(raw)
    for name, (rows, columns) in header["tensors"]:
        whole = type(name) is str and type(rows) is int and type(columns) is int
        if not whole or not min(rows, columns) > 0 or name in places:
            raise ValueError(f"tensor {name!r} of shape {rows} x {columns}")
        if (columns if name.endswith(".B") else rows) != rank:
            raise ValueError(f"tensor {name!r} of shape {rows} x {columns} in rank {rank}")
        places[name] = (offset, (rows, columns))
        offset += rows * columns * ITEM_BYTES[dtype]
    if {name[:-2] for name in places if name.endswith(".B")} != {
        name[:-2] for name in places if name.endswith(".A")
    }:
        raise ValueError("a module has one factor only")
    return _Header(
        raw=raw,
        dtype=dtype,
        rank=rank,
        alpha=float(alpha),
        base_model=str(header["base_model"]),
        places=places,
        payload_bytes=offset - _PREFIX.size - len(raw),
    )
