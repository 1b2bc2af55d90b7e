"""Shares that do not fit: what is put right, who is named, and who is not."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import secure_sum as site_half
from federation.secure_keys import seal
from federation.secure_messages import (
    Revealed,
    Roster,
    SealedShares,
    SecureSumError,
    Stage,
    read,
    roster_context,
    write,
)
from federation.shamir import PRIME, SHARE_BYTES
from tests.secure_cohort import Cohort


def changed_shares(raw: bytes, places: Collection[int]) -> bytes:
    """Change the shares of these dealers among those that a site reveals."""
    revealed = read(Revealed, raw)
    shares = tuple(
        (s[:-1] + ("1" if s[-1] == "0" else "0")) if place in places else s
        for place, s in enumerate(revealed.shares)
    )
    return write(revealed.model_copy(update={"shares": shares}))


def lie(raw: bytes) -> bytes:
    """Change every share that is revealed."""
    return changed_shares(raw, range(64))


def shifted(raw: bytes, shifts: Mapping[int, int]) -> bytes:
    """Add to the shares of these dealers among those that a site reveals."""
    revealed, shares = read(Revealed, raw), {}
    for place, shift in shifts.items():
        value = (int(revealed.shares[place], 16) + shift) % PRIME
        shares[place] = value.to_bytes(SHARE_BYTES, "big").hex()
    changed = tuple(shares.get(place, s) for place, s in enumerate(revealed.shares))
    return write(revealed.model_copy(update={"shares": changed}))


def weight_at_zero(cohort: Cohort, name: str, gone: Collection[str] = ()) -> int:
    """Return what a site's share counts in the secret of the first survivors, by Lagrange."""
    places = cohort.places()
    alive = sorted(place for site, place in places.items() if site not in gone)
    weight, mine = 1, places[name] + 1
    for other in (place + 1 for place in alive[: cohort.terms.threshold]):
        if other != mine:
            weight = weight * other * pow(other - mine, -1, PRIME) % PRIME
    return weight


def cancelling(
    cohort: Cohort, liars: Sequence[str]
) -> dict[tuple[str, Stage], Callable[[bytes], bytes]]:
    """Let two of the first holders shift all their shares by what cancels in the secrets."""
    spoil = {}
    for liar, sign in zip(liars, (1, -1), strict=True):
        shift = sign * 777 * pow(weight_at_zero(cohort, liar), -1, PRIME)
        shifts = dict.fromkeys(range(len(cohort.sites)), shift)
        spoil[liar, Stage.REVEAL] = partial(shifted, shifts=shifts)
    return spoil


def deal_badly(cohort: Cohort, name: str, holders: Collection[str]) -> Callable[[bytes], bytes]:
    """Let a site seal shares of something else for some of the holders, as it may: none can see."""

    def dealt(raw: bytes) -> bytes:
        site, places = cohort.sites[name], cohort.places()
        roster = read(Roster, site.held.requests[Stage.SHARE].encode())
        private = site_half._private(site.held.secrets.seal_key)
        shares = list(read(SealedShares, raw).sealed)
        for holder in holders:
            place = places[holder]
            key = roster.advertisements[place].seal_key
            context, plain = roster_context(roster), bytes(2 * SHARE_BYTES)
            shares[place] = seal(private, key, context, places[name], place, plain)
        return write(read(SealedShares, raw).model_copy(update={"sealed": tuple(shares)}))

    return dealt


def test_a_site_that_reveals_wrong_shares_is_outvoted_while_enough_others_reveal() -> None:
    cohort = Cohort(5, 3)
    silent = {"s4": Stage.MASK}
    total = cohort.sum(silent, spoil={("s0", Stage.REVEAL): lie})
    assert total == cohort.plain_sum(["s0", "s1", "s2", "s3"])
    assert cohort.server.misfits == tuple(
        ("s0", d) for d in sorted(cohort.sites, key=cohort.places().get)
    )
    assert cohort.server.doubted == {"s0"}


def test_three_liars_of_sixteen_are_outvoted_and_named() -> None:
    """They are the first ones in order: a search through sets of shares began with them."""
    cohort = Cohort(16, 9)
    liars = {"s0", "s1", "s2"}
    total = cohort.sum(spoil={(name, Stage.REVEAL): lie for name in liars})
    assert total == cohort.plain_sum(cohort.sites)
    assert cohort.server.doubted == liars


def test_of_one_wrong_share_nobody_can_tell_whether_its_holder_or_its_dealer_lied() -> None:
    holder, dealer = Cohort(5, 3), Cohort(5, 3)
    place = holder.places()["s1"]
    total = holder.sum(spoil={("s0", Stage.REVEAL): lambda raw: changed_shares(raw, [place])})
    assert total == holder.plain_sum(holder.sites)
    total = dealer.sum(spoil={("s1", Stage.SHARE): deal_badly(dealer, "s1", ["s0"])})
    assert total == dealer.plain_sum(dealer.sites)
    for cohort in (holder, dealer):
        assert cohort.server.misfits == (("s0", "s1"),)
        assert cohort.server.doubted == set()


