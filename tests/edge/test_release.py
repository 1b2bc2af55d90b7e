import base64
import hashlib
import json
import stat
import string
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import UserError, VerificationError
from edge.keys import generate_keys, read_private_key, read_public_key
from edge.release import Probe, Release, ReleaseFile, installed_release, open_release, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
LINEAGE = ReleaseFile("lineage.json", "ab" * 32, 10)
RELEASE = Release(
    channel="stable",
    sequence=7,
    build="gguf:q4_k",
    runtime="llama.cpp",
    files=(LINEAGE, ReleaseFile("model.gguf", "cd" * 32, 1000)),
    lineage="ab" * 32,
)

names = st.text(string.ascii_letters + "äß-_. ", min_size=1, max_size=12).filter(
    lambda name: name not in {".", ".."}
)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
releases = st.builds(
    Release,
    channel=st.text(string.ascii_letters + ".-_", min_size=1, max_size=20),
    sequence=st.integers(1, 2**53 - 1),
    build=names,
    runtime=st.sampled_from(["llama.cpp", "onnxruntime-genai"]),
    files=st.dictionaries(
        names.map("onnx/{}".format), st.tuples(digests, st.integers(0, 1 << 40)), max_size=5
    ).map(lambda files: (LINEAGE, *(ReleaseFile(name, *one) for name, one in files.items()))),
    lineage=st.just(LINEAGE.sha256),
    probe=st.builds(Probe, st.text(min_size=1, max_size=50), st.integers(1, 1024)),
)


def sign_by_hand(payload: bytes, kind: str = "application/vnd.fedge.release.v1+json") -> bytes:
    """Make an envelope from the text of the DSSE protocol alone, whatever the payload."""
    to_sign = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    key_id = hashlib.sha256(KEY.public_key().public_bytes_raw()).hexdigest()
    return json.dumps(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"keyid": key_id, "sig": base64.b64encode(KEY.sign(to_sign)).decode()}],
        }
    ).encode()


def payload_with(**changes: object) -> bytes:
    document = json.loads(RELEASE.payload) | changes
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@given(releases)
def test_what_was_signed_is_what_is_opened(release: Release) -> None:
    assert open_release(sign(release, KEY), [KEY.public_key()]) == release


def test_an_envelope_made_by_hand_from_the_protocol_opens() -> None:
    opened = open_release(sign_by_hand(RELEASE.payload), [KEY.public_key()])
    assert opened == RELEASE
    assert opened.digest == hashlib.sha256(RELEASE.payload).hexdigest()
    assert json.loads(sign(RELEASE, KEY)) == json.loads(sign_by_hand(RELEASE.payload))


@settings(max_examples=300)
@given(st.integers(0, 8 * len(sign(RELEASE, KEY)) - 1))
def test_any_flipped_bit_of_the_envelope_is_refused_or_changes_nothing(bit: int) -> None:
    envelope = bytearray(sign(RELEASE, KEY))
    envelope[bit // 8] ^= 1 << bit % 8
    assert bytes(envelope) != sign(RELEASE, KEY)
    try:
        opened = open_release(bytes(envelope), [KEY.public_key()])
    except VerificationError:
        return
    assert opened == RELEASE  # two letters of base64 can stand for the same last bits


def test_an_altered_payload_under_the_old_signature_is_refused() -> None:
    envelope = json.loads(sign(RELEASE, KEY))
    envelope["payload"] = base64.b64encode(payload_with(sequence=8)).decode()
    with pytest.raises(VerificationError, match="altered after it was signed"):
        open_release(json.dumps(envelope).encode(), [KEY.public_key()])


def test_a_signature_for_another_kind_of_payload_does_not_count() -> None:
    with pytest.raises(VerificationError, match="payloadType"):
        open_release(sign_by_hand(RELEASE.payload, "text/plain"), [KEY.public_key()])
    envelope = json.loads(sign_by_hand(RELEASE.payload, "text/plain"))
    envelope["payloadType"] = "application/vnd.fedge.release.v1+json"
    with pytest.raises(VerificationError, match="altered after it was signed"):
        open_release(json.dumps(envelope).encode(), [KEY.public_key()])


def test_another_key_is_refused_and_either_of_two_pinned_keys_will_do() -> None:
    with pytest.raises(VerificationError, match="pinned keys"):
        open_release(sign(RELEASE, OTHER_KEY), [KEY.public_key()])
    both = [OTHER_KEY.public_key(), KEY.public_key()]
    assert open_release(sign(RELEASE, KEY), both) == RELEASE


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a\\b", "a\0", "", ".", "a//b", "lineage.json", "model.gguf/x"],
)
def test_a_signed_release_with_an_unusable_name_is_refused(name: str) -> None:
    files = [*json.loads(RELEASE.payload)["files"], {"name": name, "sha256": "0" * 64, "size": 1}]
    with pytest.raises(VerificationError, match="file name"):
        open_release(sign_by_hand(payload_with(files=files)), [KEY.public_key()])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sequence": 0}, "sequence"),
        ({"sequence": True}, "sequence"),
        ({"sequence": 1.5}, "sequence"),
        ({"sequence": 10**400}, "sequence"),
        ({"channel": "a b"}, "channel"),
        ({"build": "\x1b[2J"}, "build"),
        ({"files": []}, "0 files"),
        ({"files": [{"name": "a", "sha256": "0" * 64, "size": -1}]}, "size of 'a'"),
        ({"files": [{"name": "a", "sha256": "0" * 64, "size": 1 << 41}]}, "size of 'a'"),
        ({"files": [{"name": "a", "sha256": "A" * 64, "size": 1}]}, "sha256"),
        ({"files": [{"name": "a", "sha256": "0" * 64, "size": 1, "x": 1}]}, "x"),
        ({"lineage": "0" * 64}, "lineage"),
        ({"probe": {"prompt": "", "max_tokens": 1}}, "probe.prompt"),
        ({"surprise": 1}, "surprise"),
        ({"_type": "urn:fedge:release:v2"}, "update the agent"),
    ],
)
def test_a_signed_release_out_of_range_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(VerificationError, match=named):
        open_release(sign_by_hand(payload_with(**changes)), [KEY.public_key()])


