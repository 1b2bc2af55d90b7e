"""A message on disk: checked from its first to its last byte, then read one module at a time.

A server that folds 16 sites holds one module of each and never a whole adapter. Whatever
travelled (a change in blocks, one factor of two), what is read is the adapter itself in float32.

Shape letters: O out features, I in features, R rank, C columns (O or I), N numbers, K blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from federation.adapter import Adapter, LowRank
from federation.blocks import (
    SCALE_BYTES,
    dequantize_into,
    num_blocks,
    num_code_bytes,
)
from federation.header import (
    DIGEST_BYTES,
    FACTORS,
    LARGEST,
    Header,
    Place,
    WireError,
    holds_changes,
    read_head,
    write_head,
)

if TYPE_CHECKING:
    from torch import Tensor


class Factors(Protocol):
    """An adapter in memory (`Adapter`) or on disk (`Update`)."""

    @property
    def rank(self) -> int:
        """Slices of every factor."""
        ...

    @property
    def alpha(self) -> float:
        """LoRA alpha."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Return (out features, in features) by module."""
        ...

    def rows(self, module: str, factor: str, num_rows: int) -> Tensor:
        """Return the first slices of one factor, contiguous [num_rows, C] float32."""
        ...


class Readable(Factors, Protocol):
    """One site's update, as an average reads it: a module at a time."""

    @property
    def base_model(self) -> str:
        """Digest of the base model that it belongs to."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of the message."""
        ...

    @property
    def modules(self) -> list[str]:
        """Module names, in the order of the message."""
        ...

    def read(self, module: str) -> LowRank:
        """Return the factors of one module, float32."""
        ...

    def read_rows(self, module: str, b_RO: Tensor, a_RI: Tensor) -> None:
        """Fill two float32 tensors with the first rank slices of one module."""
        ...


class MissingReferenceError(WireError):
    """The message stands on an adapter that this side does not hold."""


def content_digest(adapter: Factors, base_model: str) -> str:
    """Return the checksum that the adapter's float32 message has, without making the message.

    It names an adapter on both sides of the wire, whatever the message was that brought it.
    """
    digest = hashlib.sha256(whole_head(adapter, base_model))
    for module, factor in tensors_of(adapter):
        digest.update(whole_rows(adapter, module, factor).flatten().numpy().data)
    return digest.hexdigest()


def whole_head(adapter: Factors, base_model: str) -> bytes:
    """Return the head of the adapter's float32 message."""
    return write_head(
        adapter.shapes(),
        rank=adapter.rank,
        alpha=adapter.alpha,
        dtype="float32",
        factors="AB",
        base_model=base_model,
        reference="",
    )


def tensors_of(adapter: Factors, factors: str = "AB") -> Iterator[tuple[str, str]]:
    """Yield module and factor of every tensor, in the order of a message."""
    return ((module, factor) for module in sorted(adapter.shapes()) for factor in FACTORS[factors])


def whole_rows(adapter: Factors, module: str, factor: str) -> Tensor:
    """Return all slices of one factor [R, C] to be read only: perhaps the adapter's own memory."""
    if isinstance(adapter, Update) and adapter.numbers is not None and factor in adapter.factors:
        return adapter.numbers[f"{module}.{factor}"]
    return adapter.rows(module, factor, adapter.rank)


def is_within(values: Tensor, largest: float) -> bool:
    """Tell whether all numbers are finite and none is larger, either way, in one pass."""
    low, high = values.aminmax()  # both are NaN if one number is
    return float(low) >= -largest and float(high) <= largest