def test_a_site_that_shows_a_wrong_share_of_its_own_secret_lied() -> None:
    cohort = Cohort(5, 3)
    place = cohort.places()["s0"]
    total = cohort.sum(spoil={("s0", Stage.REVEAL): lambda raw: changed_shares(raw, [place])})
    assert total == cohort.plain_sum(cohort.sites)
    assert cohort.server.misfits == (("s0", "s0"),)
    assert cohort.server.doubted == {"s0"}


def test_one_liar_cannot_bring_another_site_into_doubt() -> None:
    """It deals the other a wrong share, and shows a wrong share of the other's, and of a third."""
    cohort = Cohort(5, 3)
    other, third = cohort.places()["s1"], cohort.places()["s2"]
    spoil = {
        ("s0", Stage.SHARE): deal_badly(cohort, "s0", ["s1"]),
        ("s0", Stage.REVEAL): lambda raw: changed_shares(raw, [other, third]),
    }
    assert cohort.sum(spoil=spoil) == cohort.plain_sum(cohort.sites)
    assert set(cohort.server.misfits) == {("s1", "s0"), ("s0", "s1"), ("s0", "s2")}
    assert cohort.server.doubted == {"s0"}


@pytest.mark.parametrize(
    ("size", "threshold", "gone"),
    [(7, 5, ["s4"]), (8, 5, ["s4"]), (16, 11, ["s4"]), (16, 11, ["s4", "s7"])],
)
def test_a_string_with_the_same_public_key_is_not_the_key_that_was_shared(
    size: int, threshold: int, gone: list[str]
) -> None:
    """One liar moves the keys of those that dropped out by a bit that X25519 ignores."""
    cohort = Cohort(size, threshold)
    places = cohort.places()
    alive = sorted(cohort.sites.keys() - set(gone), key=places.get)
    liar = alive[0]
    shift = 128 * pow(weight_at_zero(cohort, liar, gone), -1, PRIME)
    shifts = {places[site]: shift for site in gone}
    total = cohort.sum(
        dict.fromkeys(gone, Stage.MASK),
        spoil={(liar, Stage.REVEAL): lambda raw: shifted(raw, shifts)},
    )
    assert total == cohort.plain_sum(alive)
    assert set(cohort.server.misfits) == {(liar, site) for site in gone}
    assert cohort.server.doubted <= {liar}


@pytest.mark.parametrize(("size", "threshold"), [(9, 5), (9, 6), (16, 11)])
def test_two_liars_whose_changes_cancel_name_nobody_else(size: int, threshold: int) -> None:
    """The shares of the first holders give every seed; the honest ones beyond do not fit."""
    cohort = Cohort(size, threshold)
    places = cohort.places()
    liars = sorted(cohort.sites, key=places.get)[:2]
    assert cohort.sum(spoil=cancelling(cohort, liars)) == cohort.plain_sum(cohort.sites)
    assert {holder for holder, _ in cohort.server.misfits} == set(liars)
    assert cohort.server.doubted == set(liars)


def test_two_liars_that_agree_can_have_a_third_named() -> None:
    """Nobody can tell: one liar that showed two wrong shares would look the same."""
    cohort = Cohort(9, 5)
    spoil = {(name, Stage.SHARE): deal_badly(cohort, name, ["s2"]) for name in ("s0", "s1")}
    assert cohort.sum(spoil=spoil) == cohort.plain_sum(cohort.sites)
    assert cohort.server.doubted == {"s2"}


def test_where_two_wrong_shares_are_not_borne_two_liars_can_make_a_third_look_wrong() -> None:
    """With one share to spare it is one honest site against two that agree."""
    cohort = Cohort(5, 4)
    places = cohort.places()
    *liars, last = (sorted(cohort.sites, key=places.get)[n] for n in (0, 1, 4))
    assert cohort.sum(spoil=cancelling(cohort, liars)) == cohort.plain_sum(cohort.sites)
    assert cohort.server.doubted == {last}


def test_a_key_whose_unused_bits_are_set_is_shared_without_them() -> None:
    """A library may draw all of its bits at random; the one here clears them."""
    cohort = Cohort(5, 3)
    cohort.run_stage()
    cohort.server.close()
    site = cohort.sites["s1"]
    raw = bytes.fromhex(site.held.secrets.mask_key)
    key = (bytes([raw[0] | 7]) + raw[1:31] + bytes([raw[31] ^ 192])).hex()
    secrets = site.held.secrets.model_copy(update={"mask_key": key})
    site.held = site.held.model_copy(update={"secrets": secrets})
    total = cohort.sum({"s1": Stage.MASK})
    assert total == cohort.plain_sum(["s0", "s2", "s3", "s4"])
    assert cohort.server.doubted == set()


