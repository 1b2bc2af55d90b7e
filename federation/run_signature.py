"""The description of a run that its owner signs, and a site's check of that signature.

A site that lists a signer lets every run of that signer in; without a signature its policy must
name the run itself. Signed is everything that stays the same from round to round and decides what
the run costs a site: who, on which base, how long, with which training, and what comes back (a
run whose cohort changes from round to round has to be named instead). Not signed are a round's
number, the factor it trains and the adapter: those the policy bounds by itself.

The signed bytes are a fixed first line (so that a signature for another purpose never fits) and
canonical JSON: sorted keys, no spaces, ASCII, numbers as Python writes them. Numbers are signed as
they were sent: 1 and 1.0 are different descriptions.

Keys and signatures are raw Ed25519 (RFC 8032) in hex: 64 and 128 digits.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

FIRST_LINE = b"fedge run description, version 1\n"


def run_description(
    *,
    run: str,
    bundle: str,
    base_model: str,
    aggregation: str,
    num_rounds: int,
    uplink: str,
    downlink: str,
    training: Mapping[str, Any],
    metrics: Sequence[str],
    secure_sum: Mapping[str, Any] | None,
) -> bytes:
    """Return the bytes that the owner of a run signs.

    Args:
        run: Random id of the run, in hex.
        bundle: sha256 of the app bundle, in hex.
        base_model: Digest of the base model, in hex.
        aggregation: As in the run's settings.
        num_rounds: Rounds that the run may ask.
        uplink: Number format of what leaves a site.
        downlink: Number format of what is sent to it.
        training: The training settings exactly as the sites get them.
        metrics: Names of what comes back beside the update, in the order asked.
        secure_sum: Terms of the secure sum, the cohort among them, or None.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    described = {
        "run": run,
        "bundle": bundle,
        "base_model": base_model,
        "aggregation": aggregation,
        "num_rounds": num_rounds,
        "uplink": uplink,
        "downlink": downlink,
        "training": dict(training),
        "metrics": list(metrics),
        "secure_sum": None if secure_sum is None else dict(secure_sum),
    }
    return FIRST_LINE + canonical_json(described)


def canonical_json(value: Any) -> bytes:
    """Return the one form in which a JSON value is signed and hashed.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def is_signed_by(public_key: str, signature: str, description: bytes) -> bool:
    """Tell whether the owner of a key signed a description.

    Args:
        public_key: 64 hex digits.
        signature: 128 hex digits.
        description: What ``run_description`` returns.

    Raises:
        ValueError: The key or the signature is not hex, or the key has another length.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    try:
        key.verify(bytes.fromhex(signature), description)
    except InvalidSignature:
        return False
    return True
