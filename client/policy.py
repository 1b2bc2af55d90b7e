"""What this site allows: policy.toml, written by its security officer.

**What is not written is not allowed.** A list that is absent is empty, a largest value that is
absent is 0, and what a site can require is required until the file says that it is not. In the
lists that name things of the other side, `"any"` may stand: it has to be written out.

Nothing in a request, in the bundle of a run or on the server changes a policy. `client.verdict`
judges a request by it; `client policy check` says in sentences what a file allows.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, field_validator, model_validator

from client.request import MetricName, StrictSettings
from federation.header import MAX_ALPHA, MAX_RANK
from federation.settings import AGGREGATIONS, Dtype, load_settings, parse_toml, read_toml
from federation.signing_key import is_of_low_order

ANY = "any"
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _belongs_to_one(key: str) -> str:
    """Return a public key, or "any", unless it is one for which anybody can sign."""
    if key != ANY and is_of_low_order(key):
        raise ValueError(
            f"public key {key[:16]}… is of low order, so anybody can sign for it: expected one "
            "that `federation keygen` or `client identity` printed"
        )
    return key


DigestOrAny = Annotated[str, Field(pattern="^(any|[0-9a-f]{64})$")]
RunOrAny = Annotated[str, Field(pattern="^(any|[0-9a-f]{32})$")]
PublicKey = Annotated[str, Field(pattern="^[0-9a-f]{64}$"), AfterValidator(_belongs_to_one)]
PublicKeyOrAny = Annotated[
    str, Field(pattern="^(any|[0-9a-f]{64})$"), AfterValidator(_belongs_to_one)
]
ModulePattern = Annotated[str, Field(pattern="^[A-Za-z0-9_.*?-]{1,256}$")]
Digits = Annotated[int, Field(ge=1, le=15)]
Limit = Annotated[int, Field(ge=0, le=2**53)]
Clock = Annotated[str, Field(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]


class ModelRules(StrictSettings):
    """[models]: what may be trained."""

    base: Annotated[tuple[DigestOrAny, ...], Field(strict=False)] = ()
    """Digests of the base models (federation.base_model.model_digest), or "any"."""


class RunRules(StrictSettings):
    """[runs]: who may ask. A run is let in by its id or by the signature of a signer."""

    allowed: Annotated[tuple[RunOrAny, ...], Field(strict=False)] = ()
    """Ids of runs, 32 hex digits, or "any"."""
    signers: Annotated[tuple[PublicKey, ...], Field(strict=False)] = ()
    """Ed25519 public keys, 64 hex digits. One that signed the run's description
    (federation.run_signature), its bundle and number of rounds among it, lets the run in as long
    as what is asked is what was signed."""
    bundles: Annotated[tuple[DigestOrAny, ...], Field(strict=False)] = ()
    """sha256 of the app bundles that a run may carry, or "any". A bundle named in a signed
    description is allowed by the signature. A resident node runs no code of a bundle; a stock
    SuperNode does, and does not tell the trainer which: only "any" lets it in."""


class AdapterRules(StrictSettings):
    """[adapter]: what may be trained of the model, and how much can leave in it."""

    modules: Annotated[tuple[ModulePattern, ...], Field(strict=False)] = ()
    """Patterns of which each module's whole name must match one: * any characters, ? one."""
    max_rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    """Slices of every factor."""
    max_alpha: Annotated[float, Field(ge=0, le=MAX_ALPHA)] = 0.0
    """LoRA alpha: the update is alpha / rank * B @ A."""


class TrainingRules(StrictSettings):
    """[training]: what a run costs this site, and how far its text can sink into an update."""

    max_steps: Limit = 0
    """Optimizer steps of a round."""
    max_batch: Limit = 0
    """Records of a step: batch_size * accumulation."""
    max_tokens: Limit = 0
    """Longest record, in tokens."""
    max_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Largest learning rate. It costs no privacy; what it bounds is how far a round can drive the
    weights, and that its numbers stay numbers."""
    max_rounds: Limit = 0
    """Last round that a run may ask. A new run begins anew: only [runs] and the epsilon for life
    bound how many there are."""


class TrafficRules(StrictSettings):
    """[traffic]: how many bytes leave. Bytes of updates; what Flower and TLS add is not counted.

    The same bytes count once, however often they are sent. Every attempt at a secure sum sends
    other ones.
    """

    uplink: Annotated[tuple[Dtype, ...], Field(strict=False)] = ()
    """Number formats of an update."""
    max_round_bytes: Limit = 0
    """Of one update."""
    max_run_bytes: Limit = 0
    """Of all updates of a run."""


class AggregationRules(StrictSettings):
    """[aggregation]: among how many others this site's update disappears."""

    kinds: Annotated[tuple[AGGREGATIONS | Literal["any"], ...], Field(strict=False)] = ()
    """What the server may make of the updates. Without secure summation it is the server's word
    alone: it sees each update and can do with it what it likes."""
    secure_sum_required: bool = True
    """Whether the server may learn no more than a sum."""
    min_cohort: Annotated[int, Field(ge=1)] = 3
    """Fewest sites whose updates a sum may hold, this one included: with secure summation the
    threshold below which the sum stays closed, which sites check themselves. **Without it only the
    server's word**: it sees this site's update by itself, however many it says that there are."""
    cohort: Annotated[tuple[PublicKeyOrAny, ...], Field(strict=False)] = ()
    """Identities (Ed25519 public keys, 64 hex digits) of the sites that may be in a secure sum with
    this one, or "any". **With "any" a server can play the other sites itself**, and then it opens
    this site's update."""


