"""What a run will cost, from its settings and the model's config.json: no weights are read.

Bytes are exact (`federation.traffic`), memory and seconds are modelled (`federation.server_costs`).
A plan does not know how long the sites train, how fast the network is, or which sites chose a
smaller rank than the one that is served. What a site spends of its privacy follows from its number
of records and its delta, which somebody has to say (`privacy_cost`); the site's own policy judges
it, with what the site spent before.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from federation.adapter import TARGETS
from federation.base_model import projection_shapes
from federation.header import holds_changes
from federation.metrics import DATA_METRICS
from federation.server_costs import (
    Machine,
    aggregation_seconds,
    peak_memory,
    server_disk,
    server_memory,
)
from federation.settings import (
    Dtype,
    FederationSettings,
    SecureSumSettings,
    SettingsError,
    needed_updates,
)
from federation.traffic import (
    Shapes,
    Traffic,
    down_traffic,
    largest_rank,
    num_asked,
    planned_message,
    up_traffic,
)


@dataclass(frozen=True)
class Trait:
    """What an aggregation can do, whatever the model."""

    is_exact: bool
    """The result is the weighted mean of the sites' B @ A, up to the cut of the rank."""
    is_sum: bool
    """The server only adds up what the sites send: a secure sum could hide the single update."""
    mixed_ranks: Literal["exact", "slices"]
    """Sites of different ranks: averaged as they are, or each slice over those that have it."""
    bears: Literal["none", "num_byzantine", "under half"]
    """Sites that may send anything without owning the result."""


TRAITS = {
    "products": Trait(True, False, "exact", "none"),
    "factors": Trait(False, True, "slices", "none"),
    "alternating": Trait(True, True, "slices", "none"),
    "median": Trait(False, False, "slices", "under half"),
    "trimmed_mean": Trait(False, False, "slices", "num_byzantine"),
    "krum": Trait(False, False, "exact", "num_byzantine"),
    "multi_krum": Trait(False, False, "exact", "num_byzantine"),
    "geometric_median": Trait(False, False, "exact", "under half"),
}


@dataclass(frozen=True)
class AggregationCost:
    """This model and these settings under one aggregation."""

    aggregation: str
    up_bytes: int
    """One site, one round: the mean over the run."""
    run_bytes: int
    """Down and up, all sites, all rounds."""
    aggregation_s: float
    memory_bytes: int
    is_exact: bool
    is_sum: bool
    mixed_ranks: str
    num_liars: int
    """Sites of a round that may send anything without owning the result."""


@dataclass(frozen=True)
class WireCost:
    """This model and these settings with one number format in both directions."""

    dtype: str
    down_bytes: int
    """One site that holds the last adapter, one round."""
    up_bytes: int
    """One site, one round: the mean over the run."""
    run_bytes: int
    """Down and up, all sites, all rounds."""
    ratio: float
    """``run_bytes`` to those of float32."""


@dataclass(frozen=True)
class PrivacyCost:
    """What the whole run costs a site that has spent nothing before and trains in every round."""

    num_records: int
    delta: float
    sampling_rate: float
    """Chance with which a step takes a record."""
    steps: int
    """Of all rounds."""
    noise_multiplier: float
    epsilon: float | None
    """With that noise; None = no bound."""
    target_epsilon: float | None
    """What was asked for, if anything."""
    noise_for_target: float | None
    """Least noise multiplier that keeps the run within it."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost."""

    num_rounds: int
    num_sites: int
    num_asked: int
    """Sites that a round asks."""
    aggregation: str
    downlink: str
    uplink: str
    rank: int
    """Of the served adapter; with an energy target the largest that it may ask for."""
    num_modules: int
    num_parameters: int
    """Of the adapter."""
    full_message_bytes: int
    """The whole adapter in float32: what a newcomer gets when the downlink carries changes."""
    down: Traffic
    up: Traffic
    disk_bytes: dict[str, int]
    memory_bytes: dict[str, int]
    """Above the torch import, while it does what; the peak is the larger."""
    aggregation_s: float
    """One round, one core."""
    privacy: str
    privacy_cost: PrivacyCost | None
    """For a site whose number of records was said."""
    notes: list[str]
    """What a figure leaves out."""
    aggregations: list[AggregationCost]
    wires: list[WireCost]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def make_plan(
    settings: FederationSettings,
    config: Mapping[str, Any],
    machine: Machine | None = None,
    cost: PrivacyCost | None = None,
) -> Plan:
    """Return what a run with these settings costs on a model with this config.

    Args:
        settings: Checked; nothing is read from the paths in it.
        config: What the model's config.json holds.
        machine: How fast the server is; left out, the one that the constants were measured on.
        cost: From `privacy_cost`.

    Raises:
        ModelError: The config is of another family, or a key is missing.
        SettingsError: ``training.noise_multiplier`` is no number.
    """
    targets = TARGETS[settings.adapter.targets]
    shapes = {
        name: shape
        for name, shape in projection_shapes(config).items()
        if name.rsplit(".", 1)[-1] in targets
    }
    rank = largest_rank(settings)
    return Plan(
        num_rounds=settings.num_rounds,
        num_sites=settings.num_sites,
        num_asked=num_asked(settings),
        aggregation=settings.aggregation,
        downlink=settings.wire.downlink,
        uplink=settings.wire.uplink,
        rank=rank,
        num_modules=len(shapes),
        num_parameters=rank * sum(o + i for o, i in shapes.values()),
        full_message_bytes=planned_message(settings, shapes, "float32"),
        down=down_traffic(settings, shapes),
        up=up_traffic(settings, shapes),
        disk_bytes=server_disk(settings, shapes),
        memory_bytes=server_memory(settings, shapes),
        aggregation_s=aggregation_seconds(settings, shapes, machine),
        privacy=privacy(settings),
        privacy_cost=cost,
        notes=notes(settings),
        aggregations=[
            _aggregation_cost(_with_kind(settings, kind, trait), shapes, trait, machine)
            for kind, trait in TRAITS.items()
        ],
        wires=_wire_costs(settings, shapes),
    )


