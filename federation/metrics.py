"""The numbers that may come back beside an update: which a run asks for, and what is made of them.

All of them are told by a site's records, and no noise covers them (how long a step of DP-SGD takes
grows with the records that it drew): a site whose policy wants differential privacy may let none
out. So a run names those that it wants, and whatever a
site says beside them is dropped unread. Where the sites do not say how many records they have,
every site weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from federation.header import WireError

if TYPE_CHECKING:
    from federation.sites import Reply

METRICS = ("num-examples", "train_loss", "seconds")
"""Names, as they travel: records of the site, mean loss in nats a token, duration of its training.
All that a site of this version measures, and what a run asks for that says nothing else."""
DATA_METRICS = METRICS
"""Counted or measured on the records, and not covered by the noise of DP-SGD: all there are."""
MAX_EXAMPLES = 1_000_000_000
"""A count beyond it is a mistake or an attack: it would own the average."""
MAX_REPORTED = 1e9
"""No mean loss and no seconds of training lie beyond it; a weighted sum of such stays finite."""
_FIELDS = {"num-examples": "num_examples", "train_loss": "train_loss", "seconds": "seconds"}
"""Field of a `Reply` by name of a metric."""


def metric_names(setting: str) -> tuple[str, ...]:
    """Return the names in a comma-separated setting, in their order; "" names none.

    Raises:
        ValueError: One is unknown, or stands there twice; in words for `SettingsError`.
    """
    names = tuple(name.strip() for name in setting.split(",")) if setting.strip() else ()
    for name in names:
        if name not in METRICS:
            raise ValueError(
                f"metrics names {name!r}: expected some of {', '.join(METRICS)}, with commas "
                'between them, or metrics="" for none'
            )
        if names.count(name) > 1:
            raise ValueError(f"metrics names {name} twice: expected each once")
    return names


def number_in(record: Mapping[str, object], name: str) -> float | None:
    """Return a number of a site's record as it is, or None where there is none to be read."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def count_in(record: Mapping[str, object], name: str) -> int | None:
    """Return a count of a site's record, or None where there is none to be read."""
    value = number_in(record, name)
    return int(value) if value is not None and math.isfinite(value) else None


def check_metrics(reply: Reply, asked: Sequence[str]) -> None:
    """Compare the numbers beside an update with what was asked for; the others are not looked at.

    Raises:
        WireError: One is missing or out of its range.
    """
    for name in asked:
        value = getattr(reply, _FIELDS[name])
        if value is None:
            raise WireError(f"the reply brings no number {name}, which this run asks for")
        if name == "num-examples" and not 1 <= value <= MAX_EXAMPLES:
            raise WireError(f"num_examples is {value}: expected 1 to {MAX_EXAMPLES}")
        # The comparison is False for NaN.
        if name != "num-examples" and not abs(value) <= MAX_REPORTED:
            raise WireError(f"{name} is not a number up to {MAX_REPORTED:g}")


def without_unasked(reply: Reply, asked: Sequence[str]) -> Reply:
    """Return a reply without the numbers that nobody asked for."""
    return replace(
        reply,
        num_examples=reply.num_examples if "num-examples" in asked else None,
        train_loss=reply.train_loss if "train_loss" in asked else None,
        seconds=reply.seconds if "seconds" in asked else None,
    )


def weight_of(reply: Reply) -> int:
    """Return what a site weighs in the average: its examples, or 1 where they were not asked."""
    return 1 if reply.num_examples is None else reply.num_examples


def mean_of(values: Sequence[float | None], weights: Sequence[int | None]) -> float | None:
    """Return a weighted mean over the sites, or None where a site does not say its value.

    Args:
        values: One a site.
        weights: Its examples, in the same order; None weighs 1.
    """
    pairs = [(value, 1 if w is None else w) for value, w in zip(values, weights, strict=True)]
    told = [(value, weight) for value, weight in pairs if value is not None]
    if len(told) < len(pairs) or not told:
        return None
    return sum(weight * value for value, weight in told) / sum(weight for _, weight in told)
