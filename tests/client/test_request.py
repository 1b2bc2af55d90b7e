import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.request import (
    MAX_HEAD_BYTES,
    RequestError,
    SiteRequest,
    parse_request,
    with_facts,
)
from federation.header import message_bytes
from tests.client.policy_example import ADAPTER, BASE, REQUEST, changed, without


def parsed(request: dict[str, Any]) -> SiteRequest:
    return parse_request(json.dumps(request).encode())


def refusal(request: dict[str, Any] | bytes) -> str:
    """Return the sentence with which a request is refused."""
    head = request if isinstance(request, bytes) else json.dumps(request).encode()
    with pytest.raises(RequestError) as caught:
        parse_request(head)
    return str(caught.value)


def test_a_request_is_read_as_it_was_written() -> None:
    request = parsed(REQUEST)
    assert (request.server_round, request.trains, request.uplink) == (4, "B", "bfloat16")
    assert request.training == REQUEST["training"]
    assert request.training_settings.accumulation == 2
    assert request.training_settings.learning_rate == 5e-4
    assert (request.batch, request.is_private) == (32, True)
    assert request.secure_sum is not None
    assert request.secure_sum.threshold == 4
    assert request.adapter is not None
    assert request.adapter.modules[1] == "model.layers.11.mlp.up_proj"


def test_what_may_be_left_out_has_its_default() -> None:
    optional = ("metrics", "secure_sum", "adapter")
    request = parsed({key: value for key, value in REQUEST.items() if key not in optional})
    assert request.metrics == ("num-examples", "train_loss", "seconds")
    assert (request.secure_sum, request.adapter, request.signature) == (None, None, "")
    assert (request.num_rounds, request.cohort) == (0, 0)


@pytest.mark.parametrize(
    "name",
    [
        *("run", "bundle", "server_round", "uplink", "downlink"),
        *("trains", "aggregation", "training"),
    ],
)
def test_a_missing_field_is_named(name: str) -> None:
    assert refusal(without(REQUEST, name)) == f"the request's field {name} is missing"


FAULTS: list[tuple[str, Any]] = [
    ("server_round", True),
    ("server_round", 0),
    ("server_round", 4.0),
    ("server_round", "4"),
    ("server_round", 10**18),
    ("run", "0123456789ABCDEF" * 2),
    ("run", "0123456789abcdef" * 2 + "\n"),
    ("run", "٠" * 32),  # Arabic-Indic zeros are digits too
    ("bundle", "any"),
    ("uplink", "float16"),
    ("trains", "ab"),
    ("aggregation", "any"),
    ("training", []),
    ("training__num_steps", True),
    ("training__num_steps", "8"),
    ("training__num_steps", 0),
    ("training__noise_multiplier", -1.0),
    ("training__record_clip_norm", 0),
    ("training__secret", 1),
    ("metrics", "seconds"),
    ("metrics__0", "x"),
    ("metrics", ["seconds", "sec\u043ends"]),  # a Cyrillic o
    ("metrics", ["seconds", "seconds"]),
    ("num_rounds", 3),
    ("cohort", 4),
    ("secure_sum__threshold", 2),
    ("secure_sum__threshold", 6),
    ("secure_sum__bits", 33),
    ("secure_sum__cohort", 65),
    ("secure_sum__max_examples", 0),
    ("stage", "open"),
    ("stage", "mask"),
    ("attempt", 1),
    ("secure_sum__clip", 0),
    ("signature", "0" * 127),
    ("adapter__rank", 1025),
    ("adapter__modules", []),
    ("adapter__modules", ["model.layers.0.self_attn.q\u2024proj"]),  # a one dot leader
    ("adapter__base_model", "b" * 63 + "\u0431"),
    ("extra", 1),
]


@pytest.mark.parametrize(("path", "value"), FAULTS)
def test_a_field_out_of_its_bounds_is_named(path: str, value: Any) -> None:
    if path == "metrics__0":
        path, value = "metrics", {"0": "x"}
    sentence = refusal(changed(REQUEST, **{path: value}))
    assert path.replace("__", ".") in sentence
    assert sentence.isascii()


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
def test_numbers_that_are_not_finite_are_refused(constant: str) -> None:
    text = json.dumps(REQUEST).replace('"noise_multiplier": 4.0', f'"noise_multiplier": {constant}')
    assert constant in refusal(text.encode())


