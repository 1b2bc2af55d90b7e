"""What a run asks of a site for one round: believed only once every field of it is checked.

A request comes as the JSON head of a message from a process that the site does not trust. It is
parsed once, strictly: a key twice, NaN, infinity, a boolean as a number, a number of hundreds of
digits, text that is not plain ASCII where a name stands, all of them are refused here. What is
merely too much for this site is refused later, by `client.verdict`.

What the adapter of the message is, the run does not say: the trainer reads it from the message
(`with_facts`). Only the REQUEST.json of `client policy explain` has it written down.

An error names the field and quotes at most 80 printable characters of what came.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from client.settings import TrainingSettings
from federation.errors import UserError
from federation.header import MAX_ALPHA, MAX_RANK, Header, message_bytes, num_numbers
from federation.metrics import METRICS
from federation.run_signature import (
    MAX_DESCRIPTION,
    RunDescription,
    canonical_json,
    module_kinds,
)
from federation.settings import AGGREGATIONS, Dtype, Settings

MAX_HEAD_BYTES = 64 << 10
MAX_ROUNDS = 1_000_000
MAX_ATTEMPTS = 1_000_000_000
MAX_COHORT = 10_000
MAX_SECURE_COHORT = 64
"""federation.secure_messages.MAX_COHORT, which a policy's command need not load."""
_MAX_DEPTH = 4
"""A request is an object of tables and lists of names: nothing in it is deeper."""
_LARGEST_INT = 2**63 - 1
_LARGEST_SIZE = 2**53
_MAX_QUOTED = 80

RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MetricName = Annotated[str, Field(pattern="^[a-z][a-z0-9_-]{0,63}$")]
ModuleName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,256}$")]


class RequestError(UserError):
    """A request is not what a request has to be; the field is named."""


