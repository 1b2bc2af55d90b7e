import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client.request import parse_request
from client.verdict import judge
from federation.run_signature import RunDescription
from tests.client.policy_example import (
    BASE,
    NOW,
    OTHER,
    OTHER_RUN,
    REQUEST,
    SPENT,
    changed,
    epsilon_without_sampling,
    policy,
    refused_by,
)

DESCRIBED: dict[str, Any] = {
    **{name: REQUEST[name] for name in ("run", "bundle", "aggregation", "uplink", "downlink")},
    **{name: REQUEST[name] for name in ("training", "metrics", "secure_sum")},
    "base_model": BASE,
    "num_rounds": 4,
    "factors": "one",
    "rank": 16,
    "min_rank": 16,
    "max_rank": 16,
    "alpha": 32.0,
    "modules": ["model.layers.*.mlp.up_proj", "model.layers.*.self_attn.q_proj"],
    "num_modules": 2,
    "cohort": 5,
    "not_after": "2026-11-24T12:00:00Z",
}
"""What `REQUEST` has to be signed as, written by hand."""
ASKED = changed(REQUEST, num_rounds=4)
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNED_ONLY = policy(
    runs__allowed=[],
    runs__bundles=[],
    runs__signers=["e" * 64, SIGNER.public_key().public_bytes_raw().hex()],
)


def signed(
    request: dict[str, Any], key: Ed25519PrivateKey, described: dict[str, Any] | str = DESCRIBED
) -> dict[str, Any]:
    """Sign a description as a coordinator in any language would: from its definition."""
    text = described
    if isinstance(described, dict):
        text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    assert isinstance(text, str)
    message = b"fedge run description, version 3\n" + text.encode()
    return request | {"description": text, "signature": key.sign(message).hex()}


def reason(request: dict[str, Any], now: datetime = NOW) -> str:
    asked = parse_request(json.dumps(request).encode())
    return judge(asked, SIGNED_ONLY, SPENT, now, epsilon_without_sampling).reason


def test_a_signed_run_is_let_in_with_its_bundle() -> None:
    assert refused_by(ASKED, SIGNED_ONLY) == "runs.allowed"
    assert "and has no signature" in reason(ASKED)
    assert refused_by(signed(ASKED, SIGNER), SIGNED_ONLY) == ""


def test_a_stranger_s_signature_lets_nobody_in() -> None:
    request = signed(ASKED, Ed25519PrivateKey.generate())
    assert refused_by(request, SIGNED_ONLY) == "runs.allowed"
    assert "that no listed signer gave to this description" in reason(request)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"run": OTHER_RUN}, f'run is "{OTHER_RUN}", signed is "0123456789abcdef0123456789abcdef"'),
    ({"bundle": OTHER}, "bundle is dddddddddddddddd…, signed is cccccccccccccccc…"),
    ({"num_rounds": 5}, "num_rounds is 5, signed is 4"),
    ({"downlink": "int8"}, 'downlink is "int8", signed is "float32"'),
    ({"uplink": "float32"}, 'uplink is "float32", signed is "bfloat16"'),
    ({"aggregation": "products"}, 'aggregation is "products", signed is "alternating"'),
    ({"trains": "AB"}, 'factors is "both", signed is "one"'),
    ({"training__seed": 1}, "training.seed is 1, signed is none"),
    ({"training__num_steps": 7}, "training.num_steps is 7, signed is 8"),
    ({"training__noise_multiplier": 4}, "training.noise_multiplier is 4, signed is 4.0"),
    ({"metrics": ["seconds"]}, 'metrics is ["seconds"], signed is ["seconds", "train_loss"]'),
    ({"metrics": ["train_loss", "seconds"]}, "metrics is"),
    ({"secure_sum__cohort": 6}, "cohort is 6, signed is 5"),
    ({"secure_sum__threshold": 5}, "secure_sum.threshold is 5, signed is 4"),
    ({"secure_sum__clip": 2.5}, "secure_sum.clip is 2.5, signed is 1.5"),
    ({"secure_sum": None, "cohort": 5}, "secure_sum.bits is none, signed is 24"),
    ({"secure_sum": None, "cohort": 4}, "cohort is 4, signed is 5"),
    ({"adapter__base_model": OTHER}, "base_model is dddddddddddddddd…"),
    ({"adapter__rank": 17}, "rank is 17, signed is 16"),
    ({"adapter__rank": 1}, "rank is 1, signed is 16"),
    ({"adapter__rank": 4, "adapter__served_rank": 8}, "rank is 8, signed is 16"),
    ({"adapter__alpha": 16.0}, "alpha is 16 at rank 16, signed is 32 at rank 16"),
    ({"adapter__modules": ["model.layers.0.mlp.up_proj"]}, 'modules is ["model.layers.*.mlp'),
    (
        {"adapter__modules": [f"model.layers.{n}.mlp.up_proj" for n in range(2)]},
        'modules is ["model.layers.*.mlp.up_proj"], signed is ["model.layers.*.mlp.up_proj", ',
    ),
    (
        {"adapter__modules": [*REQUEST["adapter"]["modules"], "model.layers.1.mlp.up_proj"]},
        "num_modules is 3, signed is 2",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), OTHERS, ids=[str(change) for change, _ in OTHERS])
def test_a_signature_covers_each_part_of_the_description(
    change: dict[str, Any], sentence: str
) -> None:
    rules = SIGNED_ONLY.model_copy(update={"models": policy(models__base=["any"]).models})
    request = changed(signed(ASKED, SIGNER), **change)
    assert refused_by(request, rules) == "runs.allowed"
    judged = judge(
        parse_request(json.dumps(request).encode()), rules, SPENT, NOW, epsilon_without_sampling
    )
    assert "and has a signature of another description: " in judged.reason
    assert sentence in judged.reason


