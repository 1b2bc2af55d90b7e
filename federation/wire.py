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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from federation.atomic import atomic_file
from federation.blocks import dequantize_into, quantize
from federation.header import (
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
    is_within,
    open_update,
    reference_of,
    refuse_other_slices,
    tensors_of,
    whole_head,
    whole_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_MISSING = 1002
"""Error code of a reply: the site lacks the adapter that a change stands on, send it whole."""


Sent = Callable[[str, str, "Tensor", "Tensor"], None]
"""Called for each tensor of a message: module, factor, its rows [R, C], and what whoever reads the
message will have in their place. The latter is the callee's; the former may be the adapter's own
memory."""


def encode(
    adapter: Factors,
    *,
    dtype: str,
    base_model: str,
    reference: Factors | None = None,
    factors: str = "AB",
    sent: Sent | None = None,
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
        sent: Hears what the reader will have.

    Raises:
        WireError: A factor holds NaN, infinity or a number beyond 1e15, or there is no reference
            where one is needed, or it is another model's.
    """
    digest, pieces = hashlib.sha256(), []
    for piece in _pieces(adapter, dtype, base_model, reference, factors, sent):
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
    sent: Sent | None = None,
    is_synced: bool = True,
) -> str:
    """Write what ``encode`` returns, atomically, one tensor in memory; return its checksum.

    The checksum of a float32 message is the adapter's content digest.

    Raises:
        WireError: As ``encode``; there is no file then.
    """
    digest = hashlib.sha256()
    with atomic_file(path, is_synced=is_synced) as file:
        for piece in _pieces(adapter, dtype, base_model, reference, factors, sent):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
    return digest.hexdigest()


class WholeMessage:
    """A float32 message that is written tensor by tensor, and read without another look at it."""

    def __init__(self, file: BinaryIO, path: Path, head: bytes) -> None:
        """Write the head."""
        self._file, self._path = file, path
        self._digest = hashlib.sha256(head)
        self._num_bytes = file.write(head)

    def add(self, name: str, rows_RC: Tensor) -> None:
        """Write the next tensor.

        Raises:
            WireError: It holds NaN, infinity or a number beyond 1e15.
        """
        piece = _bytes_of(_checked(name, rows_RC))
        self._digest.update(piece)
        self._num_bytes += self._file.write(piece)

    def _finish(self) -> None:
        self._checksum = self._digest.digest()
        self._digest.update(self._checksum)
        self._num_bytes += self._file.write(self._checksum)

    def opened(self) -> Update:
        """Return the message as `open_update` does, once its block is over."""
        return Update(
            path=self._path,
            sha256=self._digest.hexdigest(),
            checksum=self._checksum.hex(),
            num_bytes=self._num_bytes,
            header=header_of(self._path),
            content=self._checksum.hex(),
        )


@contextmanager
def whole_message(
    path: Path, like: Factors, base_model: str, *, is_synced: bool = True
) -> Iterator[WholeMessage]:
    """Yield where to write an adapter of the layout of another; the file is there at the end."""
    with atomic_file(path, is_synced=is_synced) as file:
        message = WholeMessage(file, path, whole_head(like, base_model))
        yield message
        message._finish()


def write_known(path: Path, adapter: Update) -> None:
    """Write the float32 message of an adapter whose content digest is known: nothing is hashed.

    It outlives a kill, not a loss of power: whoever opens it later has to check it.
    """
    with atomic_file(path, is_synced=False) as file:
        file.write(whole_head(adapter, adapter.base_model))
        for module, factor in tensors_of(adapter):
            file.write(_bytes_of(whole_rows(adapter, module, factor)))
        file.write(bytes.fromhex(adapter.sha256_of_content))


def _pieces(
    adapter: Factors,
    dtype: str,
    base_model: str,
    reference: Factors | None,
    factors: str,
    sent: Sent | None,
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
    for module, factor in tensors_of(adapter, factors):
        rows_RC, held_RC = whole_rows(adapter, module, factor), None
        if changes and reference is not None:
            held_RC = whole_rows(reference, module, factor)[: adapter.rank]
        parts = _tensor_parts(f"{module}.{factor}", rows_RC, held_RC, dtype)
        yield from map(_bytes_of, parts)
        if sent is not None:
            sent(module, factor, rows_RC, _read_back(parts, held_RC, rows_RC, dtype))


def _tensor_parts(
    name: str, rows_RC: Tensor, held_RC: Tensor | None, dtype: str
) -> Sequence[Tensor]:
    """Return a tensor as it travels.

    Raises:
        WireError: It is not finite or too large.
    """
    import torch

    if held_RC is None:
        return [_checked(name, rows_RC).to(getattr(torch, dtype))]
    return quantize(_checked(name, rows_RC - held_RC).flatten(), dtype)


def _read_back(
    parts: Sequence[Tensor], held_RC: Tensor | None, rows_RC: Tensor, dtype: str
) -> Tensor:
    """Return what whoever holds ``held_RC`` reads in the place of ``rows_RC``, bit for bit."""
    import torch

    if held_RC is None:
        return parts[0].to(torch.float32, copy=True)
    read_RC = torch.empty_like(rows_RC)
    dequantize_into(read_RC.view(-1), parts[0], parts[1], dtype)
    return read_RC.add_(held_RC)


def _checked(name: str, values_RC: Tensor) -> Tensor:
    if not is_within(values_RC, LARGEST):
        raise WireError(
            f"{name} holds NaN, infinity or a number beyond {LARGEST:g}: lower the learning rate"
        )
    return values_RC


def _bytes_of(values: Tensor) -> memoryview:
    import torch

    content: memoryview = values.flatten().view(torch.uint8).numpy().data
    return content


__all__ = [
    "MAGIC",
    "MAX_ALPHA",
    "MAX_RANK",
    "REFERENCE_MISSING",
    "VERSION",
    "Factors",
    "MissingReferenceError",
    "Update",
    "WholeMessage",
    "WireError",
    "content_digest",
    "encode",
    "header_of",
    "is_within",
    "message_bytes",
    "open_update",
    "payload_bytes",
    "reference_of",
    "tensors_of",
    "whole_message",
    "whole_rows",
    "write_known",
    "write_message",
]
