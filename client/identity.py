"""A site's identity in secure sums: one Ed25519 key, for life.

The sites of a federation tell each other the public halves, and not by way of the coordinator:
each policy lists them (`[aggregation] cohort`). A coordinator that could choose who is in a cohort
could play all members but one (federation.secure_sum).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from client.check import Check, first_problem, skipped
from client.policy import ANY, Policy
from federation.settings import SettingsError
from federation.signing_key import new_key, public_half, read_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from client.site_files import Place


def read_identity(path: Path) -> Ed25519PrivateKey:
    """Return the private key of a file.

    Raises:
        SettingsError: The file is missing or holds no unencrypted Ed25519 key in PEM.
    """
    fix = "`client identity`, as the user that runs the trainer, makes one where there is none"
    return read_key(path, what="identity key", fix=fix)


def new_identity(path: Path) -> Ed25519PrivateKey:
    """Make a key, for its owner's eyes only.

    Raises:
        SettingsError: There is a file already: the other sites' policies list its public half.
    """
    try:
        return new_key(path)
    except FileExistsError:
        raise SettingsError(f"{path} exists already: a site keeps its identity for life") from None


def public_identity(key: Ed25519PrivateKey) -> str:
    """Return the public half as policies list it: 64 hex digits."""
    return public_half(key)


def check_identity(place: Place, public: str, policy: Policy | str, *, is_named: bool) -> Check:
    """Say whether this site can take part in secure sums, and with whom.

    Args:
        place: Of its key.
        public: The public half, or why there is none.
        policy: Of the site, or why there is none.
        is_named: Whether site.toml names the key: then the trainer does not start without it.
    """
    name = "identity"
    if isinstance(policy, str):
        return skipped(name, "there is no policy")
    rules = policy.aggregation
    listed = "any site" if ANY in rules.cohort else f"{len(set(rules.cohort))} sites listed"
    is_one = re.fullmatch("[0-9a-f]{64}", public) is not None
    others = "list the identities of the other sites in policy.toml, [aggregation] cohort"
    return first_problem(
        name,
        [
            (place.is_there and not is_one, "fail", public, "restore the key from a backup"),
            (
                bool(place.is_there and place.mode & 0o077),
                "fail",
                f"mode {place.mode:04o}: others can read the key",
                f"chmod go= {place.path}",
            ),
            (
                not place.is_there and not place.is_hidden and is_named,
                "fail",
                f"{place.path.name}, which site.toml names, does not exist",
                "client identity --config site.toml, as the user that runs the trainer",
            ),
            (
                not place.is_there and rules.secure_sum_required,
                "warn",
                "none, and the policy requires secure sums",
                "client identity --config site.toml, as the user that runs the trainer",
            ),
            (place.is_there and not rules.cohort, "warn", "no other site is listed", others),
            (
                place.is_there and ANY in rules.cohort,
                "warn",
                "any site may be in a sum with this one, those that a coordinator plays too",
                others,
            ),
        ],
        f"{public[:16]}…, {listed}" if place.is_there else "none, and no secure sum is required",
    )
