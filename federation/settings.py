"""Settings of a run: frozen, checked, the same keys in TOML and in Flower's run config.

Flower's run config holds scalars only and flattens tables to dotted keys (`training.batch_size`);
`load_settings` takes either form. An unknown key is an error: a misspelt privacy bound that is
silently ignored is worse than a run that does not start.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from federation.errors import UserError


class SettingsError(UserError):
    """A setting is unknown, missing or out of range."""


class Settings(BaseModel):
    """Base of every settings table."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SettingsKind = TypeVar("SettingsKind", bound=Settings)


class AdapterSettings(Settings):
    """The low-rank adapter that travels between the sites."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the served adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA scale numerator: the update is alpha / rank * B @ A."""
    targets: Literal["all-linear", "attention"] = "all-linear"
    """Which projections get factors: all seven of a block, or q, k, v and o only."""


class FederationSettings(Settings):
    """One federated run: `[tool.flwr.app.config]`, or `flwr run . -c 'key=value'`."""

    base_model: str
    """Directory of the base model (Hugging Face layout). Every site must hold the same digest."""
    out: str
    """Directory of the run: adapters, updates in flight, events."""
    simulated_sites: str = ""
    """Simulation only: a directory with one folder a site. A real site names its own data."""
    num_rounds: Annotated[int, Field(ge=1)] = 4
    num_sites: Annotated[int, Field(ge=1)] = 2
    """Sites to wait for before the first round. A later round goes on with those that are there."""
    aggregation: Literal["products", "factors"] = "products"
    """products: the exact mean of B @ A. factors: mean(B) @ mean(A), the usual inexact way."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of an adapter on the wire."""
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Longest wait for the replies of one round."""
    seed: Annotated[int, Field(ge=0)] = 0
    adapter: AdapterSettings = AdapterSettings()
    training: dict[str, Any] = {}
    """Passed on to the sites as it is: client.settings.TrainingSettings."""

    @model_validator(mode="after")
    def _paths_are_named(self) -> Self:
        for name in ("base_model", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: pass it with -c '{name}=\"DIRECTORY\"'")
        return self


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
            table = table.setdefault(part, {})
        table[name] = value
    try:
        return kind(**nested)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_describe(kind, error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as tables.

    Raises:
        SettingsError: The file is missing or not TOML.
    """
    if not path.is_file():
        raise SettingsError(f"{path} does not exist: pass a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None


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
    return f"setting '{place}' is {first['input']!r}: {_lower_first(first['msg'])}"


def _known_keys(kind: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        field = kind.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            break
        kind = field.annotation
    return list(kind.model_fields)


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
