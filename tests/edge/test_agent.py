import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge import slots
from edge.agent import Agent, Outcome, ProbeResult, probe_build
from edge.atomic import exclusive
from edge.errors import EdgeError, UserError, VerificationError
from edge.keys import generate_keys, read_private_key
from edge.llama import load_library
from edge.registry import Layout, RegistryError, push
from edge.release import Release, ReleaseFile, sign
from edge.slots import Action, State, decide
from edge.verification import verify
from tests.edge.artefacts import flip_bit, write_build
from tests.edge.test_release import sign_by_hand

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def generates(build: Path, release: Release) -> ProbeResult:
    """Answer as a runtime would that can read the model."""
    assert release.probe.prompt
    return ProbeResult(len((build / "model.gguf").read_bytes()[:5]), 1.0, 1.0)


def cannot_load(build: Path, release: Release) -> ProbeResult:
    raise RuntimeError("the model does not load\nwith details on a second line")


def says_nothing(build: Path, release: Release) -> ProbeResult:
    return ProbeResult(0, 1.0, 0.0)


class Killed(BaseException):
    """What no `except Exception` survives: the process is gone."""


def kills(build: Path, release: Release) -> ProbeResult:
    raise Killed


@dataclass(frozen=True)
class CountingLayout(Layout):
    """A registry that remembers which blobs were read."""

    read: list[str] = field(default_factory=list)

    def blob(self, sha256: str) -> Iterator[bytes]:
        self.read.append(sha256)
        return super().blob(sha256)


@dataclass
class Site:
    """A publisher, a registry and one device that runs release 1."""

    root: Path

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    @property
    def device(self) -> Path:
        return self.root / "device"

    def publish(self, seed: int, **arguments: object) -> Release:
        build = self.root / f"build-{seed}"
        if not build.exists():
            write_build(build, seed=seed)
        arguments = {"key": KEY, **arguments}
        return push(build, self.registry, "stable", **arguments).release

    def agent(self, **arguments: object) -> Agent:
        arguments = {"source": CountingLayout(self.registry), "probe": generates, **arguments}
        return Agent(
            device_dir=self.device,
            tag="stable",
            channel="stable",
            public_keys=(KEY.public_key(),),
            **arguments,
        )

    def running(self) -> str:
        """Return the digest of the release that `current` names, after hashing all of it."""
        build = (self.device / "current").resolve(strict=True)
        assert verify(build).problems == []
        return build.parent.name

    def state(self) -> State:
        return State(**json.loads((self.device / "state.json").read_text()))

    def snapshot(self) -> dict[str, tuple[int, int]]:
        entries = ((path, path.lstat()) for path in self.device.rglob("*"))
        return {str(path): (entry.st_ino, entry.st_mtime_ns) for path, entry in entries}

    def weights(self, release: Release) -> Path:
        (file,) = (file for file in release.files if file.name == "model.gguf")
        return Layout(self.registry).blob_path(file.sha256)

    def assert_nothing_half(self, *releases: Release) -> None:
        """Every file under releases/ is one that a release signed, byte for byte."""
        signed = {file.sha256 for release in releases for file in release.files}
        for path in (self.device / "releases").rglob("*"):
            if path.is_file() and path.name != "release.dsse":
                assert digest_of(path) in signed, path


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.publish(1)
    assert site.agent().check().action == "installed"
    return site


def test_a_new_release_becomes_current_and_the_old_one_stays(site: Site) -> None:
    first = site.running()
    release = site.publish(2)
    outcome = site.agent().check()
    assert outcome == Outcome(
        "installed", release, outcome.num_bytes_fetched, ProbeResult(5, 1.0, 1.0)
    )
    assert site.running() == release.digest
    assert site.state() == State(
        sequence=2, accepted=release.digest, current=release.digest, previous=first
    )
    assert (site.device / "releases" / first / "build" / "model.gguf").exists()


def test_without_news_nothing_changes_and_no_blob_is_read(site: Site) -> None:
    before = site.snapshot()
    source = CountingLayout(site.registry)
    assert site.agent(source=source).check().action == "kept"
    assert source.read == []
    assert site.snapshot() == before


def test_only_what_the_device_lacks_is_fetched(site: Site) -> None:
    release = site.publish(2)
    source = CountingLayout(site.registry)
    site.agent(source=source).check()
    names = {file.name for file in release.files if file.sha256 in source.read}
    assert names == {"model.gguf", "lineage.json"}


def test_the_same_bytes_under_a_higher_sequence_cost_no_blob(site: Site) -> None:
    release = site.publish(1)
    source = CountingLayout(site.registry)
    outcome = site.agent(source=source).check()
    assert (outcome.action, outcome.num_bytes_fetched, source.read) == ("installed", 0, [])
    assert site.running() == release.digest


def test_only_current_and_previous_are_kept(site: Site) -> None:
    releases = []
    for seed in (2, 3, 4):
        releases.append(site.publish(seed).digest)
        site.agent().check()
    assert {path.name for path in (site.device / "releases").iterdir()} == set(releases[-2:])


# Attacks ------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert path.read_bytes() != content


def lengthen(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * (3 << 20))
    assert path.read_bytes() != content


def swap_for_another_of_the_same_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert path.read_bytes() != content


BLOB_ATTACKS: dict[Callable[[Path], None], str] = {
    flip_bit: "registry gave sha256",
    truncate: "10,000 bytes of the 20,000 signed",
    lengthen: "more than the 20,000 bytes signed",
    swap_for_another_of_the_same_size: "registry gave sha256",
    Path.unlink: "cannot give blob",
}


@pytest.mark.parametrize("attack", BLOB_ATTACKS)
def test_a_blob_that_is_not_the_signed_one_is_refused(
    site: Site, attack: Callable[[Path], None]
) -> None:
    running = site.running()
    old = site.publish(1, sequence=1)
    release = site.publish(2)
    whole = site.weights(release).read_bytes()
    attack(site.weights(release))
    with pytest.raises(EdgeError, match=BLOB_ATTACKS[attack]) as caught:
        site.agent().check()
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert site.running() == running
    site.assert_nothing_half(old, release)
    site.weights(release).write_bytes(whole)
    assert site.agent().check().running == release


def test_an_endless_blob_fills_no_disk(site: Site) -> None:
    running = site.running()
    site.publish(2)
    given: list[int] = []

    @dataclass(frozen=True)
    class Endless(Layout):
        def blob(self, sha256: str) -> Iterator[bytes]:
            for _ in range(100):  # far beyond any file here; a broken bound fails, the disk lives
                given.append(1 << 16)
                yield bytes(1 << 16)

    with pytest.raises(VerificationError, match="more than"):
        site.agent(source=Endless(site.registry)).check()
    assert len(given) == 1
    assert site.running() == running


def rewrite_envelope(site: Site, envelope: bytes) -> None:
    """Put any envelope under the tag, all digests of the layout in order: a hostile registry."""
    from edge import registry

    layout = Layout(site.registry)
    (entry,) = (one for one in layout.index()["manifests"] if "annotations" in one)
    manifest = json.loads(layout.blob_path(entry["digest"].removeprefix("sha256:")).read_bytes())
    before = layout.envelope("stable")
    manifest["config"] = registry._write_document(layout, registry.ENVELOPE_TYPE, envelope)
    content = json.dumps(manifest).encode()
    fresh = registry._write_document(layout, registry.MANIFEST_TYPE, content)
    index = {"schemaVersion": 2, "manifests": [fresh | {"annotations": entry["annotations"]}]}
    (site.registry / "index.json").write_text(json.dumps(index))
    assert layout.envelope("stable") == envelope != before


