import hashlib
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cleaning import clean
from client.fingerprint import (
    SECRET,
    FingerprintError,
    fingerprint,
    key_of,
    read_secret,
    share_a_record,
)
from client.records import Record, read_records
from tests.conftest import write_records

KEY = bytes(range(32))


def record(prompt: str, response: str = "yes", line: int = 1) -> Record:
    return Record(prompt, response, line)


def test_renaming_reordering_case_and_white_space_change_nothing(tmp_path):
    one = write_records(tmp_path / "a.jsonl", 40)
    lines = [json.loads(line) for line in one.read_text().splitlines()]
    lines = lines[20:] + lines[:20][::-1]
    for line in lines:
        line["prompt"] = "  " + line["prompt"].upper().replace(" ", "\t\n ")
        line["response"] = unicodedata.normalize("NFD", line["response"]) + " "
    two = tmp_path / "renamed.jsonl"
    two.write_text("\n".join(map(json.dumps, lines + lines[:7])))
    first, second = (fingerprint(read_records(path), KEY) for path in (one, two))
    assert first == second
    assert first.num_records == 40
    assert first.digest == hashlib.sha256(first.records).hexdigest()


@given(st.lists(st.sampled_from("aAbBcC \u00e9").map(lambda x: f"p{x}"), min_size=1, max_size=12))
def test_what_is_trained_on_has_as_many_records_as_its_fingerprint(prompts):
    """So the rate at which a step draws is the rate that is charged."""
    kept = clean([record(prompt) for prompt in prompts]).kept
    assert fingerprint(kept, KEY).num_records == len(kept)


def test_one_changed_letter_makes_another_data_set():
    many = [record(f"question {index}") for index in range(10)]
    other = [*many[:-1], record("question 9?")]
    assert fingerprint(many, KEY).digest != fingerprint(other, KEY).digest
    # What is prompt and what is response counts too.
    assert fingerprint([record("a", "b")], KEY) != fingerprint([record("b", "a")], KEY)


@given(st.lists(st.integers(0, 60), max_size=20), st.lists(st.integers(0, 60), max_size=20))
@settings(max_examples=60, deadline=None)
def test_data_sets_share_a_record_as_python_sets_do(left, right):
    one, two = (
        fingerprint([record(f"{index}") for index in numbers], KEY) for numbers in (left, right)
    )
    assert share_a_record(one.records, two.records) == bool(set(left) & set(right))
    assert one.num_records == len(set(left))


def test_digests_are_in_order_and_compared_whole_when_they_hold_zeros():
    # numpy's strings drop zeros at their end: 16 bytes must stay 16 bytes.
    ends = [bytes(15) + b"\1", b"\1" + bytes(15), bytes(16), b"\1\0" + bytes(13) + b"\1"]
    for one in ends:
        for two in ends:
            assert share_a_record(one, two) == (one == two)
        assert share_a_record(one, b"".join(sorted(ends)))
    made = fingerprint((record(f"{index}") for index in range(3000)), KEY).records
    cut = [made[place : place + 16] for place in range(0, len(made), 16)]
    assert cut == sorted(set(cut))
    assert len(cut) == 3000


def test_without_the_secret_a_guess_cannot_be_tested():
    guess = [record("the patient has a fever")]
    kept = fingerprint(guess, KEY)
    other = fingerprint(guess, bytes(32))
    assert not share_a_record(kept.records, other.records)
    assert kept.key == key_of(KEY) != other.key
    assert KEY.hex() not in repr(kept)
    assert kept.records.hex() not in repr(kept)


def test_the_secret_is_made_once_and_is_for_its_owner_only(tmp_path):
    state = tmp_path / "state"
    secret = read_secret(state)
    assert len(secret) == 32
    assert read_secret(state) == secret
    assert (state / SECRET).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in state.iterdir()] == [SECRET]
    assert read_secret(tmp_path / "other") != secret


def test_a_secret_that_others_read_or_that_is_damaged_is_refused(tmp_path):
    read_secret(tmp_path)
    (tmp_path / SECRET).chmod(0o640)
    with pytest.raises(FingerprintError, match="chmod 600"):
        read_secret(tmp_path)
    (tmp_path / SECRET).chmod(0o600)
    (tmp_path / SECRET).write_bytes(b"short")
    with pytest.raises(FingerprintError, match="has 5 bytes, not 32: put it back"):
        read_secret(tmp_path)
