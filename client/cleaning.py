"""What of a data set is kept for training: rules that count what they drop, by line number.

Each rule is a predicate on one record with a name; `clean` runs them in order and the first that
fires is the record's reason. Nothing here prints or returns text to a log.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from client.records import Record


@dataclass(frozen=True)
class Cleaned:
    """The records that stay, and the lines that go, by rule."""

    kept: list[Record]
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Rule name to line numbers, in file order."""


def clean(
    records: Sequence[Record],
    *,
    min_characters: int = 2,
    max_characters: int = 20_000,
) -> Cleaned:
    """Drop exact duplicates and records whose response is too short or too long.

    Two records are duplicates when prompt and response are equal after NFKC normalisation,
    case folding and collapsing of white space; the first one stays.

    Args:
        records: In file order.
        min_characters: Shortest response kept, after stripping.
        max_characters: Longest prompt or response kept.
    """
    kept: list[Record] = []
    dropped: dict[str, list[int]] = {}
    seen: set[bytes] = set()
    for record in records:
        fingerprint = content_digest(record)
        if len(record.response.strip()) < min_characters:
            rule = "response_too_short"
        elif max(len(record.prompt), len(record.response)) > max_characters:
            rule = "too_long"
        elif fingerprint in seen:
            rule = "duplicate"
        else:
            seen.add(fingerprint)
            kept.append(record)
            continue
        dropped.setdefault(rule, []).append(record.line)
    return Cleaned(kept, dropped)


def content_digest(record: Record) -> bytes:
    """Return 16 bytes that are equal for records with the same normalised text."""
    text = "\0".join(_normalise(part) for part in (record.prompt, record.response))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
