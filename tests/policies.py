"""The policies of the tests' sites: one to begin with, of which each test names what it changes.

It denies by default, as a policy does: it bounds the size of the tests' runs, and lets none in
until a test names its number format and its aggregation, and does without the secure sum or
without noise where the run does.

    policy_text(traffic__uplink=["int8"], aggregation__kinds=["products"], **UNPROTECTED)

A policy at which every rule is met exactly is in `tests.client.policy_example`.
"""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from client.policy import Policy
from tests.client.policy_example import changed

SMALL_RUNS: dict[str, Any] = {
    "models": {"base": ["any"]},
    "runs": {"allowed": ["any"], "bundles": ["any"]},
    "adapter": {"modules": ["*"], "max_rank": 8, "max_alpha": 64.0},
    "training": {
        "max_steps": 8,
        "max_batch": 8,
        "max_tokens": 64,
        "max_learning_rate": 0.01,
        "max_rounds": 9,
    },
    "traffic": {"max_round_bytes": 10_000_000, "max_run_bytes": 100_000_000},
}
"""Any model and any run of the tests' size; what a site can require is required."""
UNPROTECTED: dict[str, Any] = {
    "aggregation__secure_sum_required": False,
    "privacy__required": False,
    "metrics__allowed": ["num-examples", "train_loss", "seconds"],
    "metrics__digits": 15,
}
"""What a run of neither a secure sum nor noise asks for, its numbers as they are."""


def policy_tree(**changes: Any) -> dict[str, Any]:
    """Return `SMALL_RUNS` with other values: policy_tree(privacy__epsilon=8.0)."""
    return changed(SMALL_RUNS, **changes)


def policy_of(**changes: Any) -> Policy:
    """Return the policy of `policy_tree`."""
    return Policy.model_validate(policy_tree(**changes))


def policy_text(**changes: Any) -> str:
    """Return the policy.toml of `policy_tree`."""
    return toml_text(policy_tree(**changes))


def toml_text(tree: Mapping[str, Any]) -> str:
    """Return TOML of scalars, lists of scalars, and tables of both: policy.toml or site.toml."""
    tables = {name: value for name, value in tree.items() if isinstance(value, Mapping)}
    lines = [_line(name, value) for name, value in tree.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(_line(key, value) for key, value in table.items())]
    text = "\n".join(lines) + "\n"
    assert tomllib.loads(text) == tree, "JSON writes numbers, truths and text as TOML does"
    return text


def _line(name: str, value: Any) -> str:
    return f"{name} = {json.dumps(value)}"