def test_numbers_of_many_digits_are_refused() -> None:
    for digits in ("9" * 5000, str(2**63), str(-(2**63))):
        text = json.dumps(REQUEST).replace('"num_steps": 8', f'"num_steps": {digits}')
        assert "expected at most 9223372036854775807" in refusal(text.encode())


def test_a_key_given_twice_is_refused() -> None:
    head = json.dumps(REQUEST)
    assert "'run' is given twice" in refusal(head[:-1].encode() + b', "run": "x"}')
    nested = head.replace('"num_steps": 8', '"num_steps": 8, "num_steps": 9')
    assert "'num_steps' is given twice" in refusal(nested.encode())
    escaped = head.replace('"num_steps": 8', '"num_steps": 8, "n\\u0075m_steps": 9')
    assert "'num_steps' is given twice" in refusal(escaped.encode())


def test_what_is_not_one_object_of_utf_8_is_refused() -> None:
    assert "not JSON" in refusal(b"")
    assert "not JSON" in refusal(json.dumps(REQUEST).encode() + b" {}")
    assert "not UTF-8" in refusal(b'{"run": "\xff"}')
    assert "expected one JSON object" in refusal(b"[]")
    assert "nested" in refusal(b"[" * 60_000)
    assert "nested" in refusal(changed(REQUEST, training__seed=[[[[1]]]]))


def test_a_request_of_64_kib_is_read_and_a_longer_one_is_not() -> None:
    head = json.dumps(REQUEST).encode()
    assert parse_request(head + b" " * (MAX_HEAD_BYTES - len(head))) == parsed(REQUEST)
    assert "expected at most 65536" in refusal(head + b" " * (MAX_HEAD_BYTES - len(head) + 1))


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=90, max_size=400), st.sampled_from([0, 1, 2]))
def test_an_error_quotes_no_more_than_80_printable_characters(text: str, where: int) -> None:
    if where == 0:
        sentence = refusal(changed(REQUEST, run=text))
    elif where == 1:
        sentence = refusal(REQUEST | {text: 1})
    else:
        sentence = refusal(REQUEST | {"training": {text: 1}})
    assert sentence.isascii()
    assert sentence.isprintable()
    longest = max((n for n in range(len(sentence)) if ascii(text)[:n] in sentence), default=0)
    assert longest <= 80


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(sorted(SiteRequest.model_fields)), JSON))
def test_any_json_is_a_request_or_refused(value: Any) -> None:
    with contextlib.suppress(RequestError):
        parse_request(json.dumps(value).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(head: bytes) -> None:
    with pytest.raises(RequestError):
        parse_request(head)


SHAPES = {"model.layers.0.self_attn.q_proj": (64, 32), "model.layers.0.mlp.up_proj": (128, 32)}


def facts(request: SiteRequest, **changes: Any) -> SiteRequest:
    read: dict[str, Any] = {
        "shapes": SHAPES,
        "rank": 4,
        "alpha": 8.0,
        "base_model": BASE,
        "content_digest": ADAPTER,
    }
    return with_facts(request, **(read | changes))


def test_the_facts_of_the_message_replace_what_the_run_claims() -> None:
    request = facts(parsed(changed(REQUEST, adapter__rank=1, secure_sum=None)))
    assert request.adapter is not None
    assert (request.adapter.rank, request.adapter.modules) == (4, tuple(SHAPES))
    assert request.adapter.num_bytes == message_bytes(SHAPES, 4, "bfloat16", "B", alpha=8.0)


def test_a_secure_sum_is_counted_in_ring_elements() -> None:
    request = facts(parsed(changed(REQUEST, secure_sum__bits=24)))
    assert request.adapter is not None
    # 24 bits of 5 sites take 27, so 4 bytes; one element more carries the weights.
    assert request.adapter.num_bytes == (4 * (64 + 128) + 1) * 4 + 32


def test_facts_that_no_adapter_can_have_are_refused() -> None:
    with pytest.raises(RequestError, match=r"adapter\.base_model is 'phi'"):
        facts(parsed(REQUEST), base_model="phi")
    with pytest.raises(RequestError, match=r"adapter\.rank is 2000"):
        facts(parsed(REQUEST), rank=2000)


def test_other_settings_have_another_digest_and_other_facts_have_not() -> None:
    request = parsed(REQUEST)
    assert facts(request).settings_digest == request.settings_digest
    others = [
        parsed(changed(REQUEST, training__seed=1)),
        parsed(changed(REQUEST, server_round=5)),
        parsed(changed(REQUEST, metrics=["seconds"])),
    ]
    assert len({each.settings_digest for each in (request, *others)}) == 4
