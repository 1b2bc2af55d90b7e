"""A run's settings as the description that its owner signs, and held to it when the run begins.

What the sites verify is in `federation.run_signature`; here is the coordinator's side. The owner
signs before the run starts, where the key is, and gives the result to whoever starts the run: a
server that does not hold the key can start this run and no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.adapter import TARGETS
from federation.base_model import projection_shapes, read_config
from federation.run_signature import (
    RunDescription,
    difference,
    is_over,
    is_signed_by,
    module_kinds,
    parse_description,
)
from federation.settings import SettingsError, SignedSettings, load_settings

if TYPE_CHECKING:
    from federation.settings import FederationSettings

AGAIN = "sign the run as it is to be with `federation sign`"


def describe(
    settings: FederationSettings,
    *,
    run: str,
    bundle: str,
    base_model: str,
    model: Path,
    not_after: str,
) -> RunDescription:
    """Return the description of a run.

    Args:
        settings: Of the run.
        run: Its id.
        bundle: sha256 of its app bundle.
        base_model: Digest of the base model.
        model: Its directory, or that of its config.json.
        not_after: When the signature is to end, as `federation.run_signature.MOMENT` writes it.

    Raises:
        ModelError: The model is missing, or of a family whose modules are not known.
        SettingsError: A training setting is nothing that can be signed, such as NaN.
    """
    named = TARGETS[settings.adapter.targets]
    shapes = projection_shapes(read_config(model))
    modules = [name for name in shapes if name.rpartition(".")[2] in named]
    adapter, terms = settings.adapter, None
    if settings.secure_sum.enabled:
        terms = settings.secure_terms
    said = {
        "run": run,
        "bundle": bundle,
        "base_model": base_model,
        "num_rounds": settings.num_rounds,
        "aggregation": settings.aggregation,
        "factors": "one" if settings.aggregation == "alternating" else "both",
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "min_rank": 1 if adapter.energy else adapter.rank,
        "max_rank": max(adapter.rank, adapter.max_rank) if adapter.energy else adapter.rank,
        "modules": module_kinds(modules),
        "num_modules": len(modules),
        "uplink": settings.wire.uplink,
        "downlink": settings.wire.downlink,
        "training": dict(settings.training),
        "metrics": settings.asked_metrics,
        "cohort": settings.quorum if terms is None else int(terms["cohort"]),
        "secure_sum": terms,
        "not_after": not_after,
    }
    return load_settings(RunDescription, said, "the run's description")


def check_signed(
    settings: FederationSettings, *, run: str, bundle: str, base_model: str, now: datetime
) -> None:
    """Return if a run with these settings is the one that was signed.

    Whose signature it is the sites judge: the server is not told whom they trust.

    Args:
        settings: Of the run; ``signed`` holds a signature.
        run: Its id.
        bundle: sha256 of the app bundle that it carries.
        base_model: Digest of its base model.
        now: With a time zone.

    Raises:
        SettingsError: It is another one, or the signature has ended; the field is named.
    """
    signed = described(settings.signed)
    asked = describe(
        settings,
        run=run,
        bundle=bundle,
        base_model=base_model,
        model=Path(settings.base_model),
        not_after=signed.not_after,
    )
    if fault := difference(signed, asked):
        raise SettingsError(f"the run is not the one that was signed: {fault}: {AGAIN}")
    if is_over(signed, now):
        raise SettingsError(f"the run's signature ended at {signed.not_after}: {AGAIN}")


def described(signed: SignedSettings) -> RunDescription:
    """Return what was signed.

    Raises:
        SettingsError: The description is none.
    """
    try:
        return parse_description(signed.description)
    except ValueError as error:
        raise SettingsError(f"signed.description is {error}: {AGAIN}") from None


def signed_id(settings: FederationSettings) -> str:
    """Return the id of a run that was signed, or "" of one that was not.

    Raises:
        SettingsError: There is half of a signature, or its description is none.
    """
    signed = settings.signed
    if bool(signed.description) != bool(signed.signature):
        there, lacks = (
            ("description", "signature") if signed.description else ("signature", "description")
        )
        raise SettingsError(f"signed.{there} stands without signed.{lacks}: {AGAIN}")
    return described(signed).run if signed.signature else ""


def run_file(overrides: Mapping[str, Any], content: str, signature: str) -> str:
    """Return the TOML that starts a signed run: ``flwr run . -c FILE``.

    Args:
        overrides: Settings of the run by dotted key that differ from the app's own.
        content: `RunDescription.content`.
        signature: Over it.
    """
    # JSON writes strings, numbers and booleans as TOML reads them.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    return "\n".join(
        [
            "# A signed run: start it with `flwr run . CONNECTION -c THIS-FILE`. What was signed:",
            "# `federation verify THIS-FILE --signer KEY`. If a setting is to change, sign anew.",
            *lines,
            "[signed]",
            f"description = {json.dumps(content)}",
            f'signature = "{signature}"',
            "",
        ]
    )


def read_run_file(path: Path, values: Mapping[str, Any]) -> SignedSettings:
    """Return the signature that a file of `run_file` holds.

    Args:
        path: Of the file, for the error message.
        values: Its content.

    Raises:
        SettingsError: It holds none.
    """
    table = values.get("signed")
    if not isinstance(table, dict) or not {"description", "signature"} <= table.keys():
        raise SettingsError(f"{path} holds no signed run: expected a file of `federation sign`")
    try:
        return SignedSettings(**table)
    except ValueError:
        raise SettingsError(f"{path}: signed is damaged: {AGAIN}") from None


def check_signer(signed: SignedSettings, signer: str) -> None:
    """Return if the owner of a key signed a run.

    Args:
        signed: The signature.
        signer: Public key, 64 hex digits.

    Raises:
        SettingsError: Somebody else did, or the description was changed since.
    """
    try:
        is_signed = is_signed_by(signer, signed.signature, signed.description)
    except ValueError:
        raise SettingsError(f"--signer {signer[:80]!r}: expected 64 hex digits") from None
    if not is_signed:
        raise SettingsError(
            f"the owner of {signer[:16]}… did not sign this: compare the key, and get the file anew"
        )