class StrictSettings(Settings):
    """A table in which True is no number, "8" is no number, and NaN and infinity are nothing."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class SecureSumTerms(StrictSettings):
    """The terms on which the server is to learn no more than a sum.

    A round's whole terms (federation.secure_messages.Terms) hold them.
    """

    cohort: Annotated[int, Field(ge=3, le=MAX_SECURE_COHORT)]
    """Sites at most."""
    threshold: Annotated[int, Field(ge=2, le=MAX_SECURE_COHORT)]
    """Sites without which the sum stays closed: so many updates stand in it at least."""
    clip: Annotated[float, Field(gt=0, le=1e6)]
    """Public bound on one number of an update's change, before it is rounded to the ring."""
    bits: Annotated[int, Field(ge=2, le=32)]
    """Of one number before the sum; the ring is wider by what the cohort needs."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1
    """Largest weight of a site. 1 = all count alike; more tells the sum of the weights."""

    @model_validator(mode="after")
    def _cannot_be_split(self) -> Self:
        # With half the cohort or fewer, a server could open two sums of two halves.
        if not self.cohort < 2 * self.threshold <= 2 * self.cohort:
            raise ValueError(
                f"secure_sum.threshold is {self.threshold} of a cohort of {self.cohort}: expected "
                "more than half of it and at most all"
            )
        return self


class AdapterFacts(StrictSettings):
    """What the trainer read from the message, before it trains."""

    base_model: Digest
    """Digest of the base model that the adapter belongs to."""
    content_digest: Digest
    """Content digest of the adapter that is to be trained (federation.wire)."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    """Of what this site trains."""
    served_rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    """Of the message, which is more where this site trains fewer slices; 0 = the same."""
    alpha: Annotated[float, Field(gt=0, le=MAX_ALPHA)]
    """At the rank of the message."""
    modules: Annotated[tuple[ModuleName, ...], Field(strict=False, min_length=1)]
    """Names of the projections that have factors."""
    num_bytes: Annotated[int, Field(ge=1, le=_LARGEST_SIZE)]
    """Of the update that would leave the site; a site that trains fewer slices sends less."""


class SiteRequest(StrictSettings):
    """One round of one run, as it is asked of this site."""

    run: RunId
    """Random id of the run."""
    bundle: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    """sha256 of the app bundle that the run carries; empty where the node cannot know it."""
    server_round: Annotated[int, Field(ge=1, le=MAX_ROUNDS)]
    uplink: Dtype
    """Number format of what leaves."""
    downlink: Dtype
    trains: Literal["AB", "A", "B"]
    """Factors that learn."""
    aggregation: AGGREGATIONS
    """What the server makes of the updates, by its own word."""
    training: dict[str, Any]
    """As it was sent: what a signature covers. Read ``training_settings``."""
    metrics: Annotated[tuple[MetricName, ...], Field(strict=False, max_length=64)] = METRICS
    """What the run wants back beside the update."""
    num_rounds: Annotated[int, Field(ge=0, le=MAX_ROUNDS)] = 0
    """Rounds of the whole run. 0 = not said; a signed run must say it."""
    cohort: Annotated[int, Field(ge=0, le=MAX_COHORT)] = 0
    """Fewest updates that the server averages, its quorum, where there is no secure sum: its word
    alone. 0 = not said."""
    secure_sum: SecureSumTerms | None = None
    stage: Literal["", "advertise", "share", "mask", "agree", "reveal"] = ""
    """Of the secure sum. Neither it nor the attempt is in the description or in the digest of the
    settings: they say how often and how far the one update of a round is asked for."""
    attempt: Annotated[int, Field(ge=0, le=MAX_ATTEMPTS)] = 0
    """Number of this try at the round's sum, from 1 on; 0 = not said."""
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION, pattern="^[ -~]*$")] = ""
    """Of the run, as it was signed (federation.run_signature); empty = it is not signed."""
    signature: Annotated[str, Field(pattern="^([0-9a-f]{128})?$")] = ""
    """Ed25519 over ``description``."""
    adapter: AdapterFacts | None = None

    @field_validator("training")
    @classmethod
    def _training_is_known(cls, training: dict[str, Any]) -> dict[str, Any]:
        for name, value in training.items():
            is_number = isinstance(value, int | float)
            if is_number and not (math.isfinite(value) and abs(value) <= _LARGEST_INT):
                raise ValueError(f"training.{_quoted(name)} is no number that a setting can have")
        try:
            TrainingSettings.model_validate(training, strict=True)
        except ValidationError as error:
            raise ValueError(_first_fault(error, "training.")) from None
        return training

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics names one twice: expected each once")
        if self.secure_sum is not None and self.cohort not in (0, self.secure_sum.cohort):
            raise ValueError(
                f"cohort is {self.cohort} and secure_sum.cohort {self.secure_sum.cohort}: expected "
                "the same, or no cohort beside secure_sum"
            )
        if (self.stage or self.attempt) and not (self.secure_sum and self.stage and self.attempt):
            raise ValueError(
                f"stage is {self.stage!r} and attempt {self.attempt}: expected both, and the terms "
                "in secure_sum, or neither"
            )
        if self.num_rounds and self.server_round > self.num_rounds:
            raise ValueError(
                f"server_round is {self.server_round} of num_rounds {self.num_rounds}: expected a "
                "round of the run"
            )
        return self

    @cached_property
    def training_settings(self) -> TrainingSettings:
        """The training settings, with every default filled in."""
        return TrainingSettings.model_validate(self.training, strict=True)

    @property
    def batch(self) -> int:
        """Records in one optimizer step."""
        return self.training_settings.batch_size * self.training_settings.accumulation

    @property
    def is_private(self) -> bool:
        """Whether the round is to be trained by DP-SGD."""
        return self.training_settings.noise_multiplier > 0

    @property
    def settings_digest(self) -> str:
        """Return the sha256 of all that decides a round: the same with another one is a replay.

        Who asks is no part of it: a run that is resumed with another bundle asks the same.
        """
        who = {"bundle", "description", "signature"}
        said = self.model_dump(mode="json", exclude={"adapter", "stage", "attempt", *who})
        return hashlib.sha256(canonical_json(said)).hexdigest()

    def described(self, facts: AdapterFacts) -> RunDescription:
        """Return what a description of the run has to say for this request to be of it.

        Args:
            facts: Of its adapter.

        Raises:
            ValidationError: The request does not say ``num_rounds``.
        """
        terms, rank = self.secure_sum, facts.served_rank or facts.rank
        return RunDescription(
            run=self.run,
            bundle=self.bundle,
            base_model=facts.base_model,
            num_rounds=self.num_rounds,
            aggregation=self.aggregation,
            factors="one" if len(self.trains) == 1 else "both",
            rank=rank,
            alpha=facts.alpha,
            min_rank=rank,
            max_rank=rank,
            modules=module_kinds(facts.modules),
            num_modules=len(facts.modules),
            uplink=self.uplink,
            downlink=self.downlink,
            training=self.training,
            metrics=self.metrics,
            cohort=self.cohort or (0 if terms is None else terms.cohort),
            secure_sum=None if terms is None else terms.model_dump(),
            not_after="",
        )