@dataclass(frozen=True)
class Update:
    """An adapter on disk, checked, read one module at a time."""

    path: Path
    sha256: str
    """Of the whole message: what the lineage names."""
    checksum: str
    """The message's last 32 bytes, in hex."""
    num_bytes: int
    header: Header
    origin: Update | None = None
    """The reference itself, where ``reference`` names one."""
    numbers: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """Its tensors by name, absolute, where they are kept in memory; nobody changes them."""
    content: str = ""
    """Content digest, where it is known."""

    @property
    def rank(self) -> int:
        """Slices of every factor; may be fewer than the reference has."""
        return self.header.rank

    @property
    def alpha(self) -> float:
        """LoRA alpha: the update is alpha / rank * B @ A."""
        return self.header.alpha

    @property
    def base_model(self) -> str:
        """Digest of the base model that it belongs to."""
        return self.header.base_model

    @property
    def dtype(self) -> str:
        """How its numbers travelled."""
        return self.header.dtype

    @property
    def factors(self) -> str:
        """The factors that travelled: "AB", "A" or "B"."""
        return self.header.factors

    @property
    def reference(self) -> str:
        """Content digest of the adapter it stands on, or ""."""
        return self.header.reference

    @cached_property
    def modules(self) -> list[str]:
        """Module names in the order of the message."""
        last = f".{FACTORS[self.factors][-1]}"
        return [name.removesuffix(last) for name in self.header.places if name.endswith(last)]

    @cached_property
    def sha256_of_content(self) -> str:
        """Content digest of the adapter; costs a walk over it if nobody knows it."""
        return self.content or content_digest(self, self.base_model)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out features, in features) by module."""
        return {name: (self.columns(name, "B"), self.columns(name, "A")) for name in self.modules}

    def read(self, module: str) -> LowRank:
        """Return the factors of one module, float32: absolute, whatever travelled."""
        b_RO = self.rows(module, "B", self.rank)
        return LowRank(b_RO.mT.contiguous(), self.rows(module, "A", self.rank))

    def read_rows(self, module: str, b_RO: Tensor, a_RI: Tensor) -> None:
        """Fill two float32 tensors with the first rank slices of one module.

        A float32 message is read straight into them. The tensors may be rows of larger ones.

        Args:
            module: Its name.
            b_RO: B transposed, contiguous; at most ``rank`` rows.
            a_RI: A, contiguous; at most ``rank`` rows.

        Raises:
            WireError: The file became shorter since it was checked.
        """
        self._read_factor(module, "B", b_RO)
        self._read_factor(module, "A", a_RI)

    def adapter(self) -> Adapter:
        """Return the whole adapter."""
        return Adapter(self.rank, self.alpha, {name: self.read(name) for name in self.modules})

    def rows(self, module: str, factor: str, num_rows: int) -> Tensor:
        """Return the first slices of one factor, absolute: [num_rows, C] float32."""
        import torch

        rows_RC = torch.empty(num_rows, self.columns(module, factor))
        self._read_factor(module, factor, rows_RC)
        return rows_RC

    def columns(self, module: str, factor: str) -> int:
        """Return the out features of a module ("B") or its in features ("A")."""
        place = self.header.places.get(f"{module}.{factor}")
        if place is not None:
            return place.num_columns
        return self._held.columns(module, factor)

    @property
    def _held(self) -> Update:
        if self.origin is None:
            raise AssertionError("open_update gives a reference to every message that needs one")
        return self.origin

    def _read_factor(self, module: str, factor: str, rows_RC: Tensor) -> None:
        if factor not in self.factors:
            self._held._read_factor(module, factor, rows_RC)
            return
        if self.numbers is not None:
            rows_RC.copy_(self.numbers[f"{module}.{factor}"][: len(rows_RC)])
            return
        with self.path.open("rb") as file:
            _fill(file, self.header.places[f"{module}.{factor}"], self.dtype, rows_RC)
        if holds_changes(self.dtype):
            reference_RC = rows_RC.new_empty(rows_RC.shape)
            self._held._read_factor(module, factor, reference_RC)
            rows_RC.add_(reference_RC)


def header_of(path: Path) -> Header:
    """Return what a message says of itself, and its length bears out; nothing else is read.

    Raises:
        WireError: The header is not one, or speaks of another length.
    """
    with path.open("rb") as file:
        return read_head(file.read, path.stat().st_size)


def reference_of(path: Path) -> str:
    """Return the content digest of the adapter that a message stands on, or "": from its header.

    Raises:
        WireError: The header is not one.
    """
    return header_of(path).reference


def open_update(
    path: Path,
    *,
    reference: Update | None = None,
    refuse: Callable[[Update], None] = lambda _: None,
    keeps: bool = False,
) -> Update:
    """Check a message on disk from its first to its last byte and return its table of contents.

    Args:
        path: The message.
        reference: The adapter it stands on. Not looked at if the message stands alone.
        refuse: Raises WireError for an update that is not wanted. It hears what the header says,
            before a value is read: one tensor as large as the message takes several times that
            in memory.
        keeps: The numbers stay in memory, as float32: for who reads them all several times.

    Raises:
        MissingReferenceError: It stands on another adapter than ``reference``; both are named.
        WireError: Another format or version, a wrong checksum, a length that does not match the
            header, or a value that is not finite; the value seen and the one expected are named.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        header = read_head(file.read, size)
        digest.update(header.raw)
        remaining = header.payload_bytes
        while remaining and (piece := file.read(min(1 << 20, remaining))):
            remaining -= len(piece)
            digest.update(piece)
        seen = file.read(DIGEST_BYTES)
    if seen != digest.digest():
        raise WireError(
            f"the update's checksum is {seen.hex()[:16]}…, its content gives "
            f"{digest.hexdigest()[:16]}…: it was damaged on the way"
        )
    digest.update(seen)
    update = Update(
        path=path,
        sha256=digest.hexdigest(),
        checksum=seen.hex(),
        num_bytes=size,
        header=header,
        origin=_resolve(header, reference),
        content=seen.hex() if (header.dtype, header.factors) == ("float32", "AB") else "",
    )
    refuse(update)
    numbers: dict[str, Tensor] = {}
    content = hashlib.sha256(whole_head(update, update.base_model))
    for module, factor in tensors_of(update, update.factors):
        rows_RC = update.rows(module, factor, update.rank)
        if not is_within(rows_RC, LARGEST):
            raise WireError(
                f"the update's {module}.{factor} holds NaN, infinity or a number beyond {LARGEST:g}"
            )
        if keeps:
            numbers[f"{module}.{factor}"] = rows_RC
            if not update.content:
                content.update(rows_RC.numpy().data)
    if not keeps:
        return update
    is_whole = update.factors == "AB"
    known = update.content or (content.hexdigest() if is_whole else "")
    return replace(update, numbers=numbers, content=known)


