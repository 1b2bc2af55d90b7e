"""A signed release: the few hundred bytes that a device believes.

The publisher signs which files, byte for byte, make one build, on which channel, and under which
sequence number. Everything else (registry, index, transport) may lie: a device asks for the blobs
that the release names and takes nothing else.

The envelope is DSSE (https://github.com/secure-systems-lab/dsse, protocol.md and envelope.md),
the signature Ed25519, the key id the sha256 of the raw public key. The payload is JSON in one
spelling (keys sorted, no spaces, ASCII): a release has exactly one payload, and its sha256 is the
release's name on the device. Unknown keys are refused: a field that an old agent would not
understand needs a new ``_type``.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge.errors import UserError, VerificationError
from edge.lineage import is_safe_name, is_sha256

RELEASE_TYPE = "urn:fedge:release:v1"
PAYLOAD_TYPE = "application/vnd.fedge.release.v1+json"
MAX_ENVELOPE_BYTES = 1 << 20
"""2,000 files of one release take about 400 KB; a device reads no more before it trusts."""
_MAX_QUOTED = 64
"""Characters that an error repeats of what nobody signed."""
_MAX_FILES = 2_000
_MAX_SIZE = 1 << 40
_MAX_SEQUENCE = (1 << 53) - 1  # the largest integer every JSON reader keeps


@dataclass(frozen=True)
class ReleaseFile:
    """One file of the build: its name inside the build directory and its exact bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Probe:
    """What a device asks a new build before it trusts it: it must generate tokens."""

    prompt: str = "Say hello."
    max_tokens: int = 16


DEFAULT_PROBE = Probe()


@dataclass(frozen=True)
class Release:
    """One build, offered to one channel. Construction refuses what no device should act on."""

    channel: str
    sequence: int
    """Grows with every release of a channel; a device never goes back."""
    build: str
    """Name for people, for example "gguf-q4_k"."""
    runtime: str
    """Runtime that generates with it: "llama.cpp" or "onnxruntime-genai"."""
    files: tuple[ReleaseFile, ...]
    lineage: str
    """sha256 of the build's lineage.json, itself one of the files."""
    probe: Probe = DEFAULT_PROBE

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: A field is out of range; the message names it.
        """
        if not (
            isinstance(self.channel, str) and re.fullmatch(r"[\w.-]{1,64}", self.channel, re.A)
        ):
            raise ValueError(f"channel {self.channel!r}: expected 1 to 64 of A-Z a-z 0-9 _ . -")
        for field, text in (("build", self.build), ("runtime", self.runtime)):
            if not (isinstance(text, str) and text.isprintable() and 0 < len(text) <= 128):
                raise ValueError(f"{field} {text!r}: expected 1 to 128 printable characters")
        _check_integer("sequence", self.sequence, 1, _MAX_SEQUENCE)
        _check_integer("probe.max_tokens", self.probe.max_tokens, 1, 1024)
        if not (isinstance(self.probe.prompt, str) and 0 < len(self.probe.prompt) <= 4096):
            raise ValueError("probe.prompt: expected 1 to 4096 characters")
        _check_files(self.files)
        if ("lineage.json", self.lineage) not in [(file.name, file.sha256) for file in self.files]:
            raise ValueError(f"lineage {self.lineage!r} is not the sha256 of a file lineage.json")

    @property
    def payload(self) -> bytes:
        """The one spelling of this release: what is signed."""
        document = {"_type": RELEASE_TYPE, **asdict(self)}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """Hex sha256 of the payload: the release's name on a device."""
        return hashlib.sha256(self.payload).hexdigest()

    def __str__(self) -> str:
        return f"release {self.sequence} of {self.channel} ({self.build}, {self.digest[:12]})"