def hostile_release(**changes: object) -> bytes:
    """Sign a payload with the right key that no honest ``Release`` could spell."""
    document = {
        "_type": "urn:fedge:release:v1",
        "channel": "stable",
        "sequence": 9,
        "build": "gguf:q4_k",
        "runtime": "llama.cpp",
        "files": [{"name": "lineage.json", "sha256": "ab" * 32, "size": 1}],
        "lineage": "ab" * 32,
        "probe": {"max_tokens": 4, "prompt": "hello"},
    }
    payload = json.dumps(document | changes, sort_keys=True, separators=(",", ":"))
    return sign_by_hand(payload.encode())


def traversal() -> bytes:
    files = [
        {"name": "lineage.json", "sha256": "ab" * 32, "size": 1},
        {"name": "../../../../escaped", "sha256": "cd" * 32, "size": 1},
    ]
    return hostile_release(files=files)


def altered(site: Site) -> bytes:
    envelope = json.loads(Layout(site.registry).envelope("stable"))
    payload = envelope["payload"]
    envelope["payload"] = payload[:40] + ("A" if payload[40] != "A" else "B") + payload[41:]
    return json.dumps(envelope).encode()


def signed_by_another(site: Site) -> bytes:
    release = Release(
        channel="stable",
        sequence=9,
        build="gguf:q4_k",
        runtime="llama.cpp",
        files=(ReleaseFile("lineage.json", "ab" * 32, 1),),
        lineage="ab" * 32,
    )
    return sign(release, Ed25519PrivateKey.from_private_bytes(bytes(32)))


ENVELOPE_ATTACKS: dict[str, tuple[Callable[[Site], bytes], str]] = {
    "wrong key": (signed_by_another, "pinned keys"),
    "altered payload": (altered, "altered after it was signed"),
    "altered envelope": (lambda _: b'{"payload": 1}', "envelope is damaged"),
    "other channel": (
        lambda _: hostile_release(channel="beta"),
        "this device follows channel 'stable'",
    ),
    "path traversal": (lambda _: traversal(), "does not stay inside"),
}


@pytest.mark.parametrize("attack", ENVELOPE_ATTACKS)
def test_an_envelope_that_is_not_the_publishers_is_refused(site: Site, attack: str) -> None:
    make, reason = ENVELOPE_ATTACKS[attack]
    before = site.snapshot()
    rewrite_envelope(site, make(site))
    with pytest.raises(VerificationError, match=reason) as caught:
        site.agent().check()
    assert "\n" not in str(caught.value)
    assert site.snapshot() == before
    assert not (site.root / "escaped").exists()


def test_an_older_index_is_refused_once_a_newer_was_accepted(site: Site) -> None:
    old_index = (site.registry / "index.json").read_bytes()
    release = site.publish(2)
    site.agent().check()
    assert (site.registry / "index.json").read_bytes() != old_index
    (site.registry / "index.json").write_bytes(old_index)
    before = site.snapshot()
    with pytest.raises(VerificationError, match="older than release 2, accepted before"):
        site.agent().check()
    assert site.snapshot() == before
    assert site.running() == release.digest


def test_an_older_index_is_refused_even_if_the_newer_release_did_not_arrive(site: Site) -> None:
    first = site.running()
    old_index = (site.registry / "index.json").read_bytes()
    release = site.publish(2)
    site.weights(release).unlink()
    with pytest.raises(RegistryError):
        site.agent().check()
    (site.registry / "index.json").write_bytes(old_index)
    with pytest.raises(VerificationError, match="older than release 2"):
        site.agent().check()
    assert site.running() == first


def test_the_same_sequence_with_other_content_is_refused(site: Site) -> None:
    running = site.running()
    site.publish(2, sequence=1)
    with pytest.raises(VerificationError, match="another release 1 was accepted before"):
        site.agent().check()
    assert site.running() == running