def test_liars_found_by_one_secret_are_left_out_for_the_others() -> None:
    """Nine of forty are borne, and fourteen lie about the second secret: those nine among them."""
    cohort = Cohort(40, 21)
    first, second = 0, 1
    liars = sorted(cohort.sites)[:14]
    spoil = {
        (name, Stage.REVEAL): partial(
            changed_shares, places=[first, second] if name in liars[:9] else [second]
        )
        for name in liars
    }
    assert cohort.sum(spoil=spoil) == cohort.plain_sum(cohort.sites)
    assert {holder for holder, _ in cohort.server.misfits} == set(liars)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_one_liar_deals_and_shows_nobody_else_is_named(data: st.DataObject) -> None:
    """And what is opened is the plain sum, or nothing is."""
    size = data.draw(st.integers(3, 8))
    threshold = data.draw(st.integers(size // 2 + 1, size))
    cohort = Cohort(size, threshold)
    others = [name for name in cohort.sites if name != "s0"]
    gone = data.draw(st.sets(st.sampled_from(others), max_size=size - threshold))
    stages = st.sampled_from([Stage.MASK, Stage.REVEAL])
    silent = {name: data.draw(stages) for name in sorted(gone)}
    if data.draw(st.booleans()) and len(gone) < size - threshold:
        silent["s0"] = Stage.MASK  # then the key of its masks is needed, and not the seed
    victims = data.draw(st.sets(st.sampled_from(list(cohort.sites))))
    lied_about = data.draw(st.sets(st.integers(0, size - 1)))
    spoil = {
        ("s0", Stage.SHARE): deal_badly(cohort, "s0", victims),
        ("s0", Stage.REVEAL): lambda raw: changed_shares(raw, lied_about),
    }
    summed = [name for name in cohort.sites if silent.get(name) != Stage.MASK]
    try:
        assert cohort.sum(silent, spoil=spoil) == cohort.plain_sum(summed)
    except SecureSumError:
        with pytest.raises(SecureSumError, match="not open"):
            _ = cohort.server.result
        assert "s0" in cohort.server.suspects
    assert cohort.server.doubted <= {"s0"}


def test_dealers_of_wrong_shares_do_not_rule_honest_holders_out() -> None:
    """Each makes two of nine look like liars: without all of them too few would be left."""
    cohort = Cohort(9, 5)
    victims = {"s0": ["s3", "s4"], "s1": ["s5", "s6"], "s2": ["s7", "s8"]}
    spoil = {(n, Stage.SHARE): deal_badly(cohort, n, whom) for n, whom in victims.items()}
    assert cohort.sum(spoil=spoil) == cohort.plain_sum(cohort.sites)
    assert {dealer for _, dealer in cohort.server.misfits} == set(victims)


@pytest.mark.parametrize("stage", [None, Stage.MASK])
def test_a_site_whose_secret_nobody_can_put_together_is_named(stage: Stage | None) -> None:
    """Whether the seed of its mask is needed, or the key of its masks with the others."""
    cohort = Cohort(5, 3)
    spoil = {("s1", Stage.SHARE): deal_badly(cohort, "s1", list(cohort.sites))}
    with pytest.raises(SecureSumError, match="the secret of site s1 cannot be put together"):
        cohort.sum({} if stage is None else {"s1": stage}, spoil=spoil)
    assert cohort.server.suspects == set(cohort.sites)
    assert cohort.server.doubted == {"s1"}


def test_without_shares_to_spare_a_missing_secret_makes_nobody_doubted() -> None:
    """Any holder of one may have lied, to have its dealer left out."""
    cohort = Cohort(4, 4)
    place = cohort.places()["s1"]
    with pytest.raises(SecureSumError, match="the secret of site s1 cannot be put together"):
        cohort.sum(spoil={("s0", Stage.REVEAL): lambda raw: changed_shares(raw, [place])})
    assert (cohort.server.doubted, cohort.server.suspects) == (set(), set(cohort.sites))


def test_without_enough_genuine_shares_the_attempt_ends_and_names_whose_they_are() -> None:
    cohort = Cohort(4, 4)
    with pytest.raises(SecureSumError, match="site s0, s1, s2, s3 cannot .* that 4 sites showed"):
        cohort.sum(spoil={("s0", Stage.REVEAL): lie})
    with pytest.raises(SecureSumError, match="not open"):
        _ = cohort.server.result
