"""A site's trainer in secure sums, behind a real policy and ledger."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.identity import check_identity, new_identity, public_identity, read_identity
from client.ledger import LEDGER, Row, read_ledger
from client.policy import Policy
from client.policy_file import PolicyFile
from client.site_files import attempt, look
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.header import num_numbers
from federation.masking import pack, quantize
from federation.secure_messages import (
    MAX_MESSAGE_BYTES,
    SecureSumError,
    Stage,
    Terms,
    subject_of,
)
from federation.secure_sum import SecureSum
from federation.settings import SettingsError
from federation.sites import Reply, Request
from federation.wire import encode, open_update
from tests.client.policy_example import changed
from tests.client.test_cli import run as run_command
from tests.client.test_policy_file import toml_of
from tests.conftest import write_records
from tests.secure_sites import STAGES, SecureSites

RUN = "ab" * 16
TRAINING = {"num_steps": 2, "batch_size": 4, "max_tokens": 64, "dtype": "float32"}
PRIVATE = TRAINING | {"noise_multiplier": 2.0, "record_clip_norm": 0.5}
PRIVATE_LIMITS = {
    "privacy__required": True,
    "privacy__max_record_clip_norm": 1.0,
    "privacy__epsilon": 1e3,
    "privacy__delta": 1e-3,
}
TERMS: dict[str, Any] = {"cohort": 4, "threshold": 3, "clip": 4e-3, "bits": 16, "max_examples": 1}
Asks = Callable[..., Request]


def maker(tiny_model: Path, tmp_path: Path) -> Asks:
    """Return a maker of requests; the adapter is drawn from ``seed``."""

    def make(seed: int = 0, **changes: Any) -> Request:
        adapter = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="attention", seed=seed)
        path = tmp_path / f"adapter-{seed}"
        path.write_bytes(encode(adapter, dtype="float32", base_model=model_digest(tiny_model)))
        values: dict[str, Any] = {
            "server_round": 1,
            "message": path,
            "training": TRAINING,
            "trains": "B",
            "run": RUN,
            "aggregation": "alternating",
            "cohort": 4,
            "metrics": ("seconds",),
            "secure_sum": TERMS,
            "attempt": 1,
        }
        return Request(**(values | changes))

    return make


@pytest.fixture
def asks(tiny_model: Path, tmp_path: Path) -> Asks:
    return maker(tiny_model, tmp_path)


@pytest.fixture
def sites(tiny_model: Path, tmp_path: Path) -> Iterator[SecureSites]:
    with SecureSites(tiny_model, tmp_path / "sites") as made:
        yield made


def sum_of(request: Request, names: str = "abcd") -> SecureSum:
    served = open_update(request.message)
    count = num_numbers(served.shapes(), served.rank, request.trains)
    subject = subject_of(served.sha256_of_content, request.trains, request.training)
    terms = Terms(
        run=request.run,
        server_round=request.server_round,
        attempt=request.attempt,
        subject=subject,
        num_coordinates=count,
        **request.secure_sum,
    )
    return SecureSum(terms, list(names))


def run_stage(sites: SecureSites, request: Request, secure: SecureSum) -> dict[str, Reply]:
    """Ask everybody who is waited for; return the replies by site, those that are errors too."""
    message = request.message
    if secure.stage != Stage.ADVERTISE:
        message = message.with_name("stage")
        message.write_bytes(secure.request())
    asked = replace(request, stage=str(secure.stage), message=message)
    sites.send(sorted(secure.waiting), asked)
    replies = {}
    while (reply := sites.receive()) is not None:
        replies[reply.site] = reply
        if reply.update is not None:
            secure.take(reply.site, reply.update)
    return replies


def asked_alone(sites: SecureSites, request: Request, secure: SecureSum) -> Reply:
    """Ask site a what all are asked next; the sum does not take its reply in."""
    message = request.message.with_name("stage")
    message.write_bytes(secure.request())
    sites.send(["a"], replace(request, stage=str(secure.stage), message=message))
    reply = sites.receive()
    assert reply is not None
    return reply


def run_until(
    sites: SecureSites, request: Request, last: Stage | None = None, names: str = "abcd"
) -> SecureSum:
    """Run the stages before ``last``, or all."""
    secure = sum_of(request, names)
    while secure.stage is not last:
        run_stage(sites, request, secure)
        secure.close()
    return secure


def change_of(sites: SecureSites, name: str, server_round: int = 1) -> np.ndarray:
    path = sites.institutions[name].site.state / "answers" / RUN / f"{server_round}.update"
    return np.fromfile(path, "<f4")


def quantized(sites: SecureSites, name: str, weight: int = 1, most: int = 1) -> list[int]:
    """Return a site's integers, from what lies on its disk."""
    import hashlib

    change_N = change_of(sites, name)
    seed = int(hashlib.sha256(change_N.tobytes()).hexdigest(), 16)
    integers_N, _ = quantize(
        change_N,
        clip=TERMS["clip"],
        half=2**15 - 1,
        share=weight / most,
        rng=np.random.default_rng(seed),
    )
    return [*integers_N.tolist(), weight]


