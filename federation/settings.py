"""Settings of a run: frozen, checked, the same keys in TOML and in Flower's run config.

Flower's run config holds scalars only and flattens tables to dotted keys (`training.batch_size`);
`load_settings` takes either form. An unknown key is an error: a misspelt privacy bound that is
silently ignored is worse than a run that does not start.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from federation.errors import UserError
from federation.metrics import METRICS, metric_names


class SettingsError(UserError):
    """A setting is unknown, missing or out of range."""


class Settings(BaseModel):
    """Base of every settings table."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SettingsKind = TypeVar("SettingsKind", bound=Settings)


Dtype = Literal["float32", "bfloat16", "int8", "int4"]
"""Number formats on the wire; int8 and int4 are changes against what both sides hold."""


class AdapterSettings(Settings):
    """The low-rank adapter that travels between the sites."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the served adapter; with an ``energy`` its rank in the first round."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """LoRA scale numerator: the update is alpha / rank * B @ A. The wire format has this bound."""
    targets: Literal["all-linear", "attention"] = "all-linear"
    """Which projections get factors: all seven of a block, or q, k, v and o only."""
    energy: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the mean update's squared norm that the served adapter keeps in every module: its
    rank follows, up to ``max_rank``. 0 = the rank is fixed. With ``aggregation = "products"``."""
    max_rank: Annotated[int, Field(ge=1, le=1024)] = 64
    """Largest rank that ``energy`` may ask for."""


class WireSettings(Settings):
    """How many bytes travel."""

    downlink: Dtype = "float32"
    """Server to site. int8 and int4 send the change since the adapter that the site holds."""
    uplink: Dtype = "float32"
    """Site to server. int8 and int4 send the change that training made, with error feedback."""