def test_a_release_has_one_spelling() -> None:
    spaced = json.dumps(json.loads(RELEASE.payload), sort_keys=True).encode()
    assert spaced != RELEASE.payload
    twice = RELEASE.payload.replace(b'"sequence":7', b'"sequence":9,"sequence":7')
    assert twice != RELEASE.payload
    for payload in (spaced, twice):
        with pytest.raises(VerificationError, match="spelled"):
            open_release(sign_by_hand(payload), [KEY.public_key()])


@pytest.mark.parametrize("envelope", [b"", b"null", b"[]", b"[" * 200_000, b"x" * (2 << 20)])
def test_garbage_is_not_an_envelope(envelope: bytes) -> None:
    with pytest.raises(VerificationError, match="envelope"):
        open_release(envelope, [KEY.public_key()])


def test_an_installed_release_answers_to_its_digest_alone() -> None:
    assert installed_release(sign(RELEASE, OTHER_KEY), RELEASE.digest) == RELEASE
    with pytest.raises(VerificationError, match="was altered"):
        installed_release(sign(replace(RELEASE, sequence=8), KEY), RELEASE.digest)


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    private, public = generate_keys(tmp_path / "keys")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    envelope = sign(RELEASE, read_private_key(private))
    assert open_release(envelope, [read_public_key(public)]) == RELEASE
    before = private.read_bytes()
    with pytest.raises(UserError, match="is not overwritten"):
        generate_keys(tmp_path / "keys")
    assert private.read_bytes() == before


def test_a_passphrase_locks_the_private_key(tmp_path: Path) -> None:
    private, public = generate_keys(tmp_path, "open sesame")
    assert b"ENCRYPTED" in private.read_bytes()
    with pytest.raises(UserError, match="set EDGE_KEY_PASSPHRASE"):
        read_private_key(private)
    with pytest.raises(UserError, match="does not open"):
        read_private_key(private, "open barley")
    key = read_private_key(private, "open sesame")
    assert open_release(sign(RELEASE, key), [read_public_key(public)]) == RELEASE


def test_a_passphrase_in_the_environment_does_not_hinder_a_plain_key(tmp_path: Path) -> None:
    private, _ = generate_keys(tmp_path)
    read_private_key(private, "not needed")


def test_files_that_are_no_keys_are_named(tmp_path: Path) -> None:
    private, public = generate_keys(tmp_path)
    curve = tmp_path / "p256.pem"
    curve.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    for path, reason in [
        (public, "no PEM private key"),
        (curve, "no Ed25519 key"),
        (tmp_path / "none.pem", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_private_key(path)
    with pytest.raises(UserError, match="no PEM public key"):
        read_public_key(private)


@pytest.mark.parametrize(
    "changes",
    [
        {"payloadType": "x" * 500_000},
        {"payloadType": ["x" * 500_000]},
        {"signatures": [{"keyid": f"{one:064x}", "sig": "AAAA"} for one in range(5_000)]},
    ],
)
def test_an_error_repeats_little_of_what_nobody_signed(changes: dict[str, object]) -> None:
    envelope = json.dumps(json.loads(sign(RELEASE, KEY)) | changes).encode()
    with pytest.raises(VerificationError) as caught:
        open_release(envelope, [KEY.public_key()])
    assert len(str(caught.value)) < 250
