"""The directory that `client init` makes: settings, policy, keys and state of one site.

All of it is there afterwards, or nothing: a new directory gets its name in one step. In a directory
that exists already no file is replaced; what was written is removed again on an error, and
site.toml comes last, so that it is there only where the rest is (a kill can leave the rest).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.identity import public_identity
from client.policy import Policy
from client.policy_template import policy_template
from client.service_units import DIRECTORY, TWO_USERS, service_units
from client.site_settings import SiteSettings, site_settings
from client.site_template import site_template
from federation.atomic import sync_directory
from federation.errors import UserError
from federation.settings import load_settings
from federation.signing_key import generate_key

SITE, POLICY, NODE_KEY, IDENTITY, STATE = "site.toml", "policy.toml", "node", "identity", "state"


@dataclass(frozen=True)
class NewFile:
    """A file that is not there yet."""

    name: str
    """Relative to the site's directory."""
    content: bytes = field(repr=False)
    mode: int = 0o644


@dataclass(frozen=True)
class NewSite:
    """What was made."""

    directory: Path
    files: tuple[Path, ...]
    settings: SiteSettings
    policy: Policy
    public_key: str
    """One line, as OpenSSH writes it: what the coordinator registers."""
    identity: str
    """Public half of the key for secure sums, 64 hex digits: what the other sites list."""

    @property
    def fingerprint(self) -> str:
        """Of the public key, as `ssh-keygen -l` prints it: short enough to read out."""
        blob = base64.b64decode(self.public_key.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def make_site(
    directory: Path,
    *,
    known: dict[str, str],
    base_models: Sequence[str] = (),
    signers: Sequence[str] = (),
    client: Path | None = None,
) -> NewSite:
    """Write a new site, all of it or nothing.

    Args:
        directory: Of the site; it may exist, but none of the files in it.
        known: Values of site.toml that the user said.
        base_models: Digests that its policy allows.
        signers: Public keys whose runs its policy allows.
        client: The command that systemd's units start, as two users; None = no units.

    Where daemon and trainer are one user, the state directory is made too, for its owner only, or
    stays as it is; of two users each gets its own from systemd or from the container's volume.

    Raises:
        SettingsError: A value is out of its range.
        UserError: A file exists, or cannot be written.
    """
    directory = directory.absolute()
    site_text = site_template(**(known | (TWO_USERS if client else {})))
    if any("\ud800" <= letter <= "\udfff" for letter in site_text):
        raise UserError("a path is not UTF-8, which TOML cannot hold: rename it")
    policy_text = policy_template(base_models=base_models, signers=signers)
    settings = site_settings(tomllib.loads(site_text), directory, SITE)
    policy = load_settings(Policy, tomllib.loads(policy_text), POLICY)
    keys = _node_key()
    identity, pem = generate_key()
    units = service_units(settings, directory / SITE, client) if client else {}
    files = [
        *keys,
        NewFile(IDENTITY, pem, 0o600),
        NewFile(POLICY, policy_text.encode()),
        *(NewFile(f"{DIRECTORY}/{name}", text.encode()) for name, text in units.items()),
        NewFile(SITE, site_text.encode()),
    ]
    try:
        _write(directory, files, settings.state if settings.node_state is None else None)
    except OSError as error:
        place = error.filename or directory
        raise UserError(
            f"{place} cannot be written ({error.strerror}): choose a directory that you may write"
        ) from None
    paths = tuple(directory / file.name for file in files)
    public_key = keys[1].content.decode().strip()
    return NewSite(directory, paths, settings, policy, public_key, public_identity(identity))


def _node_key() -> tuple[NewFile, NewFile]:
    """Return a new private key and its public half, as `ssh-keygen -t ecdsa -b 384` makes them."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return NewFile(NODE_KEY, private, 0o600), NewFile(f"{NODE_KEY}.pub", public + b"\n")


def _write(directory: Path, files: Sequence[NewFile], state: Path | None) -> None:
    if os.path.lexists(directory):
        if taken := [file.name for file in files if os.path.lexists(directory / file.name)]:
            raise UserError(
                f"{directory / taken[0]} exists already, and nothing is overwritten: choose "
                "another directory, or move it away"
            )
        _write_new(directory, files, state)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    if state is not None and state.is_relative_to(directory):
        state = building / state.relative_to(directory)
    try:
        _write_new(building, files, state)
        building.chmod(0o755)
        building.replace(directory)
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_new(directory: Path, files: Sequence[NewFile], state: Path | None) -> None:
    """Write files that are not there; on an error none of them is left."""
    made: list[Path] = []
    try:
        if state is not None and not state.is_dir():
            state.mkdir(mode=0o700, parents=True)
            made.append(state)
        for file in files:
            path = directory / file.name
            if not path.parent.is_dir():
                path.parent.mkdir()
                made.append(path.parent)
            # O_EXCL: a file that came meanwhile stays. The mode is right from the first moment.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
            made.append(path)
            with os.fdopen(descriptor, "wb") as opened:
                os.fchmod(descriptor, file.mode)
                opened.write(file.content)
                opened.flush()
                os.fsync(descriptor)
        sync_directory(directory)
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise
