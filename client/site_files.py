"""What lies on a site's disk, as far as it can be wrong: key, model, records, policy, state.

Facts are taken by functions that never raise for what a user may have got wrong; the checks of them
are pure. Of the records only their number is taken.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from client.check import Check, first_problem, gib, ok, skipped
from client.policy import Policy, read_policy
from federation.errors import FedgeError

Read = TypeVar("Read")

NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "fuse.")
"""Beginnings of the types of file systems on which SQLite's log and locks are not to be trusted."""
VOLATILE = {"tmpfs": "a restart", "ramfs": "a restart", "overlay": "the container's end"}
"""Types that do not outlive what they are named with."""
KEPT_ADAPTERS = 6
"""Files of one adapter's size that a run may hold at a time: two updates (client.answers), and two
adapters and two residuals (client.site_state)."""
LEAST_BYTES = 64 << 20
"""For ledger, locks and logs."""


@dataclass(frozen=True)
class Place:
    """One path."""

    path: Path
    is_there: bool = False
    is_hidden: bool = False
    """Whether this user may not even see if it is there."""
    mode: int = 0
    """Permission bits."""
    uid: int = -1
    is_readable: bool = False
    is_writable: bool = False
    free_bytes: int = 0
    filesystem: str = ""
    strays: tuple[str, ...] = ()
    """Names in a directory that lie on another file system."""


@dataclass(frozen=True)
class Model:
    """A base model."""

    num_parameters: int
    digest: str
    """"" where it was not read."""

    @property
    def weights(self) -> int:
        """Bytes in bfloat16."""
        return 2 * self.num_parameters


@dataclass(frozen=True)
class Records:
    """A data set, by its numbers."""

    num_kept: int
    num_dropped: int


def look(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Place:
    """Return what is at a path, for the user that runs this."""
    try:
        found = path.stat()
        disk = os.statvfs(path)
    except PermissionError:
        return Place(path, is_hidden=True)
    except OSError:
        return Place(path)
    is_readable = os.access(path, os.R_OK, effective_ids=True)
    strays: list[str] = []
    with contextlib.suppress(OSError):  # a name may go while we look
        if is_readable and path.is_dir():
            strays = [each.name for each in path.iterdir() if each.lstat().st_dev != found.st_dev]
    return Place(
        path,
        is_there=True,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        is_readable=is_readable,
        is_writable=os.access(path, os.W_OK, effective_ids=True),
        free_bytes=disk.f_bavail * disk.f_frsize,
        filesystem=_filesystem(path.resolve(), mounts),
        strays=tuple(sorted(strays)),
    )


def attempt(read: Callable[[], Read]) -> Read | str:
    """Return what was read, or in a sentence why not; nothing that is wrong ends the doctor."""
    try:
        return read()
    except FedgeError as error:
        return str(error)
    except OSError as error:
        return f"{Path(str(error.filename or '')).name}: {error.strerror or type(error).__name__}"
    except Exception as error:  # whatever a damaged file leads to: its text may be a record's
        return f"it cannot be read: {type(error).__name__}"


def read_model(directory: Path, *, is_quick: bool) -> Model:
    """Return what is to be known of a base model; reads all of it, or its headers only.

    Raises:
        ModelError: It is not there, or not whole.
        OSError: It cannot be read.
    """
    from federation.base_model import ModelError, model_digest, projection_shapes, read_config
    from federation.base_model import weight_shapes as shapes_of

    projection_shapes(read_config(directory))  # of a family that we know
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(
            f"{directory}: tokenizer.json is missing: copy the model's tokenizer into it"
        )
    count = sum(math.prod(shape) for shape in shapes_of(directory).values())
    return Model(count, "" if is_quick else model_digest(directory))


def count_records(path: Path) -> Records:
    """Return how many records a site would train on.

    Raises:
        DataError: The file is not there, or a line is no record.
    """
    from client.cleaning import clean
    from client.records import read_records

    records = read_records(path)
    kept = len(clean(records).kept)
    return Records(kept, len(records) - kept)


def read_site_policy(path: Path) -> Policy:
    """Return the policy of a site; `client.policy.read_policy` with the system's own errors."""
    with path.open("rb"):  # "permission denied" is another thing than "does not exist"
        return read_policy(path)


def read_node_key(path: Path) -> str:
    """Return the public half of a node key, as OpenSSH writes it.

    Raises:
        OSError: It cannot be read.
        FedgeError: It is no private key on an elliptic curve.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_ssh_private_key,
    )

    content = path.read_bytes()
    try:
        key = load_ssh_private_key(content, password=None)
    except Exception as error:
        raise FedgeError(f"{path.name} is no OpenSSH private key without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FedgeError(f"{path.name} is not on an elliptic curve")
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def check_node_key(place: Place, public: str, beside: str | None) -> Check:
    """Say whether the node key can be used, and by nobody else.

    Args:
        place: Of the private key.
        public: Its public half, or why there is none.
        beside: What NAME.pub says; None = there is no such file.
    """
    name, way = "node_key", f"ssh-keygen -t ecdsa -b 384 -N '' -f {place.path}"
    if not place.is_there and not place.is_hidden:
        return Check(name, "fail", f"{place.path} does not exist", f"client init, or {way}")
    if place.mode & 0o077:
        said = f"mode {place.mode:04o}: other users can read it"
        return Check(name, "fail", said, f"chmod 600 {place.path}; a key that was read, make anew")
    if not public.startswith("ecdsa-"):
        return Check(name, "fail", public, f"run this as the node's user, or make one: {way}")
    if beside is not None and beside.split()[:2] != public.split()[:2]:
        fix = f"ssh-keygen -y -f {place.path} > {place.path}.pub, and have that one registered"
        return Check(name, "fail", "the public key beside it is another key's", fix)
    return ok(name, f"{public.split(maxsplit=1)[0]}, mode {place.mode:04o}")


def check_model(found: Model | str) -> Check:
    """Say whether the base model is there and whole."""
    if isinstance(found, str):
        fix = "name a model directory (Hugging Face layout) that the trainer's user can read"
        return Check("base_model", "fail", found, fix)
    return ok("base_model", f"{found.num_parameters:,} parameters")


def check_digest(found: Model | str, policy: Policy | str) -> Check:
    """Say whether the policy allows this base model."""
    name = "digest"
    if isinstance(found, str) or not found.digest:
        return skipped(name, "the base model was not read")
    if isinstance(policy, str):
        return skipped(name, f"the policy was not read; it is {found.digest}")
    if found.digest in policy.models.base:
        return ok(name, f"{found.digest[:16]}…, which the policy allows")
    if "any" in policy.models.base:
        return Check(name, "warn", "the policy allows any", f'write base = ["{found.digest}"]')
    fix = f'in policy.toml, [models]: base = ["{found.digest}"]'
    return Check(name, "fail", "the policy does not allow this base model", fix)


def check_data(found: Records | str, place: Place) -> Check:
    """Say how many records there are, and whether other users can read them."""
    if isinstance(found, str):
        fix = "client check-data names the line; the trainer's user must be able to read the file"
        return Check("data", "fail", found, fix)
    said = f"{found.num_kept:,} records" + (
        f", {found.num_dropped:,} more are not trained on" if found.num_dropped else ""
    )
    if not found.num_kept:
        return Check("data", "fail", said, f"client check-data {place.path} says why")
    if place.mode & 0o004:
        said = f"{said}; every user of this machine can read the file"
        return Check("data", "warn", said, f"chmod o-r {place.path}")
    return ok("data", said)


def check_policy(found: Policy | str, place: Place, records: Records | str) -> Check:
    """Say whether the policy can be read, by whom it can be written, and whether it lets anyone in.

    Args:
        found: The policy, or why there is none.
        place: Of its file.
        records: Decide what delta means.
    """
    name = "policy"
    if isinstance(found, str):
        fix = f"client init writes one; client policy check {place.path}"
        return Check(name, "fail", found, fix)
    runs, privacy = found.runs, found.privacy
    count = records.num_kept if isinstance(records, Records) else 0
    is_loose = privacy.required and privacy.delta * count >= 1
    is_spent = privacy.required and not privacy.epsilon
    table = f"in {place.path.name}, "
    return first_problem(
        name,
        [
            (
                bool(place.mode & 0o022),
                "fail",
                f"mode {place.mode:04o}: others can change what this site allows",
                f"chmod go-w {place.path}",
            ),
            (not found.models.base, "warn", "no base model is allowed", "see digest, below"),
            (
                not (runs.allowed or runs.signers),
                "warn",
                "nobody's run is allowed",
                f"{table}[runs]: a signer's public key, or the id of a run",
            ),
            (
                is_loose,
                "fail",
                f"delta is {privacy.delta:g} with {count:,} records: all is refused",
                f"{table}[privacy]: delta below {1 / max(count, 1):.1g}",
            ),
            (
                is_spent,
                "warn",
                "epsilon is 0: all is refused",
                f"{table}[privacy]: what a data set may spend for life, such as epsilon = 8.0",
            ),
        ],
        f"allows {len(runs.allowed)} runs by id, and those of {len(runs.signers)} signers",
    )


def check_state(place: Place, uid: int, policy: Policy | str, *, name: str = "state") -> Check:
    """Say whether a state directory keeps what must be kept, and for its owner only.

    Args:
        place: Of the directory.
        uid: Of the user that runs this.
        policy: Decides how large what is kept may become.
        name: Key in site.toml.
    """
    path = place.path
    owner = "daemon" if name == "node_state" else "trainer"
    if place.is_hidden:
        fix = f"run this as the {owner}'s user, or as root"
        return Check(name, "fail", f"this user may not see {path}", fix)
    if not place.is_there:
        return Check(name, "warn", f"{path} does not exist", "it is made at the first start")
    largest = 0 if isinstance(policy, str) else policy.traffic.max_round_bytes
    mode = f"mode {place.mode:04o}"
    said = f"{gib(place.free_bytes)} free, {place.filesystem}, {mode}"
    kind = place.filesystem
    return first_problem(
        name,
        [
            (
                bool(place.mode & 0o077),
                "fail",
                f"{mode}: other users can look into it",
                f"chmod 700 {path}",
            ),
            (
                place.uid != uid,
                "warn" if uid == 0 else "fail",
                f"it belongs to user id {place.uid}, this is user id {uid}",
                f"run this as that user, or chown it to the one that runs the {owner}",
            ),
            (not place.is_writable, "fail", f"{path} cannot be written", "mount it for writing"),
            (
                bool(place.strays),
                "fail",
                f"parts of it are on another file system ({', '.join(place.strays[:3])})",
                "mount the whole directory: a rename between two file systems is not atomic",
            ),
            (
                place.free_bytes < max(KEPT_ADAPTERS * largest, LEAST_BYTES),
                "fail",
                said,
                f"free space: a run may keep {KEPT_ADAPTERS} times max_round_bytes of the policy",
            ),
            (
                kind.startswith(NETWORK),
                "warn",
                said,
                "use a local disk: SQLite's log does not trust this one",
            ),
            (
                kind in VOLATILE,
                "warn",
                f"{said}: lost with {VOLATILE.get(kind, '')}",
                "use a disk, or mount a volume: the ledger is in it",
            ),
        ],
        said,
    )


def check_ledger(
    found: tuple[int, str] | str | None, secret: Place, *, num_charged: int = 0
) -> Check:
    """Say whether the ledger holds together, and the secret of its fingerprints is there.

    Args:
        found: Number of rows and the head's hash, or why it cannot be read; None = none yet.
        secret: Of `fingerprint.key`.
        num_charged: Data sets that the ledger knows.
    """
    name = "ledger"
    if secret.is_there and secret.mode & 0o077:
        said = f"{secret.path.name} has mode {secret.mode:04o}: others can test guesses of a text"
        return Check(name, "fail", said, f"chmod 600 {secret.path}")
    if found is None:
        return ok(name, "none yet: nothing has left this site")
    if isinstance(found, str):
        fix = "one that is damaged comes back from a backup; nothing is answered till then"
        return Check(name, "fail", found, fix)
    if num_charged and not secret.is_there:
        said = f"{secret.path.name} is gone: the ledger cannot tell that it knows a record"
        return Check(name, "fail", said, "put it back from a backup")
    count, head = found
    return ok(name, f"{count} rows hold together, the last is {head[:16]}…")


def _filesystem(path: Path, mounts: Path) -> str:
    """Return the type of the file system that holds a path; "" where the system does not say."""
    best, kind = Path("/"), ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, place, found, *_ = line.split(" ")
        mounted = Path(place.replace("\\040", " "))
        if path.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, found
    return kind