class ServerOptimizerSettings(Settings):
    """What the server makes of the average (Reddi et al., arXiv:2003.00295)."""

    kind: Literal["none", "fedavgm", "fedadam"] = "none"
    """none: the average is the next adapter. The others take it as a pseudo-gradient."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """Step along the pseudo-gradient. For fedadam about 1e-3."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment (beta_1)."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of fedadam's second moment."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """fedadam's floor under the root of the second moment: how adaptive it is."""


class RobustSettings(Settings):
    """Bounds on what one site can do to the average."""

    num_byzantine: Annotated[int, Field(ge=0)] = 1
    """Sites that may lie: the krums and trimmed_mean bear this many."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest Frobenius norm of a site's change of the whole model, alpha / rank * B @ A over all
    modules, before any average; a longer one is shortened. 0 = no bound."""


class SecureSumSettings(Settings):
    """Sums of updates of which the server learns nothing else (federation.secure_sum)."""

    enabled: bool = False
    threshold: Annotated[int, Field(ge=0, le=64)] = 0
    """Sites that each stage needs, and least sites in a sum: more than half of those that a round
    asks. 0 = two thirds of them and one, which bears that any third sides with the server."""
    clip: Annotated[float, Field(gt=0, le=1e6)] = 0.01
    """Largest change of one number of an update, in either direction; what is beyond it is cut. A
    step of AdamW changes a number by about its learning rate, so learning_rate * num_steps hardly
    cuts. Much more only costs precision."""
    bits: Annotated[int, Field(ge=2, le=32)] = 16
    """Of a number before the sum: 2 * clip / 2**bits is the step to which it is rounded, at
    random and right on average."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1
    """1 = all sites count alike. More = by examples, up to this many; the server learns how many
    those in a sum have together. A site with few of very many loses precision."""
    stage_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Longest wait for the replies of a stage that trains nothing."""


class SignedSettings(Settings):
    """A run that its owner signed beforehand: `federation sign` writes both."""

    description: Annotated[str, Field(max_length=32 << 10)] = ""
    """What was signed, as JSON (federation.run_signature); it names the run. Empty = not signed:
    every site has to name the run in its policy."""
    signature: Annotated[str, Field(pattern="^([0-9a-f]{128})?$")] = ""
    """Ed25519, 128 hex digits."""


AGGREGATIONS = Literal[
    "products",
    "factors",
    "alternating",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "geometric_median",
]


class FederationSettings(Settings):
    """One federated run: `[tool.flwr.app.config]`, or `flwr run . -c 'key=value'`."""

    base_model: str = ""
    """Directory of the base model (Hugging Face layout). Every site must hold the same digest."""
    out: str = ""
    """Directory of the run: adapters, updates in flight, events."""
    resume: str = ""
    """Directory of an interrupted run to go on with; its settings are taken from there."""
    simulated_sites: str = ""
    """Simulation only: a directory with one folder a site. A real site names its own data."""
    num_rounds: Annotated[int, Field(ge=1)] = 4
    num_sites: Annotated[int, Field(ge=1)] = 2
    """Sites to wait for before the first round. A later round goes on with those that are there."""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the connected sites that a round asks, drawn anew each round from ``seed``."""
    quorum: Annotated[int, Field(ge=1)] = 1
    """Usable updates without which a round does not count."""
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Longest wait for the replies of one round; messages expire with it."""
    round_attempts: Annotated[int, Field(ge=1)] = 2
    """How often a round without quorum is tried before the run ends."""
    late_replies: Literal["drop", "fold"] = "drop"
    """What becomes of an update that comes after its round: named and dropped, or its change is
    folded into the next round. One that comes later still is dropped."""
    aggregation: AGGREGATIONS = "products"
    """products: the exact mean of B @ A. factors: mean(B) @ mean(A), the usual inexact way.
    alternating: B and A are trained in turns, so that plain sums are exact. The others bear
    sites that lie: see ``robust``."""
    tail_rank: Annotated[int, Field(ge=0, le=1024)] = 32
    """products only: largest rank of what the cut to ``adapter.rank`` loses and the next round gets
    back; beyond it, it is lost."""
    metrics: str = ",".join(METRICS)
    """Numbers that the sites are asked for beside their updates, with commas between the names;
    empty = none. A site refuses a round that asks for one that its policy does not let out.
    Without num-examples every site weighs the same; without train_loss no loss is shown."""
    seed: Annotated[int, Field(ge=0)] = 0
    adapter: AdapterSettings = AdapterSettings()
    wire: WireSettings = WireSettings()
    server_optimizer: ServerOptimizerSettings = ServerOptimizerSettings()
    robust: RobustSettings = RobustSettings()
    secure_sum: SecureSumSettings = SecureSumSettings()
    signed: SignedSettings = SignedSettings()
    training: dict[str, Any] = {}
    """Passed on to the sites as it is: client.settings.TrainingSettings."""

    @model_validator(mode="after")
    def _paths_are_named(self) -> Self:
        for name in ("base_model", "out"):
            if not getattr(self, name) and not self.resume:
                raise ValueError(f"{name} is empty: pass it with -c '{name}=\"DIRECTORY\"'")
        return self

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Self:
        metric_names(self.metrics)
        return self

    @property
    def asked_metrics(self) -> tuple[str, ...]:
        """The names in ``metrics``."""
        return metric_names(self.metrics)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        kind, num_byzantine = self.aggregation, self.robust.num_byzantine
        needed = needed_updates(kind, num_byzantine)
        if self.quorum < needed:
            raise ValueError(
                f"quorum is {self.quorum}: aggregation {kind} with robust.num_byzantine "
                f"{num_byzantine} needs {needed} updates: raise quorum or lower num_byzantine"
            )
        if self.quorum > self.num_sites:
            raise ValueError(
                f"quorum is {self.quorum} and num_sites {self.num_sites}: expected a quorum of at "
                "most the sites that the first round waits for"
            )
        if self.adapter.energy and kind != "products":
            raise ValueError(
                f"adapter.energy is {self.adapter.energy} and aggregation {kind}: only products "
                'choose the rank; set adapter.energy=0 or aggregation="products"'
            )
        if self.robust.clip_norm and kind in ("factors", "alternating", "median", "trimmed_mean"):
            raise ValueError(
                f"robust.clip_norm is {self.robust.clip_norm} and aggregation {kind}: a change is "
                "shortened in product space, so use products, krum, multi_krum or geometric_median"
            )
        if kind == "alternating" and self.late_replies == "fold":
            raise ValueError(
                "late_replies is fold and aggregation alternating, in which the round after trains "
                'the other factor: set late_replies="drop"'
            )
        optimizer = self.server_optimizer
        if kind == "alternating" and optimizer.kind != "none":
            raise ValueError(
                f"server_optimizer.kind is {optimizer.kind} and aggregation alternating, which "
                "turns the factors every round: momentum of the old ones would be noise"
            )
        if optimizer.kind == "fedadam" and optimizer.learning_rate > 0.1:
            raise ValueError(
                f"server_optimizer.learning_rate is {optimizer.learning_rate:g}: fedadam moves "
                "every number of a factor by about that much: expected at most 0.1, try 0.001"
            )
        if kind == "alternating" and self.wire.uplink in ("int8", "int4"):
            raise ValueError(
                f"wire.uplink is {self.wire.uplink} and aggregation alternating, which turns the "
                "factors every round, so that error feedback would be in the old ones: use float32 "
                "or bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _secure_sum_fits(self) -> Self:
        if self.secure_sum.enabled and (fault := _secure_sum_fault(self)):
            raise ValueError(f"secure_sum.enabled is true and {fault}")
        return self

    def num_asked(self, num_connected: int) -> int:
        """Return how many of the connected sites a round asks."""
        # 0.07 * 100 is 7.000000000000001: that must not become 8.
        return max(self.quorum, math.ceil(self.fraction_train * num_connected - 1e-9))

    @property
    def secure_terms(self) -> dict[str, Any]:
        """The terms of every round's secure sum, as the sites judge them."""
        table, cohort = self.secure_sum, self.num_asked(self.num_sites)
        return {
            "cohort": cohort,
            "threshold": table.threshold or default_threshold(cohort),
            "clip": table.clip,
            "bits": table.bits,
            "max_examples": table.max_examples,
        }


