"""An adapter as bytes: what crosses between a site and the server.

One byte array a message, because Flower spends its time per array, not per byte (448 arrays cost
126 s a round where one costs 15 to 32). All little-endian:

    head     magic, version and a JSON header: federation.header
    tensors  bytes     in the header's order, no gaps; B then A of each module, one row a rank slice
    digest   32 bytes  sha256 of everything before it

float32 and bfloat16 tensors are the values themselves. int8 and int4 ones are the *change* of a
reference that both sides hold, in blocks with one scale each (federation.blocks); the reader adds
it to the reference in float32. A message of one factor takes the other from its reference.

An adapter's **content digest** is the checksum of its float32 message: the name by which both
sides know that they mean the same reference, whatever the message was that brought it.

This module writes; federation.update reads. bfloat16 is our own (Flower's arrays refuse it):
the upper half of a float32, rounded to nearest even.

Shape letters: O out features, I in features, R rank, C columns (O or I).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from federation.atomic import atomic_file
from federation.blocks import quantize
from federation.header import (
    FACTORS,
    LARGEST,
    MAGIC,
    MAX_ALPHA,
    MAX_RANK,
    VERSION,
    WireError,
    holds_changes,
    message_bytes,
    payload_bytes,
    write_head,
)
from federation.update import (
    Factors,
    MissingReferenceError,
    Update,
    content_digest,
    header_of,
    open_update,
    reference_of,
    refuse_other_slices,
)

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_MISSING = 1002
"""Error code of a reply: the site lacks the adapter that a change stands on, send it whole."""


def encode(
    adapter: Factors,
    *,
    dtype: str,
    base_model: str,
    reference: Factors | None = None,
    factors: str = "AB",
) -> bytes:
    """Return an adapter as one byte string. Holds the message about twice.

    Args:
        adapter: What to send.
        dtype: "float32" (exact), "bfloat16" (half the bytes, 8 bits of mantissa), "int8" or "int4"
            (0.26 and 0.14 of the bytes: the change since ``reference`` in blocks).
        base_model: Digest of the base model it belongs to.
        reference: What the reader holds: needed for int8, int4 and for one factor, else not used.
            It may have more rank slices than ``adapter``, at the same scale.
        factors: "AB", or the one factor to send; the reader takes the other from ``reference``.

    Raises:
        WireError: A factor holds NaN, infinity or a number beyond 1e15, or there is no reference
            where one is needed, or it is another model's.
    """
    digest, pieces = hashlib.sha256(), []
    for piece in _pieces(adapter, dtype, base_model, reference, factors):
        digest.update(piece)
        pieces.append(piece)
    return b"".join([*pieces, digest.digest()])


def write_message(
    path: Path,
    adapter: Factors,
    *,
    dtype: str,
    base_model: str,
    reference: Factors | None = None,
    factors: str = "AB",
) -> str:
    """Write what ``encode`` returns, atomically, one tensor in memory; return its checksum.

    The checksum of a float32 message is the adapter's content digest.

    Raises:
        WireError: As ``encode``; there is no file then.
    """
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for piece in _pieces(adapter, dtype, base_model, reference, factors):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
    return digest.hexdigest()


def _pieces(
    adapter: Factors, dtype: str, base_model: str, reference: Factors | None, factors: str
) -> Iterator[memoryview]:
    """Yield a message but its checksum, a tensor at a time."""
    shapes, changes = adapter.shapes(), holds_changes(dtype)
    stands_on = ""
    if changes or factors != "AB":
        if reference is None:
            raise WireError(
                f"{dtype} {factors} stands on an adapter that the reader holds, and none is given: "
                "send the first message as float32 AB"
            )
        if reference.shapes() != shapes:
            raise WireError("the adapter's modules or shapes are not those of its reference")
        refuse_other_slices(adapter.rank, adapter.alpha, reference)
        stands_on = (
            reference.sha256_of_content
            if isinstance(reference, Update)
            else content_digest(reference, base_model)
        )
    yield memoryview(
        write_head(
            shapes,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dtype=dtype,
            factors=factors,
            base_model=base_model,
            reference=stands_on,
        )
    )
    for module in sorted(shapes):
        for factor in FACTORS[factors]:
            rows_RC = adapter.rows(module, factor, adapter.rank)
            if changes and reference is not None:
                rows_RC = rows_RC - reference.rows(module, factor, adapter.rank)
            # The comparison is False for NaN.
            if not float(rows_RC.abs().max()) <= LARGEST:
                raise WireError(
                    f"{module}.{factor} holds NaN, infinity or a number beyond {LARGEST:g}: "
                    "lower the learning rate"
                )
            yield from _tensor_pieces(rows_RC, dtype)


def _tensor_pieces(rows_RC: Tensor, dtype: str) -> Iterator[memoryview]:
    import torch

    flat_N = rows_RC.flatten()
    parts: Sequence[Tensor] = (
        quantize(flat_N, dtype) if holds_changes(dtype) else [flat_N.to(getattr(torch, dtype))]
    )
    for part in parts:
        yield part.view(torch.uint8).numpy().data


__all__ = [
    "MAGIC",
    "MAX_ALPHA",
    "MAX_RANK",
    "REFERENCE_MISSING",
    "VERSION",
    "Factors",
    "MissingReferenceError",
    "Update",
    "WireError",
    "content_digest",
    "encode",
    "header_of",
    "message_bytes",
    "open_update",
    "payload_bytes",
    "reference_of",
    "write_message",
]
