import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import secure_sum as site_half
from federation.masking import ring_dtype, unpack
from federation.secure_keys import own_mask, pair_mask
from federation.secure_messages import (
    Advertisement,
    Agreements,
    Revealed,
    Roster,
    Sealed,
    SecureSumError,
    Stage,
    Survivors,
    advertised_bytes,
    read,
    sealed_context,
    session_of,
    subject_of,
    write,
)
from federation.secure_sum import SecureSum
from federation.settings import default_threshold
from federation.shamir import join
from tests.secure_cohort import LENGTH, STAGES, Cohort, terms_of


def survivors_of(cohort: Cohort, silent: dict[str, Stage]) -> list[str]:
    """Return whose vector came: those that were not silent up to and with the stage ``mask``."""
    limit = STAGES.index(Stage.MASK)
    return [n for n in cohort.sites if n not in silent or STAGES.index(silent[n]) > limit]


def assert_outcome(size: int, threshold: int, silent: dict[str, Stage]) -> None:
    """Run an attempt: the exact sum of the survivors, or a clear abort with nothing revealed."""
    cohort = Cohort(size, threshold)
    if size - len(silent) >= threshold:
        assert cohort.sum(silent) == cohort.plain_sum(survivors_of(cohort, silent))
        assert cohort.server.result.total_examples == len(survivors_of(cohort, silent))
        return
    left = size
    for failing in STAGES:
        left -= sum(stage == failing for stage in silent.values())
        if left < threshold:
            break
    with pytest.raises(
        SecureSumError, match=f"{left} sites answered in stage {failing}, {threshold} are needed"
    ):
        cohort.sum(silent)
    assert_nothing_revealed(cohort)


def assert_nothing_revealed(cohort: Cohort) -> None:
    """Check that of every secret the server holds fewer shares than the threshold."""
    revealed = [read(Revealed, raw) for raw in cohort.arrived[Stage.REVEAL].values()]
    assert len(revealed) < cohort.terms.threshold
    with pytest.raises(SecureSumError, match="not open"):
        _ = cohort.server.result
    with pytest.raises(SecureSumError, match="is over"):
        cohort.server.request()


@pytest.mark.parametrize("size", range(3, 9))
def test_the_sum_is_the_plain_sum_of_the_ring_bit_for_bit(size: int) -> None:
    cohort = Cohort(size, default_threshold(size))
    assert cohort.sum() == cohort.plain_sum(cohort.sites)


@pytest.mark.parametrize(("size", "threshold"), [(3, 2), (4, 3), (5, 3)])
@pytest.mark.parametrize("stage", STAGES)
def test_every_set_of_sites_may_drop_out_at_every_stage(
    size: int, threshold: int, stage: Stage
) -> None:
    names = [f"s{n}" for n in range(size)]
    for count in range(1, size + 1):
        for gone in itertools.combinations(names, count):
            assert_outcome(size, threshold, dict.fromkeys(gone, stage))