def test_a_release_whose_lineage_does_not_hold_is_not_tried_again(site: Site) -> None:
    running = site.running()
    release = site.publish(2)
    build = site.root / "build-2"
    (build / "extra.bin").write_bytes(b"not in the statement")
    digest = digest_of(build / "extra.bin")
    shutil.copy(build / "extra.bin", Layout(site.registry).blob_path(digest))
    files = (*release.files, ReleaseFile("extra.bin", digest, 20))
    forged = replace(release, sequence=3, files=files)
    rewrite_envelope(site, sign(forged, KEY))
    with pytest.raises(EdgeError, match=r"lineage does not hold.*extra\.bin"):
        site.agent().check()
    assert site.agent().check().action == "held"
    assert site.running() == running
    assert [path.name for path in (site.device / "releases").iterdir()] == [running]


# Probes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "reason"),
    [(cannot_load, "its probe failed: the model does not load$"), (says_nothing, "no tokens")],
)
def test_a_build_that_fails_its_probe_is_held_and_the_old_one_runs_on(
    site: Site, probe: Callable[[Path, Release], ProbeResult], reason: str
) -> None:
    running = site.running()
    release = site.publish(2)
    with pytest.raises(EdgeError, match=reason):
        site.agent(probe=probe).check()
    assert site.running() == running
    assert not (site.device / "releases" / release.digest).exists()
    source = CountingLayout(site.registry)
    assert site.agent(source=source).check().action == "held"
    assert source.read == []
    newer = site.publish(3)
    assert site.agent().check().running == newer


def test_a_build_that_kills_the_agent_is_given_up_after_three_attempts(site: Site) -> None:
    running = site.running()
    site.publish(2)
    for attempt in (1, 2, 3):
        with pytest.raises(Killed):
            site.agent(probe=kills).check()
        assert site.state().attempts == attempt
        assert site.running() == running
    with pytest.raises(EdgeError, match="killed the agent 3 times"):
        site.agent(probe=kills).check()
    assert site.agent(probe=kills).check().action == "held"
    newer = site.publish(3)
    assert site.agent().check().running == newer


def test_a_first_release_that_fails_leaves_a_device_without_one(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.publish(1)
    with pytest.raises(EdgeError, match="its probe failed"):
        site.agent(probe=cannot_load).check()
    assert not (site.device / "current").exists()
    assert site.agent().check() == Outcome("held", None)


@pytest.mark.parametrize(
    "fault", [ImportError("no runtime"), MemoryError(), OSError(5, "input/output error")]
)
def test_a_fault_of_the_device_is_not_held_against_the_release(
    site: Site, fault: Exception
) -> None:
    running = site.running()
    release = site.publish(2)

    def faulty(build: Path, release: Release) -> ProbeResult:
        raise fault

    for _ in range(4):  # more often than a release that kills its agent is tried
        with pytest.raises(EdgeError, match="cannot be probed on this device") as caught:
            site.agent(probe=faulty).check()
        assert "\n" not in str(caught.value)
        assert (site.state().attempts, site.state().bad) == (0, None)
        assert site.running() == running
    source = CountingLayout(site.registry)
    assert site.agent(source=source).check().running == release
    assert source.read == []


def test_a_device_without_the_runtime_keeps_the_release_for_later(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = site.publish(2)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        load_library.cache_clear()
        with pytest.raises(EdgeError, match="xllamacpp is not installed"):
            site.agent(probe=probe_build).check()
    assert site.state().bad is None
    assert site.agent().check().running == release


def test_a_file_that_no_runtime_loads_is_held_against_the_release(site: Site) -> None:
    release = site.publish(2)
    with pytest.raises(EdgeError, match="its probe failed"):
        site.agent(probe=probe_build).check()
    assert site.state().bad == release.digest


# Rollback -----------------------------------------------------------------------------------------


def test_a_rollback_returns_at_once_and_holds_what_it_left(site: Site) -> None:
    first = site.running()
    release = site.publish(2)
    site.agent().check()
    source = CountingLayout(site.root / "no such registry")
    assert site.agent(source=source).roll_back().action == "rolled back"
    assert site.running() == first
    assert site.state().sequence == 2
    assert site.state().bad == release.digest
    assert site.agent().check().action == "held"
    with pytest.raises(EdgeError, match="no previous release"):
        site.agent().roll_back()
    assert site.running() == first
    newer = site.publish(3)
    assert site.agent().check().running == newer


# Crashes, full disks, company ---------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """What kill_matrix.py needs: a device before a check and one before a rollback."""
    site = Site(tmp_path)
    generate_keys(tmp_path / "keys")
    key = read_private_key(tmp_path / "keys" / "private.pem")

    def check() -> str:
        running = replace(site.agent(), public_keys=(key.public_key(),)).check().running
        assert running is not None
        return running.digest

    site.publish(1, key=key)
    first = check()
    site.publish(2, key=key)
    second = check()
    shutil.copytree(site.device, tmp_path / "roll_back_device", symlinks=True)
    shutil.copytree(site.registry, tmp_path / "roll_back_registry")
    third = site.publish(3, key=key).digest
    shutil.copytree(site.device, tmp_path / "check_device", symlinks=True)
    shutil.copytree(site.registry, tmp_path / "check_registry")
    expected = {"check": [second, third], "roll_back": [second, first]}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    return tmp_path


@pytest.mark.parametrize("fault", ["kill", "enospc"])
def test_the_agent_survives_a_fault_at_every_change_to_the_disk(prepared: Path, fault: str) -> None:
    script = Path(__file__).with_name("kill_matrix.py")
    work = prepared / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, script, prepared, work, fault], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert cases["check"] > 25
    assert cases["roll_back"] > 5


def test_verified_files_of_a_killed_attempt_are_not_fetched_again(site: Site) -> None:
    release = site.publish(2)

    def die_late(step: str) -> None:
        if step == "fetched model.gguf":
            raise Killed

    with pytest.raises(Killed):
        site.agent(on_step=die_late).check()
    source = CountingLayout(site.registry)
    assert site.agent(source=source).check().running == release
    assert source.read == []


def test_a_half_fetched_file_that_rotted_is_fetched_again(site: Site) -> None:
    release = site.publish(2)

    def die_late(step: str) -> None:
        if step == "fetched model.gguf":
            raise Killed

    with pytest.raises(Killed):
        site.agent(on_step=die_late).check()
    flip_bit(site.device / "releases" / f".{release.digest}.tmp" / "build" / "model.gguf")
    assert site.agent().check().running == release
    assert site.running() == release.digest


def test_a_current_release_with_a_missing_file_gives_way_and_comes_back(site: Site) -> None:
    first = site.running()
    release = site.publish(2)
    site.agent().check()
    (site.device / "releases" / release.digest / "build" / "model.gguf").unlink()
    with pytest.raises(RegistryError):
        site.agent(source=Layout(site.root / "nowhere")).check()
    assert site.running() == first
    assert site.agent().check().running == release
    assert site.running() == release.digest


def test_too_little_space_is_said_before_the_first_byte(site: Site) -> None:
    running = site.running()
    site.publish(2)
    source = CountingLayout(site.registry)
    with pytest.raises(EdgeError, match="make room"):
        site.agent(source=source, free_bytes=lambda _: 10_000).check()
    assert source.read == []
    assert site.running() == running


def test_two_agents_do_not_work_on_one_device(site: Site) -> None:
    with (
        exclusive(site.device / ".lock"),
        pytest.raises(EdgeError, match="another process works in"),
    ):
        site.agent().check()


def test_a_lost_state_is_not_guessed(site: Site) -> None:
    (site.device / "state.json").unlink()
    with pytest.raises(UserError, match="restore it"):
        site.agent().check()
    (site.device / "state.json").write_text("{}}")
    with pytest.raises(UserError, match="restore it"):
        site.agent().check()


def test_a_fault_after_the_switch_names_the_release_that_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = site.publish(2)

    def fail(path: Path) -> None:
        if path == site.device and (site.device / "current").resolve().parent.name != first:
            raise OSError(5, "input/output error")

    first = site.running()
    monkeypatch.setattr("edge.agent.sync_directory", fail)
    with pytest.raises(EdgeError, match=f"`current` names release {release.digest}$"):
        site.agent().check()
    assert site.running() == release.digest


def test_a_file_that_cannot_be_deleted_stops_neither_check_nor_rollback(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site.running()
    stuck = site.device / "releases" / ("0" * 64)
    stuck.mkdir()
    delete = shutil.rmtree

    def refuse(path: Path) -> None:
        if path == stuck:
            raise PermissionError(1, "operation not permitted", str(path))
        delete(path)

    monkeypatch.setattr("edge.agent.shutil.rmtree", refuse)
    release = site.publish(2)
    steps: list[str] = []
    assert site.agent(on_step=steps.append).check().running == release
    assert f"could not delete {stuck}: operation not permitted" in steps
    site.agent().roll_back()
    assert site.running() == first


@pytest.mark.parametrize("place", ["index.json", "weights"])
def test_a_pipe_in_the_registry_does_not_keep_the_agent_waiting(site: Site, place: str) -> None:
    running = site.running()
    release = site.publish(2)
    path = site.registry / "index.json" if place == "index.json" else site.weights(release)
    path.unlink()
    os.mkfifo(path)
    script = (
        "import sys; from pathlib import Path; from edge.registry import Layout\n"
        "registry = Layout(Path(sys.argv[1]))\n"
        "list(registry.blob(sys.argv[2])) if sys.argv[2] else registry.envelope('stable')"
    )
    blob = path.name if place == "weights" else ""
    done = subprocess.run(  # in a process of its own: what waits for ever is ended
        [sys.executable, "-c", script, site.registry, blob],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "is no regular file" in done.stderr
    with pytest.raises(VerificationError, match="is no regular file"):
        site.agent().check()
    assert site.running() == running


# Decisions ----------------------------------------------------------------------------------------


def offered(sequence: int, content: int = 0) -> Release:
    return Release(
        channel="stable",
        sequence=sequence,
        build=f"build {content}",
        runtime="llama.cpp",
        files=(ReleaseFile("lineage.json", "ab" * 32, 1),),
        lineage="ab" * 32,
    )


@given(
    st.lists(
        st.tuples(
            st.integers(1, 4), st.integers(0, 1), st.sampled_from(["good", "bad", "kill", "back"])
        ),
        max_size=30,
    )
)
def test_whatever_is_offered_the_device_never_goes_back_or_runs_what_failed(
    events: list[tuple[int, int, str]],
) -> None:
    state = State()
    proved: set[str] = set()
    for sequence, content, event in events:
        release = offered(sequence, content)
        before = state
        if event == "back":
            if state.previous is not None:
                state = slots.roll_back(state)
                assert decide(state, offered(99), "stable") is Action.INSTALL
        else:
            try:
                action = decide(state, release, "stable")
            except VerificationError:
                assert release.sequence <= state.sequence
                continue
            if action is Action.GIVE_UP:
                assert state.attempts == slots.MAX_ATTEMPTS
                state = slots.reject(slots.accept(state, release))
            elif action is Action.INSTALL:
                state = slots.begin_trial(slots.accept(state, release))
                assert state.attempts <= slots.MAX_ATTEMPTS
                if event == "good":
                    state = slots.commit(state)
                    proved.add(release.digest)
                elif event == "bad":
                    state = slots.reject(state)
        assert state.sequence >= before.sequence
        assert {state.current, state.previous} <= proved | {None}
        assert state.current is None or state.current != state.previous
        assert state.bad is None or state.bad == state.accepted != state.current
        assert slots.recover(state, frozenset(proved)) == state
        assert {state.current, state.previous} - {None} <= slots.kept_releases(state)