def _check_integer(field: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:  # a bool is no count
        raise ValueError(f"{field} {value!r}: expected an integer from {low} to {high}")


def _check_files(files: Sequence[ReleaseFile]) -> None:
    """Refuse names that leave the directory, collide, or carry no usable digest or size."""
    if not 1 <= len(files) <= _MAX_FILES:
        raise ValueError(f"{len(files)} files: expected 1 to {_MAX_FILES}")
    names: set[str] = set()
    for file in files:
        if not is_safe_name(file.name):
            raise ValueError(f"file name {file.name!r} does not stay inside the build's directory")
        if file.name in names:
            raise ValueError(f"file name {file.name!r} stands twice")
        if not is_sha256(file.sha256):
            raise ValueError(
                f"file {file.name!r} has sha256 {file.sha256!r}: expected 64 hex digits"
            )
        _check_integer(f"size of {file.name!r}", file.size, 0, _MAX_SIZE)
        names.add(file.name)
    for name in names:
        parts = name.split("/")
        if any("/".join(parts[:length]) in names for length in range(1, len(parts))):
            raise ValueError(f"file name {name!r} lies inside another file of the release")


def parse_release(payload: bytes) -> Release:
    """Read a payload whose signature was checked; every field is judged all the same.

    Raises:
        VerificationError: It is no release of this version, in its one spelling.
    """
    try:
        document = json.loads(payload)
        kind = document.pop("_type")
        if kind != RELEASE_TYPE:
            raise ValueError(f"_type {kind!r}: expected {RELEASE_TYPE!r}; update the agent")
        files = tuple(ReleaseFile(**file) for file in document.pop("files"))
        release = Release(**document | {"files": files, "probe": Probe(**document.pop("probe"))})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VerificationError(f"the signed release cannot be used: {error}") from None
    if release.payload != payload:
        raise VerificationError("the signed release is not spelled as this version spells it")
    return release


def key_id(key: Ed25519PublicKey) -> str:
    """Return the hex sha256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return DSSE's PAE: the bytes that are signed bind the payload to its type."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(release: Release, key: Ed25519PrivateKey) -> bytes:
    """Return the DSSE envelope of ``release``. Ed25519: the same release gives the same bytes."""
    signature = key.sign(pre_authentication_encoding(release.payload))
    envelope = {
        "payload": base64.b64encode(release.payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}
        ],
    }
    content = json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode()
    if len(content) > MAX_ENVELOPE_BYTES:
        raise UserError(f"the release takes {len(content):,} bytes, over {MAX_ENVELOPE_BYTES:,}")
    return content


def open_release(envelope: bytes, public_keys: Sequence[Ed25519PublicKey]) -> Release:
    """Return the release that one of ``public_keys`` signed.

    Nothing of the payload is read before its signature holds.

    Args:
        envelope: The DSSE envelope, at most MAX_ENVELOPE_BYTES.
        public_keys: Pinned on the device; one good signature by any of them is enough.

    Raises:
        VerificationError: Damaged, signed by nobody we know, or altered after it was signed.
    """
    payload, signatures = _split(envelope)
    keys = {key_id(key): key for key in public_keys}
    known = [(keys[name], signature) for name, signature in signatures if name in keys]
    if not known:
        signers = ", ".join(name[:12] for name, _ in signatures)[:_MAX_QUOTED] or "nobody"
        pinned = ", ".join(name[:12] for name in keys) or "none"
        raise VerificationError(f"the release is signed by {signers}; pinned keys: {pinned}")
    for key, signature in known:
        try:
            key.verify(signature, pre_authentication_encoding(payload))
        except InvalidSignature:
            continue
        return parse_release(payload)
    raise VerificationError("the release was altered after it was signed: its signature is wrong")


def installed_release(envelope: bytes, digest: str) -> Release:
    """Return a release that this device verified when it installed it under ``digest``.

    The signature is not asked again, so that a device survives the rotation of its pinned keys.

    Raises:
        VerificationError: The envelope no longer holds the payload with that sha256.
    """
    payload, _ = _split(envelope)
    if (seen := hashlib.sha256(payload).hexdigest()) != digest:
        raise VerificationError(f"the installed release {digest} was altered: found {seen}")
    return parse_release(payload)


def _split(envelope: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Take an envelope apart: the payload, and each key id with its signature."""
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise VerificationError(f"the envelope has more than {MAX_ENVELOPE_BYTES:,} bytes")
    try:
        document: dict[str, Any] = json.loads(envelope)
        if document["payloadType"] != PAYLOAD_TYPE:
            seen = repr(document["payloadType"])[:_MAX_QUOTED]
            raise ValueError(f"payloadType {seen}: expected {PAYLOAD_TYPE!r}")
        signatures = [
            (one["keyid"], base64.b64decode(one["sig"], validate=True))
            for one in document["signatures"]
            if is_sha256(one["keyid"])
        ]
        return base64.b64decode(document["payload"], validate=True), signatures
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise VerificationError(
            f"the release envelope is damaged ({type(error).__name__}: {error})"
        ) from None