@pytest.mark.parametrize(
    ("size", "threshold"), [(3, 2), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_every_way_in_which_few_sites_may_drop_out_is_exact_or_a_clear_abort(
    size: int, threshold: int
) -> None:
    for stages in itertools.product([None, *STAGES], repeat=size):
        silent = {f"s{n}": stage for n, stage in enumerate(stages) if stage is not None}
        assert_outcome(size, threshold, silent)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_sites_of_larger_cohorts_drop_out_at_mixed_stages(data: st.DataObject) -> None:
    size = data.draw(st.integers(4, 8))
    threshold = data.draw(st.integers(size // 2 + 1, size))
    names = st.sampled_from([f"s{n}" for n in range(size)])
    assert_outcome(
        size, threshold, data.draw(st.dictionaries(names, st.sampled_from(STAGES), max_size=size))
    )


def test_the_order_of_arrival_changes_nothing() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.MASK)
    vectors = {name: site.masked(request) for name, site in cohort.sites.items()}
    for name in sorted(vectors, reverse=True):
        cohort.server.take(name, vectors[name])
    cohort.server.close()
    assert cohort.sum() == cohort.plain_sum(cohort.sites)


def test_the_number_of_examples_weighs_and_is_itself_only_known_as_a_sum() -> None:
    rng = np.random.default_rng(7)
    cohort = Cohort(4, 3, clip=0.01, bits=16, max_examples=1000)
    counts = {"s0": 1000, "s1": 1, "s2": 333, "s3": 5000}  # the last one counts as 1000
    for name, site in cohort.sites.items():
        site.values = rng.uniform(-0.01, 0.01, LENGTH)
        site.num_examples = counts[name]
    cohort.sum({"s2": Stage.MASK})
    weights = np.array([1000.0, 1.0, 1000.0])
    values = np.stack([cohort.sites[name].values for name in ("s0", "s1", "s3")])
    expected = weights @ values / weights.sum()
    result = cohort.server.result
    assert result.total_examples == 2001
    assert result.sites == ("s0", "s1", "s3")
    # Each of the three roundings is off by less than one level, of which the mean has 2001.
    level = 0.01 / 32767 * 1000 / 2001
    assert np.abs(result.mean(0, LENGTH) - expected).max() < 3 * level
    assert np.array_equal(result.mean(5, 3), result.mean(0, LENGTH)[5:8])


def _identity(cohort: Cohort, name: str) -> str:
    return cohort.sites[name].member.identity.public_key().public_bytes_raw().hex()


def chi_square(sample: bytes) -> float:
    """Return the standardised chi-square statistic of the bytes against the uniform law."""
    counts = np.bincount(np.frombuffer(sample, np.uint8), minlength=256)
    expected = len(sample) / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - 255) / math.sqrt(2 * 255)


def test_a_masked_vector_looks_uniform_to_a_server_with_all_but_two_of_the_sites() -> None:
    cohort = Cohort(5, 4, num_coordinates=60_000)
    for site in cohort.sites.values():
        site.values = np.zeros(60_000)  # the least random vector there is
    sealed = read(Sealed, cohort.until(Stage.MASK))
    cohort.run_stage()
    roster = read(Roster, cohort.sites["s0"].held.requests[Stage.SHARE].encode())
    places = {one.identity: place for place, one in enumerate(roster.advertisements)}
    victim = places[_identity(cohort, "s0")]
    raw = cohort.arrived[Stage.MASK]["s0"][32:]
    seen = unpack(raw, cohort.terms.ring_bits)
    context = sealed_context(roster, sealed)
    for name in ("s2", "s3", "s4"):  # these tell the server the keys of their masks
        site = cohort.sites[name]
        private = site_half._private(site.held.secrets.mask_key)
        key = roster.advertisements[victim].mask_key
        other = places[_identity(cohort, name)]
        pair_mask(private, victim, other, key, context, undo=True).apply(seen)
    assert abs(chi_square(raw)) < 5
    assert abs(chi_square(seen.astype(ring_dtype(cohort.terms.ring_bits)).tobytes())) < 5
    # The oracle: with the last site's mask and the own one there is nothing left but zeros.
    last = site_half._private(cohort.sites["s1"].held.secrets.mask_key)
    key = roster.advertisements[victim].mask_key
    pair_mask(last, victim, places[_identity(cohort, "s1")], key, context, undo=True).apply(seen)
    assert abs(chi_square(seen.tobytes())) < 5
    seed = bytes.fromhex(cohort.sites["s0"].held.secrets.seed)
    own_mask(seed, victim, context, undo=True).apply(seen)
    assert not seen[:60_000].any()


def test_an_aborted_attempt_leaves_the_server_with_less_than_it_needs_for_any_secret() -> None:
    cohort = Cohort(5, 4)
    with pytest.raises(SecureSumError, match="3 sites answered in stage reveal, 4 are needed"):
        cohort.sum({"s0": Stage.REVEAL, "s1": Stage.REVEAL})
    revealed = [read(Revealed, raw) for raw in cohort.arrived[Stage.REVEAL].values()]
    assert len(revealed) == 3
    assert len(cohort.server._elements_N) == 0


def test_a_late_or_unasked_reply_is_not_summed() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.MASK)
    vector = cohort.sites["s0"].masked(request)
    cohort.server.take("s0", vector)
    for name in ("s0", "nobody"):
        with pytest.raises(SecureSumError, match="not waited for"):
            cohort.server.take(name, vector)
    assert cohort.sum() == cohort.plain_sum(cohort.sites)


@pytest.mark.parametrize(
    ("stage", "spoil", "reason"),
    [
        (Stage.ADVERTISE, lambda raw: raw[:-20] + b"0" * 16 + raw[-4:], "did not sign"),
        (Stage.ADVERTISE, lambda _: b"\xff", "Advertisement"),
        (Stage.SHARE, lambda raw: raw[:-200] + b"]}", "SealedShares"),
        (Stage.MASK, lambda raw: raw[:-1], "bytes: expected"),
        (Stage.MASK, lambda raw: bytes(32) + raw[32:], "something else than was asked"),
        (Stage.AGREE, lambda raw: raw[:-20] + b"0" * 16 + raw[-4:], "did not sign"),
        (Stage.REVEAL, lambda _: b"{}", "Revealed, context"),
    ],
)
def test_a_site_with_a_spoiled_reply_has_dropped_out(stage, spoil, reason) -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(stage)
    reply = cohort.sites["s1"].answer(stage, request, cohort.terms)
    with pytest.raises(SecureSumError, match=reason):
        cohort.server.take("s1", spoil(reply))
    assert "s1" not in cohort.server.waiting
    is_in = STAGES.index(stage) > STAGES.index(Stage.MASK)
    expected = cohort.plain_sum([name for name in cohort.sites if is_in or name != "s1"])
    assert cohort.sum() == expected


def test_a_site_that_copies_the_keys_of_another_is_left_out() -> None:
    cohort = Cohort(4, 3)
    cohort.until(Stage.ADVERTISE)
    copied = read(Advertisement, cohort.sites["s0"].answer(Stage.ADVERTISE, b"", cohort.terms))
    cohort.server.take("s0", write(copied))
    with pytest.raises(SecureSumError, match="of another site"):
        cohort.server.take("s1", write(copied))


def test_a_key_with_which_nothing_is_secret_is_left_out() -> None:
    cohort = Cohort(4, 3)
    site = cohort.sites["s0"]
    given = read(Advertisement, site.answer(Stage.ADVERTISE, b"", cohort.terms))
    weak = given.model_copy(update={"mask_key": "00" * 32})
    signature = site.member.identity.sign(advertised_bytes(weak)).hex()
    with pytest.raises(SecureSumError, match="low order"):
        cohort.server.take("s0", write(weak.model_copy(update={"signature": signature})))


def test_what_a_site_holds_does_not_print_its_secrets() -> None:
    cohort = Cohort(4, 3)
    cohort.until(Stage.MASK)
    held = cohort.sites["s0"].held
    shown = repr(held) + str(held)
    assert not any(secret in shown for secret in held.secrets.model_dump().values())


@pytest.mark.parametrize(("added", "total"), [(100, 104), (-1, 3), (-104, -100)])
def test_a_sum_with_an_impossible_number_of_examples_is_refused(added: int, total: int) -> None:
    cohort = Cohort(4, 3)

    def add_to_last(raw: bytes) -> bytes:
        last = (int.from_bytes(raw[-2:], "little") + added) % 2**16
        return raw[:-2] + last.to_bytes(2, "little")

    with pytest.raises(SecureSumError, match=f"add up to {total}, expected 4 to 4"):
        cohort.sum(spoil={("s0", Stage.MASK): add_to_last})


def test_a_sum_beyond_what_sites_that_clip_can_reach_is_refused() -> None:
    """A site that lies within the width of the ring would own the mean."""
    cohort = Cohort(4, 3)

    def add_to_one(raw: bytes) -> bytes:
        number = (int.from_bytes(raw[-4:-2], "little") + 2000) % 2**16  # before the examples
        return raw[:-4] + number.to_bytes(2, "little") + raw[-2:]

    with pytest.raises(SecureSumError, match="levels, and sites that clip reach 512 together"):
        cohort.sum(spoil={("s0", Stage.MASK): add_to_one})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cohort": 2, "threshold": 2}, "cohort"),
        ({"cohort": 65, "threshold": 64}, "cohort"),
        ({"threshold": 2}, "more than half"),
        ({"threshold": 5}, "at most all"),
        ({"clip": float("nan")}, "clip"),
        ({"clip": 0.0}, "clip"),
        ({"bits": 33}, "bits"),
        ({"subject": "x"}, "subject"),
    ],
)
def test_terms_that_protect_nobody_are_no_terms(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        terms_of(**({"cohort": 4, "threshold": 3} | changes))


def test_the_server_asks_as_many_sites_as_the_terms_say() -> None:
    for sites in (["a"], ["a", "a", "b"], list("abcde")):
        with pytest.raises(ValueError, match="expected 3 to 4"):
            SecureSum(terms_of(4, 3), sites)


def test_the_subject_names_adapter_factor_and_settings() -> None:
    subject = subject_of("ab", "B", {"num_steps": 8, "seed": 0})
    assert subject == subject_of("ab", "B", {"seed": 0, "num_steps": 8})
    others = [("ab", "A", {}), ("a", "bB", {}), ("ab", "B", {"num_steps": 9, "seed": 0})]
    assert len({subject, *(subject_of(*other) for other in others)}) == 4


# What an active server may try. Each is one change of what it sends; the sites refuse.


def refused(cohort: Cohort, stage: Stage, request: bytes, reason: str, name: str = "s0") -> None:
    held = cohort.sites[name].held
    with pytest.raises(SecureSumError, match=reason):
        cohort.sites[name].answer(stage, request, cohort.terms)
    assert cohort.sites[name].held == held


def changed(kind: type, raw: bytes, **changes: object) -> bytes:
    return write(read(kind, raw).model_copy(update=changes))


def test_the_server_cannot_tell_two_sites_two_lists_of_survivors() -> None:
    cohort = Cohort(4, 3)
    cohort.until(Stage.AGREE)
    session, names = session_of(cohort.terms), {p: n for n, p in cohort.places().items()}
    told = {0: (0, 1, 2), 1: (0, 1, 3), 2: (0, 1, 2), 3: (0, 1, 3)}
    signatures = {}
    for place, members in told.items():
        asked = write(Survivors(session=session, members=members))
        answer = cohort.sites[names[place]].answer(Stage.AGREE, asked, cohort.terms)
        signatures[place] = json.loads(answer)["signature"]
    for place, signers in told.items():
        agreements = Agreements(
            session=session, signers=signers, signatures=tuple(signatures[s] for s in signers)
        )
        refused(cohort, Stage.REVEAL, write(agreements), "not over the list", names[place])


def test_the_server_cannot_send_a_second_list_of_survivors() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.AGREE)
    cohort.run_stage()
    place = cohort.places()["s0"]
    fewer = tuple(n for n in range(4) if n != (place + 1) % 4)
    refused(cohort, Stage.AGREE, changed(Survivors, request, members=fewer), "another request")