def notes(settings: FederationSettings) -> list[str]:
    """Return, a sentence each, what a figure leaves out."""
    found = []
    asked, adapter = num_asked(settings), settings.adapter
    if adapter.energy > 0:
        found.append(
            f"adapter.energy may let the rank grow from {adapter.rank} up to {adapter.max_rank}: "
            f"every figure is for rank {largest_rank(settings)}"
        )
    if holds_changes(settings.wire.downlink) and asked < settings.num_sites:
        found.append(
            f"a round asks {asked} of {settings.num_sites} sites, drawn anew: those that were not "
            f"in the round before get the whole adapter, so the bytes down are an average"
        )
    if settings.secure_sum.enabled:
        found.append(
            "up go masked vectors of a secure sum; its keys and shares, under 1 MB a site and "
            "round, are left out, and the server holds the sum beside the memory shown: 4 bytes a "
            "number that is trained (8 where secure_sum.bits and the sites need more than 32). The "
            "table of formats is for plain updates"
        )
    data_metrics = [name for name in settings.asked_metrics if name in DATA_METRICS]
    if is_private(settings) and data_metrics:
        found.append(
            f"no noise covers {' and '.join(data_metrics)}, and a site whose policy does not list "
            'one refuses the run: set metrics=""'
        )
    if is_private(settings) and settings.aggregation != "alternating":
        found.append(
            "both factors of the adapter learn at once, so that their noise multiplies, and a site "
            "may refuse it: set aggregation=alternating"
        )
    return found


def privacy(settings: FederationSettings) -> str:
    """Return what protects the sites' text in such a run, and what the coordinator sees of it.

    Raises:
        SettingsError: ``training.noise_multiplier`` is no number.
    """
    asked = settings.asked_metrics
    beside = f" and, beside it, {', '.join(asked)}" if asked else " and no number beside it"
    seen = f"The coordinator sees each site's update{beside}"
    if settings.secure_sum.enabled:
        seen = (
            f"The coordinator sees the sum of at least {settings.secure_terms['threshold']} "
            f"sites' updates, no update by itself{beside.replace('beside it', 'of each site')}"
        )
    if not is_private(settings):
        return (
            f"No differential privacy: training.noise_multiplier is 0. {seen}; what it sees can "
            "reveal something of the sites' text."
        )
    noise = settings.training["noise_multiplier"]
    return (
        f"Differential privacy for each record: DP-SGD with noise multiplier {noise}. How much "
        "epsilon a site spends follows from its number of records and its delta; its own policy "
        f"refuses the round that would overspend. {seen}."
    )


