"""What a device must be told: device.toml. Plain dataclasses, so that a device loads little.

    device_dir = "device"            # state, releases and the `current` link
    registry = "registry"            # an OCI image layout directory
    tag = "stable"                   # the tag to watch
    channel = "stable"               # releases of any other channel are refused
    public_keys = ["public.pem"]     # one good signature by any of them is enough
    poll_interval_s = 300            # seconds between two checks, give or take a fifth

Relative paths are taken from the directory of device.toml.
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge.errors import SettingsError

_MAX_POLL_INTERVAL_S = 7 * 24 * 3600


@dataclass(frozen=True)
class DeviceSettings:
    """One device's place in the world."""

    device_dir: Path
    registry: Path
    public_keys: tuple[Path, ...]
    """PEM files; at least one."""
    tag: str = "stable"
    channel: str = "stable"
    poll_interval_s: float = 300.0
    """Seconds, in [1, 604800]."""


def read_device_settings(path: Path) -> DeviceSettings:
    """Load device.toml.

    Raises:
        SettingsError: It cannot be read, a key is unknown or missing, or a value is out of range.
    """
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    names = [field.name for field in fields(DeviceSettings)]
    if unknown := sorted(set(given) - set(names)):
        raise SettingsError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(names)}")
    for name in ("device_dir", "registry", "public_keys"):
        if name not in given:
            raise SettingsError(f"{path}: {name} is missing")
    here = path.parent
    keys = given.pop("public_keys")
    if not isinstance(keys, list) or not keys:
        raise SettingsError(f"{path}: public_keys is {keys!r}, expected a list of PEM files")
    texts = {
        name: _text(path, name, given[name])
        for name in ("device_dir", "registry", "tag", "channel")
        if name in given
    }
    return DeviceSettings(
        device_dir=here / texts.pop("device_dir"),
        registry=here / texts.pop("registry"),
        public_keys=tuple(here / _text(path, "public_keys", key) for key in keys),
        poll_interval_s=_interval(path, given.get("poll_interval_s", 300.0)),
        **texts,
    )


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise SettingsError(f"{path}: {name} is {value!r}, expected a text")
    return value


def _interval(path: Path, value: Any) -> float:
    if type(value) not in {int, float} or not 1 <= value <= _MAX_POLL_INTERVAL_S:
        raise SettingsError(
            f"{path}: poll_interval_s is {value!r}, expected 1 to {_MAX_POLL_INTERVAL_S} seconds"
        )
    return float(value)
