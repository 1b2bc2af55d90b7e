"""The description of a run that its owner signs, and the check that a request is of that run.

A site that lists a signer lets every run of that signer in; without a signature its policy must
name the run itself. Signed is everything of a run that a site judges and that stays the same from
round to round: who, on which base, for how long, with which training, how large an adapter, among
how many sites, and what comes back. Not signed are a round's number (up to ``num_rounds``) and the
numbers in the adapter: the owner does not know them beforehand.

The description travels with every request, beside its signature. So a site verifies the signature
over the bytes that it got, and then holds each field to what is asked of it and to what it read
from the message: what differs has a name. The signed bytes are a fixed first line (so that a
signature for another purpose never fits) and canonical JSON: sorted keys, no spaces, ASCII, numbers
as Python writes them.

Keys and signatures are raw Ed25519 (RFC 8032) in hex: 64 and 128 digits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from federation.settings import AGGREGATIONS, Dtype, Settings
from federation.signing_key import is_of_low_order

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FIRST_LINE = b"fedge run description, version 3\n"
MAX_DESCRIPTION = 32 << 10
"""Bytes; the head of a message has room for twice as many."""
MOMENT = "%Y-%m-%dT%H:%M:%SZ"
_MAX_SHOWN = 80

RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class RunDescription(Settings):
    """What a run asks of a site, from its first round to its last."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    run: RunId
    """Random id of the run."""
    bundle: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    """sha256 of the app bundle that the run carries. Empty = the side that asks cannot know it."""
    base_model: Digest
    """Digest of the base model."""
    num_rounds: Annotated[int, Field(ge=1)]
    """Rounds that the run may ask."""
    aggregation: AGGREGATIONS
    factors: Literal["both", "one"]
    """How many of A and B a round trains."""
    rank: Annotated[int, Field(ge=1)]
    """Slices of the adapter in the first round."""
    alpha: float
    """LoRA alpha of that rank: where the rank may change, alpha / rank stays."""
    min_rank: Annotated[int, Field(ge=1)]
    """Fewest slices in any round, and"""
    max_rank: Annotated[int, Field(ge=1)]
    """most of them; both are ``rank`` where it is fixed."""
    modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Kinds of modules that have factors, sorted: names with * for each number (`module_kinds`)."""
    num_modules: Annotated[int, Field(ge=1)]
    uplink: Dtype
    """Number format of what leaves a site."""
    downlink: Dtype
    """Number format of what is sent to it."""
    training: dict[str, Any]
    """The training settings exactly as the sites get them."""
    metrics: Annotated[tuple[str, ...], Field(strict=False)]
    """Names of what comes back beside the update, in the order asked."""
    cohort: Annotated[int, Field(ge=0)]
    """Fewest updates in an average; with a secure sum the sites that it asks."""
    secure_sum: Annotated[dict[str, Any], Field(min_length=1)] | None
    """Terms of the secure sum."""
    not_after: Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z$|^$")]
    """When the signature ends, in UTC; empty in what is asked."""

    @field_validator("training", "secure_sum")
    @classmethod
    def _says_values(
        cls, table: dict[str, Any] | None, info: ValidationInfo
    ) -> dict[str, Any] | None:
        # NaN would be signed as null, and null read as a setting that is not there.
        for name, value in (table or {}).items():
            is_finite = isinstance(value, int) or (
                isinstance(value, float) and math.isfinite(value)
            )
            if not (is_finite or isinstance(value, str)):
                raise ValueError(
                    f"{info.field_name}.{name} is {_shown(value)}: expected a finite number, a "
                    "text or a boolean"
                )
        return table

    @model_validator(mode="after")
    def _rank_is_in_its_range(self) -> Self:
        if not self.min_rank <= self.rank <= self.max_rank:
            raise ValueError(
                f"rank is {self.rank}: expected min_rank {self.min_rank} to max_rank "
                f"{self.max_rank}"
            )
        return self

    @property
    def content(self) -> str:
        """Canonical JSON: what travels."""
        return canonical_json(self.model_dump(mode="json")).decode("ascii")


def parse_description(content: str) -> RunDescription:
    """Return the description that stands in canonical JSON.

    Raises:
        ValueError: It is longer than any, not canonical (a key twice, say), or not of this version.
    """
    try:
        if len(content) > MAX_DESCRIPTION:
            raise ValueError
        said = json.loads(content)
        if canonical_json(said) != content.encode("ascii"):
            raise ValueError
        description = RunDescription.model_validate(said)
        datetime.strptime(description.not_after, MOMENT)  # noqa: DTZ007 - only whether it is one
    except (ValueError, ValidationError, RecursionError):
        raise ValueError("no description of a run that this version can read") from None
    return description


def canonical_json(value: Any) -> bytes:
    """Return the one form in which a JSON value is signed and hashed.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sign(key: Ed25519PrivateKey, content: str) -> str:
    """Return the signature of a description, 128 hex digits."""
    return key.sign(FIRST_LINE + content.encode("ascii")).hex()