def test_the_server_cannot_open_a_sum_of_too_few() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.AGREE)
    place = cohort.places()["s0"]
    two = tuple(sorted((place, (place + 1) % 4)))
    refused(cohort, Stage.AGREE, changed(Survivors, request, members=two), "2 survivors")
    others = tuple(n for n in range(4) if n != place)
    refused(cohort, Stage.AGREE, changed(Survivors, request, members=others), "not among")
    for members in ((place, place, place), (0, 1, 2, 3, 4)):
        refused(cohort, Stage.AGREE, changed(Survivors, request, members=members), "survivors are")


def test_the_server_cannot_do_with_too_few_signatures_or_one_twice() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.REVEAL)
    given = read(Agreements, request)
    for places in ((0, 1), (0, 0, 0), (1, 0, 2)):
        request = write(
            given.model_copy(
                update={
                    "signers": places,
                    "signatures": tuple(given.signatures[place] for place in places),
                }
            )
        )
        refused(cohort, Stage.REVEAL, request, "signers")
    request = write(given.model_copy(update={"signatures": given.signatures[:3]}))
    refused(cohort, Stage.REVEAL, request, "not over the list")


def test_the_server_cannot_name_a_survivor_that_never_shared() -> None:
    cohort = Cohort(4, 3)
    cohort.until(Stage.SHARE)
    cohort.run_stage({"s3": Stage.SHARE})
    cohort.server.close()
    request = cohort.until(Stage.AGREE)
    everyone = changed(Survivors, request, members=(0, 1, 2, 3))
    refused(cohort, Stage.AGREE, everyone, "survivors are")