def _resolve(header: Header, reference: Update | None) -> Update | None:
    """Return the reference of a message, once it is known to be the right one."""
    if not header.reference:
        return None
    held = reference.sha256_of_content if reference is not None else ""
    if reference is None or held != header.reference:
        raise MissingReferenceError(
            f"the update stands on adapter {header.reference[:16]}…, this side holds "
            f"{f'{held[:16]}…' if held else 'none'}: send it against that one, or as float32"
        )
    for factor in header.factors:
        columns = {
            name.removesuffix(f".{factor}"): place.num_columns
            for name, place in header.places.items()
            if name.endswith(f".{factor}")
        }
        if columns != {name: reference.columns(name, factor) for name in reference.modules}:
            raise WireError("the update's modules or shapes are not those of its reference")
    if header.base_model != reference.base_model:
        raise WireError(
            f"the update belongs to base model {header.base_model[:16]}…, its reference to "
            f"{reference.base_model[:16]}…"
        )
    refuse_other_slices(header.rank, header.alpha, reference)
    return reference


def refuse_other_slices(rank: int, alpha: float, reference: Factors) -> None:
    """Let a change have fewer rank slices than its reference, but at the same scale.

    Raises:
        WireError: It has more, or another scale; both are named.
    """
    scale = reference.alpha / reference.rank
    if rank > reference.rank or not math.isclose(alpha / rank, scale, rel_tol=1e-9):
        raise WireError(
            f"rank {rank} and alpha {alpha:g} do not fit a reference of rank {reference.rank} and "
            f"alpha {reference.alpha:g}: expected no more slices, at the same scale {scale:g}; "
            "send the whole adapter as float32"
        )


def _fill(file: BinaryIO, place: Place, dtype: str, rows_RC: Tensor) -> None:
    """Read the first rows of a tensor into ``rows_RC``."""
    import torch

    flat_N = rows_RC.view(-1)
    count = flat_N.numel()
    if holds_changes(dtype):
        scales_K = torch.empty(num_blocks(count, dtype), dtype=torch.bfloat16)
        codes = torch.empty(num_code_bytes(count, dtype), dtype=torch.uint8)
        _read_into(file, place.offset, scales_K)
        offset = place.offset + SCALE_BYTES * num_blocks(place.num_numbers, dtype)
        _read_into(file, offset, codes)
        dequantize_into(flat_N, scales_K, codes, dtype)
    elif dtype == "float32":
        _read_into(file, place.offset, flat_N)
    else:
        narrow_N = torch.empty(count, dtype=torch.bfloat16)
        _read_into(file, place.offset, narrow_N)
        flat_N.copy_(narrow_N)


def _read_into(file: BinaryIO, offset: int, flat: Tensor) -> None:
    """Read bytes straight into a flat tensor's own memory."""
    import torch

    view = flat.view(torch.uint8).numpy().data
    file.seek(offset)
    if file.readinto(view) != len(view):  # type: ignore[attr-defined]
        raise WireError("the update became shorter since it was checked: leave its file alone")
