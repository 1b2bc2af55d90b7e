import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cleaning import clean, content_digest
from client.records import DataError, Record, read_records

SECRET = "Mrs Jones has a fever"


def lines(tmp_path: Path, *rows: str | bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else r.encode() for r in rows) + b"\n")
    return path


def row(prompt: str = "p", response: str = "r") -> str:
    return json.dumps({"prompt": prompt, "response": response})


def test_records_keep_their_order_and_line(tmp_path: Path) -> None:
    path = lines(tmp_path, row("a", "b"), "", row("c", "d\n"))
    assert read_records(path) == [Record("a", "b", 1), Record("c", "d\n", 3)]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("{" + SECRET, r"data\.jsonl:2: not JSON \(Expecting property name.* at column 2\)"),
        ('{"prompt": "' + SECRET, r"data\.jsonl:2: not JSON \(.* at column 12\)"),
        ('{"prompt": "p", "response": "r"', r"data\.jsonl:2: not JSON \(.* at column 32\)"),
        (json.dumps([SECRET]), "data.jsonl:2: a JSON array: expected an object"),
        (json.dumps({"prompt": SECRET}), "data.jsonl:2: field 'response' is missing"),
        (json.dumps({"prompt": SECRET, "response": 7}), "'response' is a JSON number"),
        (json.dumps({"prompt": SECRET, "response": None}), "'response' is a JSON null"),
        (json.dumps({"prompt": " ", "response": SECRET}), "field 'prompt' is empty"),
        (json.dumps({"prompt": "p", "response": SECRET, SECRET: 1}), "1 field.s. besides"),
        (b'{"prompt": "\xff", "response": "x"}', "byte 12 is not UTF-8"),
        ('{"prompt": "Jones", "prompt": "Jones", "response": "x"}', "a field twice"),
        ('{"prompt": "Jones", "response": ' + "9" * 5000 + "}", "a number too long"),
        ('{"prompt": ' + "[" * 100_000 + "}", "nesting too deep"),
        ('{"prompt": "Jones \\ud800", "response": "x"}', "lone surrogate"),
    ],
)
def test_a_bad_line_is_named_and_its_text_is_not(
    tmp_path: Path, bad: str | bytes, sentence: str
) -> None:
    path = lines(tmp_path, row(), bad, row())
    with pytest.raises(DataError, match=sentence) as caught:
        read_records(path)
    assert "Jones" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        read_records(lines(tmp_path, "", "  "))
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")


def test_duplicates_are_equal_after_normalisation_and_the_first_stays() -> None:
    records = [
        Record("What is ﬁre?", "Hot  air.", 1),
        Record("what is FIRE?", "hot air.", 2),
        Record("What is fire?", "Cold air.", 3),
        Record("What is ice?", "x", 4),
        Record("What is snow?", "y" * 50, 5),
    ]
    cleaned = clean(records, min_characters=2, max_characters=40)
    assert [record.line for record in cleaned.kept] == [1, 3]
    assert cleaned.dropped == {"duplicate": [2], "response_too_short": [4], "too_long": [5]}


def test_prompt_and_response_do_not_run_into_each_other() -> None:
    assert content_digest(Record("ab", "c", 1)) != content_digest(Record("a", "bc", 1))


@given(st.lists(st.tuples(st.text(min_size=1, max_size=4), st.text(min_size=1, max_size=4))))
def test_every_record_is_kept_or_dropped_once(pairs: list[tuple[str, str]]) -> None:
    records = [Record(p, r, line) for line, (p, r) in enumerate(pairs, start=1)]
    cleaned = clean(records)
    dropped = [line for rule in cleaned.dropped.values() for line in rule]
    assert sorted([r.line for r in cleaned.kept] + dropped) == list(range(1, len(pairs) + 1))
    digests = [content_digest(record) for record in cleaned.kept]
    assert len(set(digests)) == len(digests)