def test_every_field_of_a_description_is_held_to_what_is_asked() -> None:
    """A field that is signed and compared with nothing would promise what nobody checks."""
    other: dict[str, Any] = {
        "num_rounds": 5,
        "rank": 15,
        "min_rank": 17,
        "max_rank": 15,
        "alpha": 1.0,
        "num_modules": 9,
        "modules": ["model.*"],
        "metrics": [],
        "cohort": 9,
        "secure_sum": None,
        "training": {},
        "aggregation": "products",
        "factors": "both",
        "uplink": "int4",
        "downlink": "int4",
        "run": OTHER_RUN,
        "bundle": OTHER,
        "base_model": OTHER,
        "not_after": "2026-11-24T11:59:59Z",
    }
    assert other.keys() == DESCRIBED.keys()
    for name, value in other.items():
        request = signed(ASKED, SIGNER, DESCRIBED | {name: value})
        assert refused_by(request, SIGNED_ONLY) == "runs.allowed", name


def test_a_run_has_to_say_its_number_of_rounds_and_a_lower_rank_of_a_site_is_no_other_run() -> None:
    request = signed(ASKED, SIGNER)
    assert "but does not say num_rounds" in reason(changed(request, num_rounds=0))
    fewer = changed(request, adapter__rank=4, adapter__served_rank=16)
    assert refused_by(fewer, SIGNED_ONLY) == ""


@pytest.mark.parametrize(
    ("rank", "alpha", "sentence"),
    [
        (4, 8.0, ""),
        (12, 24.000000000000004, ""),
        (16, 32.0, ""),
        (3, 6.0, "rank is 3, signed is 4 to 16"),
        (8, 32.0, "alpha is 32 at rank 8, signed is 24 at rank 12"),
        (4, 32.0, "alpha is 32 at rank 4, signed is 24 at rank 12"),
    ],
)
def test_a_rank_that_was_signed_to_change_changes_at_the_signed_scale(
    rank: int, alpha: float, sentence: str
) -> None:
    """The update is alpha / rank * B @ A: at the same alpha a lower rank is a larger step."""
    described = DESCRIBED | {"rank": 12, "alpha": 24.0, "min_rank": 4, "max_rank": 16}
    asked = changed(ASKED, adapter__rank=rank, adapter__alpha=alpha)
    request = signed(asked, SIGNER, described)
    assert refused_by(request, SIGNED_ONLY) == ("runs.allowed" if sentence else "")
    assert not sentence or reason(request).endswith(sentence)


def test_a_signature_ends() -> None:
    request = signed(ASKED, SIGNER)
    late = datetime(2026, 11, 24, 12, 0, 1, tzinfo=UTC)
    assert reason(request, late).endswith("and has a signature that ended at 2026-11-24T12:00:00Z")
    assert refused_by(request, SIGNED_ONLY, now=late - timedelta(seconds=1)) == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 20_000,
        json.dumps(DESCRIBED, sort_keys=True),
        json.dumps(DESCRIBED | {"more": 1}, sort_keys=True, separators=(",", ":")),
        json.dumps(DESCRIBED | {"not_after": "2026-99-24T12:00:00Z"}, sort_keys=True).replace(
            ": ", ":"
        ),
        '{"run":"0","run":"1"}',
    ],
    ids=["nothing", "empty", "deep", "spaces", "unknown field", "no date", "a key twice"],
)
def test_what_is_no_description_lets_nobody_in_whoever_signed_it(text: str) -> None:
    request = signed(ASKED, SIGNER, text)
    assert refused_by(request, SIGNED_ONLY) == "runs.allowed"
    assert "no description of a run that this version can read" in reason(request)


def test_a_null_that_was_signed_is_no_setting_that_was_left_out() -> None:
    for table, name in (("training", "seed"), ("secure_sum", "more")):
        described = changed(DESCRIBED, **{f"{table}__{name}": None})
        assert "no description of a run that this version can read" in reason(
            signed(ASKED, SIGNER, described)
        )
    # Nor is a table without a key the same as no table.
    described = DESCRIBED | {"secure_sum": {}}
    rules = SIGNED_ONLY.model_copy(update={"aggregation": policy().aggregation})
    asked = changed(ASKED, secure_sum=None, cohort=5)
    assert refused_by(signed(asked, SIGNER, described), rules) == "runs.allowed"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, [1.0], {"a": 1}])
def test_what_json_cannot_say_or_a_run_cannot_mean_is_not_signed(value: object) -> None:
    for table in ("training", "secure_sum"):
        with pytest.raises(ValidationError, match=rf"{table}\.clip is "):
            RunDescription.model_validate(DESCRIBED | {table: {"clip": value}})


def test_a_site_that_cannot_know_the_bundle_asks_its_policy_for_any() -> None:
    request = changed(signed(ASKED, SIGNER), bundle="")
    assert refused_by(request, SIGNED_ONLY) == "runs.bundles"
    rules = policy(runs__allowed=[], runs__bundles=["any"], runs__signers=SIGNED_ONLY.runs.signers)
    assert refused_by(request, rules) == ""


def test_a_signed_run_still_has_to_keep_within_the_policy() -> None:
    described = changed(DESCRIBED, num_rounds=9, training__num_steps=9)
    request = signed(changed(ASKED, num_rounds=9, training__num_steps=9), SIGNER, described)
    assert refused_by(request, SIGNED_ONLY) == "training.max_steps"
