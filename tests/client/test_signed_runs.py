import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.client.policy_example import (
    BASE,
    OTHER,
    OTHER_RUN,
    REQUEST,
    changed,
    policy,
    refused_by,
)


def signed(request: dict[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """Sign the description as a coordinator in any language would: from its definition."""
    described = {
        key_: request[key_]
        for key_ in ("run", "bundle", "aggregation", "num_rounds", "uplink", "downlink")
    } | {
        "base_model": BASE,
        "training": request["training"],
        "metrics": request["metrics"],
        "secure_sum": request["secure_sum"],
    }
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    message = b"fedge run description, version 1\n" + text.encode()
    return request | {"signature": key.sign(message).hex()}


SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNED_ONLY = policy(
    runs__allowed=[],
    runs__bundles=[],
    runs__signers=["e" * 64, SIGNER.public_key().public_bytes_raw().hex()],
)


def test_a_signed_run_is_let_in_with_its_bundle() -> None:
    request = changed(REQUEST, num_rounds=4)
    assert refused_by(request, SIGNED_ONLY) == "runs.allowed"
    assert refused_by(signed(request, SIGNER), SIGNED_ONLY) == ""
    assert refused_by(signed(request, Ed25519PrivateKey.generate()), SIGNED_ONLY) == "runs.allowed"


@pytest.mark.parametrize(
    "change",
    [
        {"run": OTHER_RUN},
        {"bundle": OTHER},
        {"num_rounds": 5},
        {"num_rounds": 0},
        {"downlink": "int8"},
        {"training__seed": 1},
        {"training__num_steps": 7},
        {"metrics": ["seconds"]},
        {"metrics": ["train_loss", "seconds"]},
        {"secure_sum__cohort": 6},
        {"adapter__base_model": OTHER},
        {"aggregation": "products"},
        {"uplink": "float32"},
    ],
    ids=str,
)
def test_a_signature_covers_each_part_of_the_description(change: dict[str, Any]) -> None:
    request = signed(changed(REQUEST, num_rounds=4), SIGNER)
    rules = SIGNED_ONLY.model_copy(update={"models": policy(models__base=["any"]).models})
    assert refused_by(request, rules) == ""
    assert refused_by(changed(request, **change), rules) == "runs.allowed"


def test_a_signed_run_still_has_to_keep_within_the_policy() -> None:
    request = signed(changed(REQUEST, num_rounds=9, training__num_steps=9), SIGNER)
    assert refused_by(request, SIGNED_ONLY) == "training.max_steps"