def parse_request(head: bytes) -> SiteRequest:
    """Return the request that the head of a message holds.

    Args:
        head: UTF-8 JSON, one object of at most 64 KiB.

    Raises:
        RequestError: It is too long, no JSON, or a field is unknown, missing, given twice or out
            of its range; the field is named.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise RequestError(f"the request has {len(head)} bytes: expected at most {MAX_HEAD_BYTES}")
    try:
        said = json.loads(
            head.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError:
        raise RequestError("the request is not UTF-8: expected one JSON object") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the request is not JSON ({error.msg} at character {error.pos}): expected one object"
        ) from None
    except RecursionError:
        raise RequestError(f"the request is nested deeper than {_MAX_DEPTH}") from None
    if not isinstance(said, dict):
        raise RequestError(f"the request is {_quoted(said)}: expected one JSON object")
    _refuse_depth(said, _MAX_DEPTH)
    try:
        return SiteRequest.model_validate(said)
    except ValidationError as error:
        raise RequestError(f"the request's {_first_fault(error)}") from None


def with_facts(
    request: SiteRequest,
    *,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    alpha: float,
    base_model: str,
    content_digest: str,
    served_rank: int = 0,
) -> SiteRequest:
    """Return the request with what the trainer read from the message; what it claimed is dropped.

    ``num_bytes`` is counted as `federation.wire` will write the update, or as a secure sum masks
    it: one ring element for each number of the factors that learn.

    Args:
        request: As parsed.
        shapes: (out features, in features) by module of the adapter to train.
        rank: Its slices.
        alpha: LoRA alpha.
        base_model: Digest that the message names.
        content_digest: Of the adapter to train.
        served_rank: Slices of the message's adapter, of which this site trains ``rank``; 0 = all.

    Raises:
        RequestError: The message's adapter has a name, a rank or a size that none can have.
    """
    terms = request.secure_sum
    if terms is None:
        num_bytes = message_bytes(shapes, rank, request.uplink, request.trains, alpha=alpha)
    else:
        from federation.secure_messages import masked_bytes

        num_bytes = masked_bytes(
            num_numbers(shapes, rank, request.trains),
            cohort=terms.cohort,
            bits=terms.bits,
            max_examples=terms.max_examples,
        )
    return _with(
        request,
        base_model=base_model,
        content_digest=content_digest,
        rank=rank,
        served_rank=served_rank,
        alpha=alpha,
        modules=tuple(shapes),
        num_bytes=num_bytes,
    )


def with_claims(
    request: SiteRequest, header: Header, *, rank: int, content_digest: str
) -> SiteRequest:
    """Return the request with what the header of a message claims, before the message is opened.

    How many bytes the update will have is not known yet, and stands as the fewest.

    Args:
        request: As parsed.
        header: Of the message.
        rank: Slices that this site will train.
        content_digest: What the content is taken to be.

    Raises:
        RequestError: As `with_facts`.
    """
    return _with(
        request,
        base_model=header.base_model,
        content_digest=content_digest,
        rank=rank,
        served_rank=header.rank,
        alpha=header.alpha,
        modules=tuple(dict.fromkeys(name.rpartition(".")[0] for name in header.places)),
        num_bytes=1,
    )


def _with(request: SiteRequest, **facts: Any) -> SiteRequest:
    try:
        adapter = AdapterFacts(**facts)
    except ValidationError as error:
        raise RequestError(f"the message's {_first_fault(error, 'adapter.')}") from None
    return request.model_copy(update={"adapter": adapter})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the request's {_quoted(twice)} is given twice: expected it once")
    return table


def _refuse_constant(name: str) -> float:
    raise RequestError(f"the request holds {name}: expected finite numbers")


def _bounded_int(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > _LARGEST_INT:
        raise RequestError(
            f"the request holds the number {_quoted(digits)}: expected at most {_LARGEST_INT}"
        )
    return int(digits)


def _finite_float(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise RequestError(f"the request holds {_quoted(digits)}: expected finite numbers")
    return float(digits)


def _refuse_depth(value: Any, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not left:
        raise RequestError(f"the request is nested deeper than {_MAX_DEPTH}")
    for inner in value.values() if isinstance(value, dict) else value:
        _refuse_depth(inner, left - 1)


def _first_fault(error: ValidationError, table: str = "") -> str:
    """Return the first fault as "field is value: what was expected", in our own words."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    place = table + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"field {_quoted(place)} is unknown: expected the fields of this version of fedge"
    if first["type"] == "missing":
        return f"field {place} is missing"
    expected = first["msg"][:1].lower() + first["msg"][1:]
    return f"field {place} is {_quoted(first['input'])}: {expected}"


def _quoted(value: Any) -> str:
    """Return at most 80 printable ASCII characters of a value that came from outside."""
    text = ascii(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}..."
