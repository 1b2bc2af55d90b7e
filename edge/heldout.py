"""Held-out text for the fidelity check: JSONL with `prompt` and `response`, as sites keep it.

Read strictly, each complaint names the line; no message ever holds a record's text.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from edge.chat import TEMPLATE_ERRORS
from edge.errors import UserError

MAX_EXAMPLE_TOKENS = 512

PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Count to twelve.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."),
    (
        "How does one make tea?",
        (
            "First boil some water. Then put the leaves in a pot, pour the water over them and "
            "wait for three to five minutes before you pour it into a cup."
        ),
    ),
    ("Write a Python function that adds.", "def add(a, b):\n    return a + b\n"),
    (
        "Why is the sky blue?",
        (
            "Sunlight is scattered by the molecules of the air, and blue light, whose waves are "
            "shorter, is scattered more than red light. So blue reaches our eyes from all sides."
        ),
    ),
    ("Sage es auf Deutsch: good morning!", "Guten Morgen! Schöne Grüße aus Köln."),
)
"""Prompts and responses that every build is checked with when the user gives none."""


class DataError(UserError):
    """A held-out file, or one line of it, is not what it has to be."""


@dataclass(frozen=True)
class Example:
    """One record as the model sees it."""

    token_ids: list[int]
    positions: list[int]
    """Where the next token is one of the response: what is scored."""


def read_heldout(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return (prompt, response) pairs, one of each file in turn, so that each file has a say.

    Raises:
        DataError: A file is missing or empty, or a line is not such a record.
    """
    files = [list(_iterate(path)) for path in paths]
    for path, records in zip(paths, files, strict=True):
        if not records:
            raise DataError(
                f'{path} holds no record: expected lines of {{"prompt": …, "response": …}}'
            )
    return [record for record in chain(*zip_longest(*files)) if record is not None]


def encode_examples(
    records: Sequence[tuple[str, str]], tokenizer: Any, num_tokens: int
) -> list[Example]:
    """Render records by the chat template and choose ``num_tokens`` positions to score.

    Args:
        records: Prompts and responses.
        tokenizer: A transformers tokenizer with a chat template.
        num_tokens: How many response tokens to score in all; what lies beyond is left out.

    Raises:
        DataError: No prompt leaves room for a response, or the chat template refuses a record or
            does not begin the whole turn with the prompt.
    """
    examples: list[Example] = []
    left = num_tokens
    for prompt, response in records:
        if left <= 0:
            break
        prompt_ids, response_ids = _encode(prompt, response, tokenizer)
        if len(prompt_ids) >= MAX_EXAMPLE_TOKENS:
            continue
        kept = response_ids[: min(left, MAX_EXAMPLE_TOKENS - len(prompt_ids))]
        first = len(prompt_ids) - 1
        examples.append(Example([*prompt_ids, *kept], list(range(first, first + len(kept)))))
        left -= len(kept)
    if not examples:
        raise DataError(
            f"no held-out prompt is below {MAX_EXAMPLE_TOKENS} tokens: use shorter records"
        )
    return examples


def _encode(prompt: str, response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    user = [{"role": "user", "content": prompt}]
    turn = [*user, {"role": "assistant", "content": response}]
    try:
        before = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turn, tokenize=False)
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"the model's chat template cannot render a prompt and its response "
            f"({type(error).__name__}): mend the template"
        ) from None
    if not whole.startswith(before):
        raise DataError(
            "the model's chat template begins a finished turn otherwise than the prompt it asks to "
            "be continued (some add <think> there), so that no response can be scored: use a "
            "template whose generation prompt is how the assistant's turn begins"
        )
    # The end of turn is scored too; a newline that the template writes after it is not.
    answer = whole[len(before) :].rstrip("\n")
    prompt_ids = tokenizer.encode(before, add_special_tokens=False)
    response_ids = tokenizer.encode(answer, add_special_tokens=False)
    if not prompt_ids or not response_ids:
        raise DataError(
            "the model's chat template leaves no token of a prompt or of a response, so that there "
            "is nothing to score: use a template that writes both"
        )
    return prompt_ids, response_ids


def _iterate(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file: pass a JSONL file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _parse(raw, f"{path}:{number}")


def _parse(raw: bytes, place: str) -> tuple[str, str]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON ({error.msg} at column {error.colno}): "
            'expected one object a line, {"prompt": …, "response": …}'
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: not a JSON object: expected prompt and response")
    for field in ("prompt", "response"):
        text = value.get(field)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: field '{field}' is not a non-empty string: fill it")
    return value["prompt"], value["response"]
