"""What `flwr run` would send of an app: the digest of its bundle, and its run configuration.

With flwr's own functions, so that both are those of the run. They are not public: like
`federation.flower_grid`, this file is held to the tested versions, by
`tests/federation/test_app_bundle.py`.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fused_config_from_dir, parse_config_args

from federation.settings import SettingsError


def bundle_digest(app: Path) -> str:
    """Return the sha256 of the bundle that ``flwr run`` makes of a directory as it is now.

    Another version of zlib may pack the same files otherwise: compute it where the run is started.

    Raises:
        SettingsError: There is no app.
    """
    try:
        # flwr 1.41 asks pathspec for a pattern by its old name.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return hashlib.sha256(build_fab_from_disk(app)).hexdigest()
    except (click.ClickException, ValueError, OSError) as error:
        raise SettingsError(f"{app}: {_said(error)}: pass the directory of the app") from None


def run_config(app: Path, given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a run by dotted key: those that are given, and all together.

    Args:
        app: Directory of the app, whose pyproject.toml holds every setting with its default.
        given: As ``flwr run -c`` takes it: one TOML file, or texts of key=value pairs.

    Raises:
        SettingsError: It is neither, or names a setting that there is not.
    """
    try:
        overrides = dict(parse_config_args(list(given)))
    except (click.ClickException, ValueError, OSError) as error:
        raise SettingsError(f"-c: {_said(error)}") from None
    try:
        values = dict(get_fused_config_from_dir(app, {}))
    except (ValueError, KeyError, OSError) as error:
        raise SettingsError(f"{app}: {_said(error)}: pass the directory of the app") from None
    if unknown := [name for name in overrides if name not in values]:
        raise SettingsError(
            f"-c: {unknown[0]!r} is no setting of the app: its pyproject.toml has them all, under "
            "[tool.flwr.app.config]"
        )
    return overrides, values | overrides


def _said(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return error.message
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read ({error.strerror})"
    return str(error)