def rows_of(sites: SecureSites, name: str) -> list[Row]:
    return read_ledger(sites.institutions[name].site.state / LEDGER).rows


def stages_of(sites: SecureSites, name: str) -> list[tuple[str, int]]:
    """Return of each row what it is of its round, and the steps that it charges."""
    return [(row.stage, row.steps) for row in rows_of(sites, name)]


def ring_sum(vectors: list[list[int]], bits: int) -> list[int]:
    """Return the sum in the ring in plain Python integers."""
    return [sum(column) % 2**bits for column in zip(*vectors, strict=True)]


def test_the_opened_sum_is_the_plain_sum_in_the_ring_bit_for_bit(
    sites: SecureSites, asks: Asks
) -> None:
    secure = run_until(sites, asks())
    total = secure.result
    bits = total.terms.ring_bits
    elements = [int(element) % 2**bits for element in total.elements_N]
    assert elements == ring_sum([quantized(sites, name) for name in "abcd"], bits)
    assert total.sites == ("a", "b", "c", "d")


def test_weights_are_examples_up_to_the_bound_and_nobody_s_weight_is_told(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    terms = TERMS | {"max_examples": 20}
    with SecureSites(tiny_model, tmp_path / "sites", num_records=(8, 12, 16, 40)) as sites:
        secure = run_until(sites, asks(secure_sum=terms))
        weights = {"a": 8, "b": 12, "c": 16, "d": 20}
        bits = secure.result.terms.ring_bits
        elements = [int(element) % 2**bits for element in secure.result.elements_N]
        own = [quantized(sites, name, weight, 20) for name, weight in weights.items()]
        assert elements == ring_sum(own, bits)
        assert secure.result.total_examples == 56
        assert all(reply.num_examples is None for reply in sites.arrived)
        mean_N = np.average(
            [change_of(sites, name) for name in "abcd"], axis=0, weights=list(weights.values())
        )
        step = TERMS["clip"] / (2**15 - 1) * 20 / 56 * 4
        assert np.abs(secure.result.mean(0, len(mean_N)) - mean_N).max() < step


def test_nothing_that_the_server_saw_tells_a_site_s_update(sites: SecureSites, asks: Asks) -> None:
    secure = run_until(sites, asks())
    masked = {reply.site: reply.update for reply in sites.arrived if reply.stage == Stage.MASK}
    assert len(masked) == 4
    width = secure.terms.ring_bits // 8
    for name in "abcd":
        change_N = change_of(sites, name)
        # The site stores its change in no other file that leaves.
        pieces = [change_N[start : start + 8].tobytes() for start in range(0, 64, 8)]
        assert not any(piece in bytes(r.update) for r in sites.arrived for piece in pieces)
        raw = np.frombuffer(masked[name][32:], np.uint8).reshape(-1, width)
        # Bytes are uniform: chi-square of 256 values, 255 degrees of freedom, far beyond 5 sigma.
        counts = np.bincount(raw.ravel(), minlength=256)
        expected = raw.size / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 255 + 6 * np.sqrt(2 * 255)
        own = np.array(quantized(sites, name)) % 2 ** (8 * width)
        seen = sum(raw[:, byte].astype(np.int64) << (8 * byte) for byte in range(width))
        assert np.count_nonzero(seen == own) <= 2
        assert abs(np.corrcoef(seen, own)[0, 1]) < 6 / np.sqrt(len(own))


def test_trainers_that_are_killed_between_all_stages_give_the_same_sum(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    sums = []
    for restarts in (set(), set(STAGES)):
        with SecureSites(tiny_model, tmp_path / f"sites-{len(restarts)}") as sites:
            sites.restarts = restarts
            secure = run_until(sites, asks())
            sums.append(pack(secure.result.elements_N, secure.result.terms.ring_bits))
            assert [row.stage for row in rows_of(sites, "a")] == ["trained", "secure"]
    assert sums[0] == sums[1]


def test_a_round_is_trained_and_charged_once_however_many_attempts_it_takes(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    with SecureSites(tiny_model, tmp_path / "sites", **PRIVATE_LIMITS) as sites:
        run_until(sites, asks(training=PRIVATE), Stage.AGREE)
        first = change_of(sites, "a")
        assert stages_of(sites, "a") == [("trained", 2), ("secure", 0)]
        second = run_until(sites, asks(training=PRIVATE, attempt=2))
        assert second.result.sites == ("a", "b", "c", "d")
        assert np.array_equal(change_of(sites, "a"), first)
        # Other bytes left, of the same noisy update: noted, and not charged again.
        assert stages_of(sites, "a") == [("trained", 2), ("secure", 0), ("secure", 0)]
        trained, *masked = rows_of(sites, "a")
        assert masked[0].sha256 != masked[1].sha256
        assert trained.epsilon == masked[0].epsilon == masked[1].epsilon is not None
        seen = [r for r in sites.arrived if (r.site, r.stage) == ("a", Stage.MASK)]
        assert [len(r.update) for r in seen] == [row.num_bytes for row in masked]
        assert (trained.num_bytes, trained.metrics) == (0, {})


def test_a_masked_vector_that_a_kill_kept_from_the_ledger_is_in_it_before_it_leaves(
    tiny_model: Path, tmp_path: Path, asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.ledger import Ledger

    def die(*_: object) -> None:
        raise SystemExit

    with SecureSites(tiny_model, tmp_path / "sites", **PRIVATE_LIMITS) as sites:
        request = asks(training=PRIVATE)
        secure = run_until(sites, request, Stage.MASK)
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(Ledger, "append", die)
            run_stage(sites, request, secure)
        assert stages_of(sites, "a") == [("trained", 2)]
        vector = sites.institutions["a"].site.state / "secure" / f"run-{RUN}" / "masked"
        before = vector.read_bytes()
        sites.restarts = {Stage.MASK}
        replies = run_stage(sites, request, secure)
        assert replies["a"].update == before
        assert stages_of(sites, "a") == [("trained", 2), ("secure", 0)]


def test_a_private_round_that_fails_is_charged_once_and_ends_this_sites_part_in_the_sum(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    wild = {"learning_rate": 1e18, "weight_decay": 1e18, "num_steps": 3}
    limits = PRIVATE_LIMITS | {"training__max_learning_rate": 1e18}
    with SecureSites(tiny_model, tmp_path / "sites", **limits) as sites:
        for attempt in (1, 2):
            request = asks(training=PRIVATE | wild, attempt=attempt)
            secure = sum_of(request)
            replies = run_stage(sites, request, secure)
            assert errors(replies) == {
                "error 1001: the site failed in this private round; its own log says why"
            }
            assert stages_of(sites, "a") == [("failed", 3)]
        assert sites.institutions["a"].count("private_round_failed") == 1


def errors(replies: dict[str, Reply]) -> set[str]:
    return {reply.error or "" for reply in replies.values()}


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"aggregation__min_cohort": 4}, "aggregation.min_cohort"),
        ({"aggregation__cohort": []}, "aggregation.cohort"),
        ({"aggregation__kinds": ["factors"]}, "aggregation.kinds"),
        ({"traffic__max_round_bytes": 100}, "traffic.max_round_bytes"),
        ({"privacy__required": True}, "privacy.required"),
        ({"metrics__allowed": []}, "metrics.allowed"),
    ],
)
def test_a_policy_refuses_the_first_stage_and_nothing_is_trained(
    tiny_model: Path, tmp_path: Path, asks: Asks, limits: dict[str, Any], sentence: str
) -> None:
    with SecureSites(tiny_model, tmp_path / "sites", **limits) as sites:
        replies = run_stage(sites, asks(), sum_of(asks()))
        assert all(sentence in reason for reason in errors(replies))
        assert not list((tmp_path / "sites").glob("*/state/answers/*/*"))
        assert rows_of(sites, "a") == []


def test_a_policy_that_became_stricter_ends_a_site_s_part_between_the_stages(
    sites: SecureSites, asks: Asks
) -> None:
    secure = run_until(sites, asks(), Stage.MASK)
    site = sites.institutions["b"]
    site.stop()
    rules = changed(site.policy.model_dump(by_alias=True), traffic__max_run_bytes=1)
    site.policy = Policy.model_validate(rules)
    replies = run_stage(sites, asks(), secure)
    assert "traffic.max_run_bytes" in (replies["b"].error or "")
    secure.drop("b")
    secure.close()
    assert stages_of(sites, "b") == [("trained", 2)]


def test_a_member_that_a_policy_does_not_list_gets_no_share(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    with SecureSites(tiny_model, tmp_path / "sites") as sites:
        stranger = sites.institutions["d"]
        stranger.identity = Ed25519PrivateKey.generate()
        secure = run_until(sites, asks(), Stage.SHARE)
        replies = run_stage(sites, asks(), secure)
        others = errors({name: replies[name] for name in "abc"})
        assert all("is not one of the 4 that this site's policy lists" in one for one in others)


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("was_listed", [True, False])
def test_a_member_that_is_struck_from_the_policy_s_file_gets_nothing_more(
    stage: Stage, was_listed: bool, sites: SecureSites, asks: Asks, tmp_path: Path
) -> None:
    site, path = sites.institutions["a"], tmp_path / "policy.toml"
    tree = site.policy.model_dump(mode="json", by_alias=True, exclude={"quiet_hours"})
    tree = tree if was_listed else changed(tree, aggregation__cohort=["any"])
    path.write_text(toml_of(tree))
    site.policy_file = PolicyFile(path, site.say, sleep=lambda _: None)
    secure = run_until(sites, asks(), stage)
    # As many as before: only who they are is another.
    others = [public_identity(sites.institutions[name].identity) for name in "bc"]
    path.write_text(toml_of(changed(tree, aggregation__cohort=[*others, "e" * 64])))
    before = len(stages_of(sites, "a"))
    for _ in range(2):  # asked again it is no different
        reply = asked_alone(sites, asks(), secure)
        assert reply.update is None
        assert "is not one of the 4 that this site's policy lists" in (reply.error or "")
    assert len(stages_of(sites, "a")) == before


def test_shares_that_are_on_disk_stay_there_when_a_member_is_struck(
    sites: SecureSites, asks: Asks, tmp_path: Path
) -> None:
    site, path = sites.institutions["a"], tmp_path / "policy.toml"
    tree = site.policy.model_dump(mode="json", by_alias=True, exclude={"quiet_hours"})
    path.write_text(toml_of(tree))
    site.policy_file = PolicyFile(path, site.say, sleep=lambda _: None)
    secure = run_until(sites, asks(), Stage.SHARE)
    assert asked_alone(sites, asks(), secure).error is None
    path.write_text(toml_of(changed(tree, aggregation__cohort=["e" * 64, "f" * 64])))
    again = asked_alone(sites, asks(), secure)
    assert again.update is None
    assert "that this site's policy lists" in (again.error or "")


def test_a_site_without_an_identity_takes_part_in_no_secure_sum(
    sites: SecureSites, asks: Asks
) -> None:
    sites.institutions["a"].identity = None
    replies = run_stage(sites, asks(), sum_of(asks()))
    assert "this site has no identity for secure sums" in (replies["a"].error or "")
    assert replies["b"].error is None


def test_a_plain_question_is_refused_where_a_secure_sum_is_required_or_was_answered(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    plain = replace(asks(), secure_sum=None, attempt=0, cohort=4)
    with SecureSites(tiny_model, tmp_path / "one") as sites:
        sites.send(["a"], plain)
        assert "aggregation.secure_sum_required" in (sites.receive().error or "")
    is_open = {"aggregation__secure_sum_required": False}
    with SecureSites(tiny_model, tmp_path / "two", **is_open) as sites:
        run_until(sites, asks())
        sites.send(["a"], plain)
        assert "replay" in (sites.receive().error or "")
        sites.send(["a"], replace(asks(), stage="", attempt=0))
        assert "says an empty stage" in (sites.receive().error or "")
        assert stages_of(sites, "a") == [("trained", 2), ("secure", 0)]


def test_another_adapter_other_terms_and_an_older_attempt_are_refused(
    sites: SecureSites, asks: Asks
) -> None:
    run_until(sites, asks(attempt=2), Stage.AGREE)
    for request, sentence in [
        (asks(seed=1, attempt=3), "replay"),
        (asks(attempt=3, secure_sum=TERMS | {"clip": 1e-3}), "replay"),
        (asks(attempt=3, training=TRAINING | {"num_steps": 1}), "replay"),
        (asks(attempt=1), "expected a higher number"),
    ]:
        replies = run_stage(sites, request, sum_of(request))
        assert all(sentence in reason for reason in errors(replies)), errors(replies)


def test_a_stage_is_answered_only_on_the_terms_of_the_first(sites: SecureSites, asks: Asks) -> None:
    secure = run_until(sites, asks(), Stage.SHARE)
    for request in (
        asks(training=TRAINING | {"num_steps": 1}),
        asks(secure_sum=TERMS | {"threshold": 4}),
        asks(server_round=2),
    ):
        replies = run_stage(sites, request, secure)
        assert all("begin with stage advertise" in one for one in errors(replies))
    assert all(one.update is not None for one in run_stage(sites, asks(), secure).values())


def test_a_site_that_helped_to_open_a_sum_refuses_another_attempt_of_the_round(
    sites: SecureSites, asks: Asks
) -> None:
    run_until(sites, asks())
    again = asks(attempt=2)
    replies = run_stage(sites, again, sum_of(again))
    assert all("helped to open the sum of round 1" in reason for reason in errors(replies))


def test_records_that_changed_since_the_training_end_a_site_s_part(
    sites: SecureSites, asks: Asks
) -> None:
    from client.round import site_records

    secure = run_until(sites, asks(), Stage.MASK)
    site = sites.institutions["c"]
    site.stop()
    write_records(site.site.data, 20, topic="other")
    site_records.cache_clear()
    replies = run_stage(sites, asks(), secure)
    assert "records changed since it trained this round" in (replies["c"].error or "")
    again = asks(attempt=2)
    replies = run_stage(sites, again, sum_of(again))
    assert "records changed since it trained this round" in (replies["c"].error or "")
    assert stages_of(sites, "c") == [("trained", 2)]


def test_a_site_of_a_lower_rank_takes_no_part(sites: SecureSites, asks: Asks) -> None:
    each = sites.institutions["a"]
    each.site = replace(each.site, rank=2)
    replies = run_stage(sites, asks(), sum_of(asks()))
    assert "trains rank 2 of 4" in (replies["a"].error or "")


def test_what_is_no_stage_of_a_secure_sum_is_answered_with_an_error(
    sites: SecureSites, asks: Asks
) -> None:
    secure = sum_of(asks())
    sites.send(["a"], replace(asks(), stage="share"))
    assert "begin with stage advertise" in (sites.receive().error or "")
    assert all(r.update is not None for r in run_stage(sites, asks(), secure).values())
    secure.close()
    sites.send(["a"], replace(asks(), stage="share"))  # the adapter in the place of a roster
    assert sites.receive().update is None
    with pytest.raises(SecureSumError):
        secure.take("a", b"")
    huge = asks().message.with_name("huge")
    huge.write_bytes(bytes(MAX_MESSAGE_BYTES + 1))
    sites.send(["a"], replace(asks(), stage="share", message=huge))
    assert f"expected at most {MAX_MESSAGE_BYTES}" in (sites.receive().error or "")


def test_the_command_makes_an_identity_and_prints_the_same_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = dict.fromkeys(("root_certificate", "node_key", "base_model", "data"), "x")
    values |= {"superlink": "localhost:1", "policy": "policy.toml", "state": "state"}
    config = tmp_path / "site.toml"
    config.write_text("".join(f'{name} = "{value}"\n' for name, value in values.items()))
    assert run_command(monkeypatch, "identity", "--config", config) == 0
    first = capsys.readouterr().out.strip()
    assert first == public_identity(read_identity(tmp_path / "state" / "identity"))
    assert run_command(monkeypatch, "identity", "--config", config, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"identity": first}


def test_the_doctor_says_whether_a_site_can_be_in_a_secure_sum(tmp_path: Path) -> None:
    def found(cohort: list[str], *, is_required: bool = True) -> tuple[str, str]:
        policy = Policy.model_validate(
            {"aggregation": {"cohort": cohort, "secure_sum_required": is_required}}
        )
        public = attempt(lambda: public_identity(read_identity(path)))
        check = check_identity(look(path), public, policy, is_named=False)
        assert check.fix or check.level in ("ok", "skip")
        return check.level, check.found

    path, other = tmp_path / "identity", "a" * 64
    assert found([]) == ("warn", "none, and the policy requires secure sums")
    assert found([], is_required=False)[0] == "ok"
    public = public_identity(new_identity(path))
    assert found([])[1] == "no other site is listed"
    assert found(["any"])[0] == "warn"
    assert found([other]) == ("ok", f"{public[:16]}…, 1 sites listed")
    path.chmod(0o644)
    assert found([other])[1].startswith("mode 0644")
    path.write_text("no key")
    assert found([other])[0] == "fail"


def test_an_identity_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity"
    key = new_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch("[0-9a-f]{64}", public_identity(key))
    assert public_identity(read_identity(path)) == public_identity(key)
    with pytest.raises(SettingsError, match="exists already"):
        new_identity(path)
    path.write_text("not a key")
    with pytest.raises(SettingsError, match="holds no unencrypted Ed25519 key"):
        read_identity(path)
