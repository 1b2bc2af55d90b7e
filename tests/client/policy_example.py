"""One request that one policy just allows, for tests that change one thing of either."""

import copy
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from client.ledger import Spent
from client.policy import Policy
from client.policy_template import policy_template
from client.request import RequestError, parse_request
from client.verdict import judge
from federation.accountant import PrivacyEvent

BASE, BUNDLE, ADAPTER, OTHER = "b" * 64, "c" * 64, "a" * 64, "d" * 64
RUN, OTHER_RUN = "0123456789abcdef" * 2, "f" * 32
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
"""A Tuesday."""
NUM_RECORDS = 1000

REQUEST: dict[str, Any] = {
    "run": RUN,
    "bundle": BUNDLE,
    "server_round": 4,
    "uplink": "bfloat16",
    "downlink": "float32",
    "trains": "B",
    "aggregation": "alternating",
    "training": {
        "num_steps": 8,
        "batch_size": 16,
        "accumulation": 2,
        "max_tokens": 256,
        "noise_multiplier": 4.0,
        "record_clip_norm": 0.5,
    },
    "metrics": ["seconds", "train_loss"],
    "secure_sum": {"cohort": 5, "threshold": 4, "clip": 1.5, "bits": 24, "max_examples": 1},
    "adapter": {
        "base_model": BASE,
        "content_digest": ADAPTER,
        "rank": 16,
        "alpha": 32.0,
        "modules": ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj"],
        "num_bytes": 1000,
    },
}

POLICY: dict[str, Any] = {
    "models": {"base": [BASE]},
    "runs": {"allowed": [RUN], "bundles": [BUNDLE]},
    "adapter": {
        "modules": ["model.layers.*.self_attn.?_proj", "model.layers.*.mlp.*"],
        "max_rank": 16,
        "max_alpha": 32.0,
    },
    "training": {
        "max_steps": 8,
        "max_batch": 32,
        "max_tokens": 256,
        "max_learning_rate": 5e-4,
        "max_rounds": 4,
    },
    "traffic": {"uplink": ["bfloat16"], "max_round_bytes": 1000, "max_run_bytes": 3000},
    "aggregation": {
        "kinds": ["alternating"],
        "min_cohort": 4,
        "cohort": ["1" * 64, "2" * 64, "3" * 64],
    },
    "privacy": {"noise_floor": 4.0, "max_record_clip_norm": 0.5, "epsilon": 8.0, "delta": 1e-6},
    "metrics": {"allowed": ["seconds", "train_loss"], "max_count": 2},
    "quiet_hours": {
        "time_zone": "UTC",
        "windows": [{"days": ["tue"], "from": "12:01", "to": "12:00"}],
    },
}

SPENT = Spent(
    events=(PrivacyEvent(4.0, 0.032, 8),),
    num_records=NUM_RECORDS,
    answered={1: OTHER, 3: OTHER},
    settings={1: OTHER, 3: OTHER},
    num_bytes=2000,
)


def changed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a copy with other values; a path is written with two underscores: training__seed."""
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        *tables, name = path.split("__")
        table = tree
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    return tree


def opened_template(epsilon: float) -> str:
    """Return the template's policy.toml as an officer opens it to runs of three sites.

    Any base model and any run; two sites may make an average, each of whose updates the server sees
    by itself; the data may spend ``epsilon``.
    """
    text = policy_template()
    for before, after in (
        ("base = []", 'base = ["any"]'),
        ("allowed = []\n# Ed25519", 'allowed = ["any"]\n# Ed25519'),
        ("secure_sum_required = true", "secure_sum_required = false"),
        ("min_cohort = 3", "min_cohort = 2"),
        ("epsilon = 8.0", f"epsilon = {epsilon}"),
    ):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def without(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


def policy(**changes: Any) -> Policy:
    return Policy.model_validate(changed(POLICY, **changes))


def epsilon_without_sampling(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Return the epsilon of Gaussian mechanisms on all records: an upper bound in closed form.

    Zero-concentrated DP: Bun and Steinke, arXiv:1605.02065, propositions 1.3 and 1.6.
    """
    rho = sum(event.steps / (2 * event.noise_multiplier**2) for event in events)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def refused_by(
    request: dict[str, Any] | bytes,
    rules: Policy | None = None,
    spent: Spent = SPENT,
    now: datetime = NOW,
) -> str:
    """Return the rule that refuses a request, "request" if it is none, "" if it is allowed."""
    head = request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        asked = parse_request(head)
    except RequestError:
        return "request"
    verdict = judge(asked, rules or policy(), spent, now, epsilon_without_sampling)
    assert verdict.is_allowed == (verdict.rule == "allowed")
    return "" if verdict.is_allowed else verdict.rule