def test_the_server_cannot_swap_a_key() -> None:
    cohort = Cohort(4, 3)
    roster = read(Roster, cohort.until(Stage.SHARE))
    own = cohort.places()["s0"]
    for place in range(4):
        members = list(roster.advertisements)
        members[place] = members[place].model_copy(update={"mask_key": "12" * 32})
        request = write(roster.model_copy(update={"advertisements": tuple(members)}))
        refused(cohort, Stage.SHARE, request, "did not sign|does not hold")
        del members[own]
        request = write(roster.model_copy(update={"advertisements": tuple(members)}))
        refused(cohort, Stage.SHARE, request, "did not sign|does not hold")


def test_the_server_cannot_play_a_site_that_the_policy_does_not_list() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.SHARE)
    site = cohort.sites["s0"]
    listed = frozenset(sorted(site.member.identities)[:2]) | {_identity(cohort, "s0")}
    site.member = dataclasses.replace(site.member, identities=listed)
    refused(cohort, Stage.SHARE, request, "policy lists")
    site.member = dataclasses.replace(site.member, identities=frozenset())
    assert site.answer(Stage.SHARE, request, cohort.terms)


def test_the_server_cannot_mix_two_rounds() -> None:
    one, other = Cohort(4, 3), Cohort(4, 3, server_round=2)
    for stage in STAGES[1:]:
        request = other.until(stage)
        one.until(stage)
        refused(one, stage, request, "another attempt|other terms")
        renamed = json.loads(request) | {"session": session_of(one.terms)}
        if stage == Stage.SHARE:  # what is inside belongs to the other round all the same
            refused(one, stage, json.dumps(renamed).encode(), "other terms")


