import tomllib
from pathlib import Path

import pytest

from client.settings import TrainingSettings
from federation.settings import (
    FederationSettings,
    Settings,
    SettingsError,
    load_settings,
    read_toml,
)

ROOT = Path(__file__).parents[2]


def flat(kind: type[Settings], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            keys |= flat(inner, f"{prefix}{name}.")
        elif name == "training":
            keys |= flat(TrainingSettings, "training.")
        else:
            keys.add(prefix + name)
    return keys


def flatten(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    values = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def test_every_setting_stands_in_flowers_run_config_with_its_default() -> None:
    """Flower refuses `-c key=value` for a key that pyproject.toml does not hold."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    values = flatten(config)
    assert values.keys() == flat(FederationSettings)
    loaded = load_settings(
        FederationSettings, values | {"base_model": "m", "out": "o"}, "pyproject.toml"
    )
    defaults = FederationSettings(base_model="m", out="o")
    assert loaded.model_copy(update={"training": {}}) == defaults
    assert load_settings(TrainingSettings, loaded.training, "training") == TrainingSettings()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "run config: base_model is empty"),
        ({"base_model": "", "out": "o"}, "base_model is empty: pass it with -c"),
        ({"base_model": "m", "out": "o", "num_round": 3}, "unknown setting 'num_round'"),
        ({"base_model": "m", "out": "o", "adapter.rnk": 3}, "unknown setting 'adapter.rnk'.*rank"),
        ({"base_model": "m", "out": "o", "num_rounds": 0}, "'num_rounds' is 0: .*greater"),
        ({"base_model": "m", "out": "o", "aggregation": "mean"}, "'aggregation' is 'mean'"),
        ({"base_model": "m", "out": "o", "num_sites": "two"}, "'num_sites' is 'two'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load_settings(FederationSettings, values, "run config")
    assert "\n" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainingSettings().num_steps = 3


def test_toml_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 3")
    with pytest.raises(SettingsError, match="is not TOML"):
        read_toml(tmp_path / "bad.toml")