class PrivacyRules(StrictSettings):
    """[privacy]: record-level differential privacy, and what a data set may spend for life.

    The noise covers the update and nothing else. ``num-examples``, ``train_loss`` and ``seconds``
    depend on the records too; so [metrics] lets none out unless it names it, and a private run has
    to weigh its sites by a public constant instead of their numbers of records.
    """

    required: bool = True
    """Whether every round must be DP-SGD. If false, a round without noise is allowed, has no
    epsilon, and makes the data set's epsilon for life infinite."""
    noise_floor: Annotated[float, Field(ge=0)] = 1.0
    """Smallest noise multiplier of a round that has noise."""
    max_record_clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest L2 bound on one record's gradient: how far one record moves the update of a step."""
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    """What a data set may spend for life, over all runs, at ``delta``."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Chance with which epsilon need not hold. A request is refused unless it is below 1 over the
    number of records: above that, publishing a whole record would still be "private"."""
    one_factor_only: bool = True
    """Whether a round with noise may train one factor only: noise in both factors multiplies, so
    the model suffers for privacy that it does not get. Costs no privacy if false."""

    @model_validator(mode="after")
    def _noise_is_noise(self) -> Self:
        if self.required and not self.noise_floor:
            raise ValueError(
                "privacy.noise_floor is 0 and privacy.required true: expected a noise multiplier "
                "above 0, such as 0.5"
            )
        return self


class MetricRules(StrictSettings):
    """[metrics]: numbers that leave beside the update."""

    allowed: Annotated[tuple[MetricName, ...], Field(strict=False)] = ()
    """Their names. All depend on the records: ``seconds`` is how long the box took, which grows
    with the records that a step of DP-SGD drew."""
    max_count: Limit = 3
    """How many a round may ask for."""
    digits: Digits = 3
    """Significant digits to which each is rounded before it leaves."""


class QuietWindow(StrictSettings):
    """Hours of some days in which this site answers nobody.

    A window that ends before it begins goes on into the next day; one that ends when it begins
    lasts 24 hours.
    """

    days: Annotated[tuple[Day, ...], Field(strict=False, min_length=1)] = DAYS
    """Days on which it begins."""
    begin: Annotated[Clock, Field(alias="from")]
    """First minute, such as "22:00". In the file: from."""
    end: Annotated[Clock, Field(alias="to")]
    """First minute after it. In the file: to."""

    def holds(self, local: datetime) -> bool:
        """Tell whether a moment of the site's own clock lies in the window."""
        clock = f"{local:%H:%M}"
        today, yesterday = DAYS[local.weekday()], DAYS[local.weekday() - 1]
        if self.begin < self.end:
            return today in self.days and self.begin <= clock < self.end
        return (today in self.days and clock >= self.begin) or (
            yesterday in self.days and clock < self.end
        )


class QuietHours(StrictSettings):
    """[quiet_hours]: when nothing is trained and nothing leaves."""

    time_zone: Annotated[str, Field(min_length=1, max_length=64)] = "UTC"
    """Of the site, such as "Europe/Berlin"."""
    windows: Annotated[tuple[QuietWindow, ...], Field(strict=False)] = ()
    """Each with days, from and to. None = this site always answers."""

    @field_validator("time_zone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        _zone(name)
        return name

    def hold(self, now: datetime) -> bool:
        """Tell whether a moment is a quiet one.

        Args:
            now: With a time zone, whichever.
        """
        if not self.windows:
            return False
        local = now.astimezone(_zone(self.time_zone))
        return any(window.holds(local) for window in self.windows)


class Policy(StrictSettings):
    """All that a site allows."""

    models: ModelRules = ModelRules()
    runs: RunRules = RunRules()
    adapter: AdapterRules = AdapterRules()
    training: TrainingRules = TrainingRules()
    traffic: TrafficRules = TrafficRules()
    aggregation: AggregationRules = AggregationRules()
    privacy: PrivacyRules = PrivacyRules()
    metrics: MetricRules = MetricRules()
    quiet_hours: QuietHours = QuietHours()


def read_policy(path: Path) -> Policy:
    """Return the policy of a file.

    Raises:
        SettingsError: It is missing or not TOML, a key is unknown, or a value is out of its range.
    """
    return load_settings(Policy, read_toml(path), str(path))


def parse_policy(content: bytes, source: str) -> Policy:
    """Return the policy of a file's content; ``source`` names it in an error.

    Raises:
        SettingsError: As `read_policy`.
    """
    return load_settings(Policy, parse_toml(content, source), source)


def _zone(name: str) -> tzinfo:
    """Return a time zone. UTC needs no time zone database, which a small container may lack."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"quiet_hours.time_zone is {name!r}, which this machine does not know: expected a name "
            'such as "Europe/Berlin", and the tzdata package where the system has none'
        ) from None