def privacy_cost(
    settings: FederationSettings,
    num_records: int,
    delta: float,
    target_epsilon: float | None = None,
) -> PrivacyCost:
    """Return what a run costs a site of so many records, and the noise that a target needs.

    Imports Opacus, and with it torch.

    Args:
        settings: With ``training.num_steps`` and ``training.batch_size``.
        num_records: Of the site.
        delta: Of the site's policy, below 1 over ``num_records``.
        target_epsilon: What the run may cost, or None.

    Raises:
        SettingsError: A number is missing or out of its range.
        BudgetError: No noise is enough for the target.
    """
    from federation.accountant import PrivacyEvent, epsilon_of, noise_for

    if num_records < 1 or not 0 < delta < 1 / num_records:
        raise SettingsError(
            f"--records is {num_records} and --delta {delta:g}: expected at least one record, and "
            "a delta above 0 and below 1 over their number, such as 1e-6"
        )
    if target_epsilon is not None and not 0 < target_epsilon < math.inf:
        raise SettingsError(f"--epsilon is {target_epsilon}: expected a number above 0")
    batch = _training_number(settings, "batch_size") * _training_number(settings, "accumulation", 1)
    if batch > num_records:
        raise SettingsError(
            f"a step takes {batch} records and the site has {num_records}: expected at most as many"
        )
    rate = batch / num_records
    steps = settings.num_rounds * _training_number(settings, "num_steps")
    noise = float(settings.training["noise_multiplier"]) if is_private(settings) else 0.0
    epsilon = epsilon_of([PrivacyEvent(noise, rate, steps)], delta)
    return PrivacyCost(
        num_records,
        delta,
        rate,
        steps,
        noise,
        None if math.isinf(epsilon) else epsilon,
        target_epsilon,
        None if target_epsilon is None else noise_for(target_epsilon, delta, rate, steps),
    )


def _training_number(settings: FederationSettings, name: str, default: int | None = None) -> int:
    value = settings.training.get(name, default)
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise SettingsError(
            f"training.{name} is {value!r}: what privacy costs needs a whole number from 1 on, "
            f"--set training.{name}=8"
        )
    return number


def is_private(settings: FederationSettings) -> bool:
    """Return whether the sites are to train with noise.

    Raises:
        SettingsError: ``training.noise_multiplier`` is no number.
    """
    value = settings.training.get("noise_multiplier", 0)
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        raise SettingsError(
            f"training.noise_multiplier is {value!r}: expected a number, such as 1.0"
        ) from None


def _num_liars(settings: FederationSettings, trait: Trait) -> int:
    asked, liars = num_asked(settings), settings.robust.num_byzantine
    if trait.bears == "under half":
        return (asked - 1) // 2
    can_bear = asked >= needed_updates(settings.aggregation, liars)
    return liars if trait.bears == "num_byzantine" and can_bear else 0


def _with_kind(settings: FederationSettings, kind: str, trait: Trait) -> FederationSettings:
    """Return settings with another aggregation; without a secure sum where there is no sum."""
    secure_sum = settings.secure_sum if trait.is_sum else SecureSumSettings()
    return settings.model_copy(update={"aggregation": kind, "secure_sum": secure_sum})


def _aggregation_cost(
    settings: FederationSettings, shapes: Shapes, trait: Trait, machine: Machine | None
) -> AggregationCost:
    return AggregationCost(
        aggregation=settings.aggregation,
        up_bytes=_up_bytes(settings, shapes),
        run_bytes=_run_bytes(settings, shapes),
        aggregation_s=aggregation_seconds(settings, shapes, machine),
        memory_bytes=peak_memory(settings, shapes),
        is_exact=trait.is_exact,
        is_sum=trait.is_sum,
        mixed_ranks=trait.mixed_ranks,
        num_liars=_num_liars(settings, trait),
    )


def _wire_costs(settings: FederationSettings, shapes: Shapes) -> list[WireCost]:
    rows: list[WireCost] = []
    for dtype in get_args(Dtype):
        wire = settings.wire.model_copy(update={"downlink": dtype, "uplink": dtype})
        each = settings.model_copy(update={"wire": wire, "secure_sum": SecureSumSettings()})
        run_bytes = _run_bytes(each, shapes)
        rows.append(
            WireCost(
                dtype=dtype,
                down_bytes=down_traffic(each, shapes).site.even,
                up_bytes=_up_bytes(each, shapes),
                run_bytes=run_bytes,
                ratio=run_bytes / (rows[0].run_bytes if rows else run_bytes),
            )
        )
    return rows


def _run_bytes(settings: FederationSettings, shapes: Shapes) -> int:
    return down_traffic(settings, shapes).run + up_traffic(settings, shapes).run


def _up_bytes(settings: FederationSettings, shapes: Shapes) -> int:
    """Return the mean over the run of what one site sends in a round."""
    up = up_traffic(settings, shapes)
    return round(up.run / (num_asked(settings) * settings.num_rounds))