def default_threshold(cohort: int) -> int:
    """Return the threshold that bears a third of the cohort colluding with the server."""
    return 2 * cohort // 3 + 1


def _secure_sum_fault(settings: FederationSettings) -> str:
    """Return the first thing that does not fit a secure sum, and what would; or ""."""
    terms, wire = settings.secure_terms, settings.wire
    cohort, threshold = terms["cohort"], terms["threshold"]
    faults = {
        f"aggregation {settings.aggregation}, which looks at each update by itself: use "
        "alternating, or factors": settings.aggregation not in ("alternating", "factors"),
        f"wire.uplink {wire.uplink}: what comes up has a format of its own (secure_sum.bits), so "
        'leave it at "float32"': wire.uplink != "float32",
        f"wire.downlink {wire.downlink}: all sites must train the very same adapter, whatever they "
        "held before, so use float32 or bfloat16": wire.downlink in ("int8", "int4"),
        "late_replies fold: a site's change cannot be read, so set "
        'late_replies="drop"': settings.late_replies == "fold",
        "simulated_sites is set: a secure sum needs sites that have a trainer and an identity "
        "(client daemon)": bool(settings.simulated_sites),
        f"a round asks {cohort} sites: expected 3 to 64 (num_sites * fraction_train)": not (
            3 <= cohort <= 64
        ),
        f"secure_sum.threshold {threshold} of the {cohort} sites that a round asks: expected more "
        "than half and at most all": not cohort < 2 * threshold <= 2 * cohort,
        f"quorum {settings.quorum} above the threshold {threshold}: raise secure_sum.threshold "
        "instead, below which a sum stays closed": settings.quorum > threshold,
    }
    return next((fault for fault, is_there in faults.items() if is_there), "")


def needed_updates(aggregation: str, num_byzantine: int) -> int:
    """Return the updates below which an aggregation cannot bear ``num_byzantine`` liars."""
    # Krum: Blanchard et al., arXiv:1703.02757. A trimmed mean must leave something in the middle.
    extra = {"krum": 3, "multi_krum": 3, "trimmed_mean": 1}
    return 2 * num_byzantine + extra[aggregation] if aggregation in extra else 1


def load_settings(kind: type[SettingsKind], values: Mapping[str, Any], source: str) -> SettingsKind:
    """Return checked settings from a TOML table or a flat Flower run config.

    Args:
        kind: The settings class.
        values: Nested tables or dotted keys.
        source: Where they come from, for the error message: a file name or "the run config".

    Raises:
        SettingsError: A key is unknown or missing, or a value is out of its range.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *tables, name = key.split(".")
        table = nested
        for part in tables:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                raise SettingsError(
                    f"{source}: '{key}' says that '{part}' is a table, but it is {inner!r} before"
                )
            table = inner
        table[name] = value
    try:
        return kind(**nested)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_describe(kind, error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as tables.

    Raises:
        SettingsError: The file is missing, not TOML, or not for this user.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist: pass a TOML file") from None
    except OSError as error:  # a directory, or another user's
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}): pass a TOML file that this user may read"
        ) from None
    return parse_toml(content, str(path))


def parse_toml(content: bytes, source: str) -> dict[str, Any]:
    """Return the tables of a TOML file's content.

    Raises:
        SettingsError: It is not TOML.
    """
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source} is not TOML: {error}") from None


def _describe(kind: type[Settings], error: ValidationError) -> str:
    """Turn pydantic's report into one sentence with the value seen and what was expected."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(_known_keys(kind, first["loc"])))
        return f"unknown setting '{place}'; known here: {known}"
    if first["type"] == "missing":
        return f"setting '{place}' is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "string_pattern_mismatch":
        expected = _in_words(first["ctx"]["pattern"])
        return f"setting '{place}' is {first['input']!r}: expected {expected}"
    return f"setting '{place}' is {first['input']!r}: {_lower_first(first['msg'])}"


def _in_words(pattern: str) -> str:
    """Return what a pattern of a field asks for: hex digits in words, anything else as it is."""
    hexadecimal = re.fullmatch(r"\^(\(any\|)?\[0-9a-f\]\{([0-9]+)\}\)?\$", pattern)
    if hexadecimal is None:
        return f"a text that fits {pattern}"
    return f"{hexadecimal[2]} hex digits (0-9, a-f){', or any' if hexadecimal[1] else ''}"


def _known_keys(kind: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        field = kind.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            break
        kind = field.annotation
    return list(kind.model_fields)


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
