import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.errors import UserError, VerificationError
from edge.registry import Layout, RegistryError, parse_reference, push
from edge.release import open_release
from tests.edge.artefacts import flip_bit, write_build

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return write_build(tmp_path / "build")


def blobs_of(registry: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of writing of each blob: what copying again would change."""
    entries = ((path, path.stat()) for path in (registry / "blobs" / "sha256").iterdir())
    return {path.name: (entry.st_ino, entry.st_mtime_ns) for path, entry in entries}


def test_a_pushed_registry_is_an_oci_image_layout(build: Path, tmp_path: Path) -> None:
    push(build, tmp_path / "registry", "stable", KEY)
    root = tmp_path / "registry"
    assert json.loads((root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((root / "index.json").read_text())
    assert index["schemaVersion"] == 2
    (entry,) = index["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "stable"}
    manifest_bytes = (root / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
    assert len(manifest_bytes) == entry["size"]
    manifest = json.loads(manifest_bytes)
    assert manifest["mediaType"] == entry["mediaType"]
    for descriptor in (manifest["config"], *manifest["layers"]):
        content = (root / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
        assert len(content) == descriptor["size"]
    for blob in (root / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    titles = {
        layer["annotations"]["org.opencontainers.image.title"]: layer["mediaType"]
        for layer in manifest["layers"]
    }
    assert titles == {
        "lineage.json": "application/octet-stream",
        "manifest.json": "application/octet-stream",
        "model.gguf": "application/vnd.cncf.model.weight.v1.raw",
        "tokenizer.json": "application/octet-stream",
    }


def test_the_envelope_and_the_blobs_come_back_as_they_went_in(build: Path, tmp_path: Path) -> None:
    release = push(build, tmp_path / "registry", "stable", KEY).release
    layout = Layout(tmp_path / "registry")
    assert open_release(layout.envelope("stable"), [KEY.public_key()]) == release
    for file in release.files:
        assert b"".join(layout.blob(file.sha256)) == (build / file.name).read_bytes()


def test_a_second_push_copies_nothing_and_counts_on(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first = push(build, registry, "stable", KEY)
    before = blobs_of(registry)
    second = push(build, registry, "stable", KEY)
    assert first.num_bytes_copied == sum(file.size for file in first.release.files)
    assert second.num_bytes_copied == 0
    assert [first.release.sequence, second.release.sequence] == [1, 2]
    assert before.items() <= blobs_of(registry).items()


def test_each_channel_counts_for_itself_and_a_number_may_be_given(
    build: Path, tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY, sequence=40)
    assert push(build, registry, "beta", KEY, channel="beta").release.sequence == 1
    assert push(build, registry, "stable", KEY).release.sequence == 41
    tags = {
        entry["annotations"]["org.opencontainers.image.ref.name"]
        for entry in Layout(registry).index()["manifests"]
        if "annotations" in entry  # what a tag named before stays listed without one
    }
    assert tags == {"stable", "beta"}


def test_a_tag_stays_with_its_channel(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY)
    before = (registry / "index.json").read_bytes()
    for sequence in (None, 9):
        with pytest.raises(UserError, match="belongs to channel 'stable', not 'beta'"):
            push(build, registry, "stable", KEY, channel="beta", sequence=sequence)
    assert (registry / "index.json").read_bytes() == before


def test_a_number_is_not_given_twice_even_if_no_tag_has_it(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY, sequence=40)
    push(build, registry, "stable", KEY, sequence=3)
    assert push(build, registry, "stable", KEY).release.sequence == 41
    tags = [entry.get("annotations") for entry in Layout(registry).index()["manifests"]]
    assert sum(tag is not None for tag in tags) == 1
    assert len(tags) == 3


def test_after_a_change_of_keys_a_number_is_asked_for_once(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    for _ in range(2):
        push(build, registry, "stable", Ed25519PrivateKey.generate(), sequence=1)
    push(build, registry, "stable", KEY, sequence=5)
    assert push(build, registry, "stable", KEY).release.sequence == 6


def test_a_push_repairs_a_damaged_blob(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    release = push(build, registry, "stable", KEY).release
    (weights,) = (file for file in release.files if file.name == "model.gguf")
    flip_bit(Layout(registry).blob_path(weights.sha256))
    assert push(build, registry, "stable", KEY).num_bytes_copied == weights.size
    assert b"".join(Layout(registry).blob(weights.sha256)) == (build / "model.gguf").read_bytes()


def test_a_push_that_dies_before_its_end_leaves_the_old_release(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY)
    before = Layout(registry).envelope("stable")
    monkeypatch.setattr("edge.registry.sign", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        push(write_build(tmp_path / "next", seed=1), registry, "stable", KEY)
    assert Layout(registry).envelope("stable") == before


def test_a_build_that_is_not_what_was_built_is_not_signed(build: Path, tmp_path: Path) -> None:
    flip_bit(build / "model.gguf")
    with pytest.raises(VerificationError, match=r"model\.gguf was changed"):
        push(build, tmp_path / "registry", "stable", KEY)
    assert not (tmp_path / "registry").exists()


def test_mistakes_of_the_publisher_write_nothing(build: Path, tmp_path: Path) -> None:
    for arguments, reason in [
        ({"channel": "no spaces"}, "channel"),
        ({"sequence": 0}, "sequence"),
    ]:
        with pytest.raises(UserError, match=reason):
            push(build, tmp_path / "registry", "stable", KEY, **arguments)
    with pytest.raises(UserError, match=r"lineage\.json"):
        push(tmp_path, tmp_path / "registry", "stable", KEY)
    assert not (tmp_path / "registry").exists()


def test_another_publishers_registry_needs_a_number(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", Ed25519PrivateKey.generate())
    with pytest.raises(UserError, match="--sequence"):
        push(build, registry, "stable", KEY)
    assert push(build, registry, "stable", KEY, sequence=5).release.sequence == 5


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"{}", b'{"manifests": [1]}', b"[" * 100_000, b" " * (5 << 20)],
)
def test_a_damaged_index_is_refused(build: Path, tmp_path: Path, damage: bytes) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY)
    (registry / "index.json").write_bytes(damage)
    with pytest.raises(VerificationError):
        Layout(registry).envelope("stable")


@pytest.mark.parametrize("digest", [None, 7, "md5:abc", "sha256:../../../etc/passwd", "sha256:ab"])
def test_an_index_may_not_name_a_file_outside_the_blobs(
    build: Path, tmp_path: Path, digest: object
) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY)
    index = json.loads((registry / "index.json").read_text())
    index["manifests"][0]["digest"] = digest
    (registry / "index.json").write_text(json.dumps(index))
    with pytest.raises(VerificationError, match="expected a sha256"):
        Layout(registry).envelope("stable")


def test_a_damaged_manifest_or_envelope_is_named(build: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    push(build, registry, "stable", KEY)
    (entry,) = Layout(registry).index()["manifests"]
    manifest = registry / "blobs" / entry["digest"].replace(":", "/")
    config = json.loads(manifest.read_bytes())["config"]
    for path in (registry / "blobs" / config["digest"].replace(":", "/"), manifest):
        flip_bit(path)
        with pytest.raises(VerificationError, match=f"{path.name} is damaged"):
            Layout(registry).envelope("stable")


def test_what_is_not_there_is_said(build: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no OCI image layout"):
        Layout(tmp_path / "nowhere").envelope("stable")
    push(build, tmp_path / "registry", "stable", KEY)
    with pytest.raises(RegistryError, match="no tag 'beta'"):
        Layout(tmp_path / "registry").envelope("beta")
    with pytest.raises(RegistryError, match="cannot give blob"):
        list(Layout(tmp_path / "registry").blob("0" * 64))


def test_a_reference_is_a_directory_and_a_tag() -> None:
    assert parse_reference("some/registry:v1.2-rc") == (Path("some/registry"), "v1.2-rc")
    for reference in ("registry", ":stable", "registry:", "registry:.x", "a:b/c", "a:b c"):
        with pytest.raises(UserError, match="expected DIR:TAG"):
            parse_reference(reference)
