"""Private text on disk: JSONL, one object a line with `prompt` and `response`.

Reading is strict and names the line. Messages never hold a record's text: they are logged.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.errors import UserError

FIELDS = ("prompt", "response")


class DataError(UserError):
    """A data set, or one line of it, is not what it has to be."""


@dataclass(frozen=True)
class Record:
    """One training example."""

    prompt: str
    response: str
    line: int
    """Where it stands in its file, from 1."""


def read_records(path: Path) -> list[Record]:
    """Return every record of a JSONL file, in order. Blank lines are passed over.

    Raises:
        DataError: The file is missing or holds no record, or a line is not a JSON object with
            exactly the string fields `prompt` and `response`, both non-empty.
    """
    records = list(_iterate(path))
    if not records:
        raise DataError(f'{path} holds no record: expected lines of {{"prompt": …, "response": …}}')
    return records


def _iterate(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file: pass a JSONL file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: byte {error.start} is not UTF-8: convert the file to UTF-8"
                ) from None
            if line.strip():
                # Without its end, which the parser would count as a line of its own.
                yield _parse(line.rstrip("\r\n"), place, number)


def _parse(line: str, place: str, number: int) -> Record:
    try:
        value = json.loads(line, object_pairs_hook=_without_repeated_keys)
    except json.JSONDecodeError as error:
        # The parser's own message is safe to show; its `doc` holds the text and is dropped.
        raise DataError(
            f"{place}: not JSON ({error.msg} at column {error.colno}): "
            'expected one object a line, {"prompt": …, "response": …}'
        ) from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{place}: a field twice, a number too long or nesting too deep: "
            'expected one object a line, {"prompt": …, "response": …}'
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON {_kind(value)}: expected an object")
    for field in FIELDS:
        if field not in value:
            raise DataError(
                f"{place}: field '{field}' is missing: a record has prompt and response"
            )
        if not isinstance(value[field], str):
            raise DataError(
                f"{place}: field '{field}' is a JSON {_kind(value[field])}: expected a string"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in value[field]):
            raise DataError(
                f"{place}: field '{field}' holds half a character (a lone surrogate escape): "
                "write the character itself, in UTF-8"
            )
        if not value[field].strip():
            raise DataError(f"{place}: field '{field}' is empty: fill it or remove the line")
    if extra := len(value.keys() - set(FIELDS)):
        raise DataError(
            f"{place}: {extra} field(s) besides prompt and response: remove them, "
            "so that nothing is silently ignored"
        )
    return Record(value["prompt"], value["response"], number)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