def test_shares_of_another_round_cannot_be_opened() -> None:
    one, other = Cohort(4, 4), Cohort(4, 4, server_round=2)
    foreign = read(Sealed, other.until(Stage.MASK)).sealed
    request = changed(Sealed, one.until(Stage.MASK), sealed=foreign)
    for name in sorted(one.server.waiting):
        reply = one.sites[name].answer(Stage.MASK, request, one.terms)
        with pytest.raises(SecureSumError, match="something else than was asked"):
            one.server.take(name, reply)


def test_sites_that_were_shown_different_senders_share_no_mask() -> None:
    cohort = Cohort(4, 3)
    sealed = read(Sealed, cohort.until(Stage.MASK))
    place = cohort.places()["s0"]
    gone = (place + 1) % 4
    fewer = sealed.model_copy(
        update={
            "senders": tuple(s for s in sealed.senders if s != gone),
            "sealed": tuple(x for s, x in enumerate(sealed.sealed) if s != gone),
        }
    )
    vectors = [cohort.sites["s0"].masked(write(fewer))]
    vectors += [cohort.sites[name].masked(write(sealed)) for name in ("s1", "s2", "s3")]
    ring = sum(unpack(vector[32:], cohort.terms.ring_bits).astype(np.uint64) for vector in vectors)
    for name, view in [("s0", fewer), *((n, sealed) for n in ("s1", "s2", "s3"))]:
        seed = bytes.fromhex(cohort.sites[name].held.secrets.seed)
        roster = read(Roster, cohort.sites[name].held.requests[Stage.SHARE].encode())
        piece = np.zeros(LENGTH + 1, np.uint16)
        context = sealed_context(roster, view)
        own_mask(seed, cohort.places()[name], context, undo=True).apply(piece)
        ring = ring + piece
    masked = (ring % 2**16).astype("<u2")[:LENGTH].tobytes()
    assert masked != cohort.plain_sum(cohort.sites)


def test_a_stage_is_asked_in_order_and_once() -> None:
    cohort = Cohort(4, 3)
    request = cohort.until(Stage.SHARE)
    refused(cohort, Stage.REVEAL, request, "reveal is asked, and share comes next")
    cohort.run_stage()
    again = cohort.sites["s0"].answer(Stage.SHARE, request, cohort.terms)
    assert again == cohort.arrived[Stage.SHARE]["s0"]
    smaller = read(Roster, request).advertisements[:3]
    refused(
        cohort, Stage.SHARE, changed(Roster, request, advertisements=smaller), "another request"
    )


def test_of_each_member_a_site_reveals_the_one_share_that_is_needed() -> None:
    cohort = Cohort(4, 3)
    cohort.until(Stage.REVEAL)
    keys = {name: cohort.sites[name].held.secrets for name in cohort.sites}
    cohort.run_stage({"s0": Stage.REVEAL})
    revealed = [read(Revealed, raw).shares for raw in cohort.arrived[Stage.REVEAL].values()]
    holders = [cohort.places()[name] + 1 for name in cohort.arrived[Stage.REVEAL]]
    for name, place in cohort.places().items():
        shares = {h: bytes.fromhex(r[place]) for h, r in zip(holders, revealed, strict=True)}
        assert join(shares).hex() == keys[name].seed
    assert all(cohort.sites[name].held.secrets is None for name in ("s1", "s2", "s3"))


def test_of_a_member_that_dropped_out_the_key_of_its_masks_is_revealed_and_not_its_seed() -> None:
    cohort = Cohort(4, 3)
    cohort.sum({"s3": Stage.MASK})
    place, gone = cohort.places()["s3"], cohort.sites["s3"].held.secrets
    shares = {
        cohort.places()[name] + 1: bytes.fromhex(read(Revealed, raw).shares[place])
        for name, raw in cohort.arrived[Stage.REVEAL].items()
    }
    assert join(shares).hex() == gone.mask_key != gone.seed


@pytest.mark.slow
def test_the_largest_cohort_fits_the_messages() -> None:
    cohort = Cohort(64, 43)
    silent = {f"s{n}": STAGES[n % 5] for n in range(21)}
    assert cohort.sum(silent) == cohort.plain_sum(survivors_of(cohort, silent))