def is_signed_by(public_key: str, signature: str, content: str) -> bool:
    """Tell whether the owner of a key signed a description.

    A key of low order has no owner: anybody can sign for it.

    Args:
        public_key: 64 hex digits.
        signature: 128 hex digits.
        content: `RunDescription.content`, as it came.

    Raises:
        ValueError: The key or the signature is not hex, or the key has another length.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    if is_of_low_order(public_key):
        return False
    try:
        key.verify(bytes.fromhex(signature), FIRST_LINE + content.encode())
    except InvalidSignature:
        return False
    return True


def is_over(signed: RunDescription, now: datetime) -> bool:
    """Tell whether a signature has ended.

    Args:
        signed: Of the run; it says when.
        now: With a time zone.
    """
    end = datetime.strptime(signed.not_after, MOMENT).replace(tzinfo=UTC)
    return now > end


def difference(signed: RunDescription, asked: RunDescription) -> str:
    """Return the first field in which what is asked is not what was signed, or "".

    The rank may be any in the signed range, at the signed scale alpha / rank; a bundle that the
    asking side cannot know (empty) is not compared; the end of the signature is `is_over`'s.
    """
    if not signed.min_rank <= asked.min_rank <= asked.max_rank <= signed.max_rank:
        return f"rank is {_range(asked)}, signed is {_range(signed)}"
    if not math.isclose(asked.alpha / asked.rank, signed.alpha / signed.rank, rel_tol=1e-9):
        ours, theirs = (f"{side.alpha:.15g} at rank {side.rank}" for side in (asked, signed))
        return f"alpha is {ours}, signed is {theirs}"
    leave = {"rank", "min_rank", "max_rank", "alpha", "not_after"}
    leave |= set() if asked.bundle else {"bundle"}
    said, want = (_flat(side.model_dump(mode="json", exclude=leave)) for side in (asked, signed))
    for name in [*want, *(name for name in said if name not in want)]:
        ours, theirs = (_shown(side.get(name)) for side in (said, want))
        # As they are written: True is not 1 and 1.0 is not 1, as in the canonical form.
        # No value is null: what `get` says so of is not there.
        if canonical_json(said.get(name)) != canonical_json(want.get(name)):
            return f"{name} is {ours}, signed is {theirs}"
    return ""


def module_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of modules: ``model.layers.3.mlp.up_proj`` is model.layers.*.mlp.up_proj.

    With their number they name the modules of a base model, without a line for each layer.
    """
    return tuple(sorted({re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name) for name in names}))


def _range(described: RunDescription) -> str:
    low, high = described.min_rank, described.max_rank
    return f"{low}" if low == high else f"{low} to {high}"


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    """Return a value in at most 80 ASCII characters, and of a digest the beginning."""
    if value is None:
        return "none"
    text = json.dumps(value)
    if re.fullmatch('"[0-9a-f]{64}"', text):
        return f"{text[1:17]}…"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
