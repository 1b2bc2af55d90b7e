"""Rounds whose sum is lost, through real trainers, policies and ledgers of tiny sites.

The training has noise: without it sites refuse a second sum over the adapter of a lost one.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from client.ledger import LEDGER, read_ledger
from federation import rounds
from federation.adapter import read_adapter
from federation.events import RoundFinished, RoundStarted, SiteFailed, SumLost, SumOpened
from federation.exchange import RoundError
from federation.lost_rounds import LostRound, is_stuck, lost_in_a_row, stop_if_lost
from federation.run_directory import ResumeError, RunDirectory
from federation.secure_messages import SealedShares, Stage, read, write
from federation.settings import FederationSettings
from federation.sites import Request
from federation.status import summarise
from federation.update import open_update
from tests.federation.runs import dense, events, weights_of
from tests.federation.secure_runs import (
    PRIVATE,
    SHORT,
    Make,
    die,
    private_sites,
    run,
    secure_settings,
)
from tests.secure_sites import SecureSites

MOMENTUM = {"kind": "fedavgm", "learning_rate": 1.0, "momentum": 0.9}


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Make:
    make = partial(secure_settings, tiny_model, out=str(tmp_path / "run"), metrics="seconds")
    return partial(make, training=PRIVATE)


@pytest.fixture
def sites(tiny_model: Path, tmp_path: Path) -> Iterator[SecureSites]:
    with private_sites(tiny_model, tmp_path / "sites") as made:
        yield made


def absurd(vector: bytes) -> bytes:
    """Add half of the ring to the last number before the examples; elements have three bytes."""
    number = (int.from_bytes(vector[-6:-3], "little") + 2**23) % 2**24
    return vector[:-6] + number.to_bytes(3, "little") + vector[-3:]


def unreadable(shares: bytes) -> bytes:
    """Seal nothing that anybody could open."""
    given = read(SealedShares, shares)
    sealed = tuple("00" * (len(each) // 2) for each in given.sealed)
    return write(given.model_copy(update={"sealed": sealed}))


def wrong_shares(reply: bytes) -> bytes:
    value = json.loads(reply)
    value["shares"] = [
        share[:-2] + ("00" if share[-2:] != "00" else "01") for share in value["shares"]
    ]
    return json.dumps(value).encode()


def in_round(number: int, spoil: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Return what spoils the ``number``-th reply only, and leaves the others as they are."""
    count = 0

    def one(reply: bytes) -> bytes:
        nonlocal count
        count += 1
        return spoil(reply) if count == number else reply

    return one


def asked_of(settings: FederationSettings) -> list[list[str]]:
    return [event.asked for event in events(settings, RoundStarted)]


def lineage(out: Path, server_round: int) -> dict:
    text = (out / f"round-{server_round:04d}" / "lineage.json").read_text()
    return json.loads(text)["predicate"]


def test_two_lost_sums_in_a_row_stop_the_run_and_say_who_was_in_both(
    settings: Make, sites: SecureSites
) -> None:
    four = settings(num_rounds=4)
    sites.spoil["c", Stage.MASK] = absurd
    with pytest.raises(RoundError) as seen:
        run(sites, four)
    assert "rounds 1 to 2: no secure sum came out" in str(seen.value)
    assert "in each of them were site a, b, c, d" in str(seen.value)
    assert "resume the run" in str(seen.value)
    # What it cost: a row with steps a round and site. Nothing more is asked until it is resumed.
    for each in sites.institutions.values():
        rows = read_ledger(each.site.state / LEDGER).rows
        assert [row.server_round for row in rows if row.steps] == [1, 2]
    # A resumed run tries one more round; once the liar is mended it goes on to its end.
    with pytest.raises(RoundError, match="rounds 1 to 3: no secure sum came out"):
        run(sites, settings(resume=four.out))
    sites.spoil.clear()
    run(sites, settings(resume=four.out))
    assert [event.server_round for event in events(four, SumOpened)] == [4]
    summary = summarise(Path(four.out) / "events.jsonl")
    assert [row["num_updates"] for row in summary["rounds"]] == [0, 0, 0, 4]


def test_a_server_that_is_killed_before_it_stops_does_not_forget_the_lost_rounds(
    settings: Make, sites: SecureSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = settings(num_rounds=4)
    sites.spoil["c", Stage.MASK] = absurd

    def killed(lost: list[LostRound], _: object) -> None:
        if len(lost) == 2:
            die()

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(rounds, "stop_if_lost", killed)
        run(sites, four)
    asked = sites.asked.copy()
    with pytest.raises(RoundError, match="rounds 1 to 2: no secure sum came out"):
        run(sites, settings(resume=four.out))
    assert sites.asked == asked


def test_a_stop_does_not_outlive_its_round_where_a_commit_was_killed(
    settings: Make, tmp_path: Path
) -> None:
    """What was said after round 2 is removed after round 3 has its name: a kill comes between."""
    made = settings(num_rounds=9)
    with RunDirectory.start(made) as directory:
        lost = [LostRound(1, "x", ("a",)), LostRound(2, "x", ("a",))]
        directory.last_round = 2
        with pytest.raises(RoundError, match="rounds 1 to 2"):
            stop_if_lost(lost, directory)
        stop_if_lost(lost, directory)  # resumed: one more is tried
        lost.append(LostRound(3, "x", ("a",)))
        directory.last_round = 3
        with pytest.raises(RoundError, match="rounds 1 to 3"):
            stop_if_lost(lost, directory)
        # Whoever finds the empty file of an older version is told once more.
        (tmp_path / "run" / "secure" / "stopped").write_text("")
        with pytest.raises(RoundError, match="rounds 1 to 3"):
            stop_if_lost(lost, directory)


def test_a_run_that_would_end_with_a_lost_sum_alone_fails(
    settings: Make, sites: SecureSites
) -> None:
    sites.spoil["c", Stage.MASK] = absurd
    for made in (settings(), settings(resume=settings().out)):
        with pytest.raises(RoundError, match=r"round 1: no secure sum .* begin a new run"):
            run(sites, made)
    assert summarise(Path(settings().out) / "events.jsonl")["state"] == "failed"


def test_a_lost_round_leaves_adapter_and_momentum_byte_for_byte_and_its_lineage_says_so(
    settings: Make, sites: SecureSites
) -> None:
    out = Path(settings().out)
    changes = {"aggregation": "factors", "server_optimizer": MOMENTUM}
    made = settings(num_rounds=4, wire={"downlink": "bfloat16"}, **changes)
    sites.spoil["c", Stage.MASK] = in_round(3, absurd)
    states: dict[int, dict[str, bytes]] = {}

    def note() -> None:
        for path in out.glob("state-*"):
            states[int(path.name[-4:])] = {p.name: p.read_bytes() for p in path.iterdir()}

    sites.before[Stage.ADVERTISE] = note
    run(sites, made)
    (lost,) = events(made, SumLost)
    assert lost.server_round == 3
    assert weights_of(out / "round-0003") == weights_of(out / "round-0002")
    assert weights_of(out / "round-0004") != weights_of(out / "round-0003")
    assert states[3] == states[2] != states[1]
    said = lineage(out, 3)
    assert [each["name"] for each in said["materials"]] == ["base_model", "previous_round"]
    assert said["metrics"] == {}
    assert said["parameters"]["secure_sum"] == {
        "sites": [],
        "lost": lost.reason,
        "suspects": ["a", "b", "c", "d"],
        "named": [],
        "attempt": 1,
        "cohort": 4,
        "threshold": 3,
        "clip": made.secure_sum.clip,
        "bits": 16,
        "max_examples": 1,
    }
    assert "aggregation" not in said["parameters"]


@pytest.mark.parametrize(("lost", "factors"), [(1, "BBA"), (2, "BAB")])
def test_a_lost_first_round_trains_b_again_and_a_later_one_passes_its_turn_on(
    settings: Make, sites: SecureSites, lost: int, factors: str
) -> None:
    """B is zero until it was trained once, so that A would have no gradient."""
    told: list[tuple[str, str]] = []
    send = sites.send

    def note(names: list[str], request: Request) -> None:
        if request.stage == Stage.ADVERTISE:
            told.append((request.trains, open_update(request.message).checksum))
        send(names, request)

    sites.send = note
    sites.spoil["c", Stage.MASK] = in_round(lost, absurd)
    run(sites, settings(num_rounds=3))
    assert "".join(factor for factor, _ in told) == factors
    adapters = [checksum for _, checksum in told]
    assert [one == two for one, two in itertools.pairwise(adapters)] == [lost == 1, lost == 2]
    before, last = (read_adapter(Path(settings().out) / f"round-{n:04d}") for n in (2, 3))
    assert any(np.any(dense(last.modules[n]) != dense(f)) for n, f in before.modules.items())


@pytest.mark.parametrize("aggregation", ["alternating", "factors"])
def test_without_noise_a_run_whose_first_sums_were_lost_goes_on_from_another_drawn_adapter(
    aggregation: str, settings: Make, sites: SecureSites
) -> None:
    """Sites open no second sum over the adapter that the lost round was about."""
    changes = {"training": SHORT, "aggregation": aggregation, "round_attempts": 1}
    three = settings(num_rounds=3, **changes)
    sites.spoil["c", Stage.MASK] = absurd
    with pytest.raises(RoundError, match="rounds 1 to 2: no secure sum came out"):
        run(sites, three)
    sites.spoil.clear()
    served: list[str] = []
    sites.before[Stage.SHARE] = die
    for _ in range(2):  # the same draw after a kill, else a site's own replay rule ends the round
        with pytest.raises(SystemExit):
            run(sites, settings(resume=three.out))
        path = Path(three.out) / "served" / "round-0003.update"
        served.append(open_update(path).checksum)
    assert served[0] == served[1]
    sites.before.clear()
    run(sites, settings(resume=three.out))
    assert [event.server_round for event in events(three, SumOpened)] == [3]


def test_a_sum_that_can_never_be_opened_loses_its_round_and_the_run_goes_on(
    settings: Make, sites: SecureSites
) -> None:
    two = settings(num_rounds=2)
    sites.silent = {"b": Stage.REVEAL, "c": Stage.REVEAL}
    with pytest.raises(RoundError, match="start them again and resume the run"):
        run(sites, two)
    sites.before[Stage.ADVERTISE] = sites.silent.clear
    run(sites, settings(resume=two.out))
    (lost,) = events(two, SumLost)
    assert (lost.server_round, lost.suspects, lost.named) == (1, ["b", "c"], [])
    first, second = events(two, RoundFinished)
    assert (first.num_updates, second.num_updates) == (0, 4)
    served = open_update(Path(two.out) / "served" / "round-0002.update").adapter()
    assert all(np.abs(dense(factors)).max() == 0 for factors in served.modules.values())


def test_two_liars_among_four_holders_of_shares_cannot_open_anything(
    settings: Make, sites: SecureSites
) -> None:
    for name in "ab":
        sites.spoil[name, Stage.REVEAL] = wrong_shares
    with pytest.raises(RoundError, match="cannot be put together from the shares that 4 sites"):
        run(sites, settings())
    (lost,) = events(settings(), SumLost)
    assert (lost.suspects, lost.named) == (["a", "b", "c", "d"], [])


def test_one_liar_among_the_holders_is_outvoted_named_and_asked_last(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    three = settings(num_rounds=3)
    with private_sites(tiny_model, tmp_path / "sites", "abcde") as sites:
        sites.spoil["a", Stage.REVEAL] = wrong_shares
        run(sites, three)
    assert len(events(three, SumOpened)) == 3
    failed = [event for event in events(three, SiteFailed) if event.site == "a"]
    assert failed
    assert all(e.reason.startswith("stage reveal: shares between it and site ") for e in failed)
    found = next(n for n, asked in enumerate(asked_of(three)) if "a" in asked)
    assert all("a" not in asked for asked in asked_of(three)[found + 1 :])


def test_of_one_pair_that_does_not_fit_both_are_said_and_neither_is_asked_later(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """Else a site could deal another a wrong share to have it left out."""

    def one_wrong(reply: bytes) -> bytes:
        value, other = json.loads(reply), json.loads(wrong_shares(reply))
        value["shares"][0] = other["shares"][0]
        return json.dumps(value).encode()

    made = settings(num_rounds=4)
    with private_sites(tiny_model, tmp_path / "sites", "abcde") as sites:
        sites.spoil["a", Stage.REVEAL] = one_wrong
        run(sites, made)
    by_round: dict[int, set[str]] = {}
    for event in events(made, SiteFailed):
        assert event.reason.endswith("do not fit: one of them lied, or others together")
        by_round.setdefault(event.server_round, set()).add(event.site)
    rounds_of_a = {number + 1 for number, asked in enumerate(asked_of(made)) if "a" in asked}
    assert by_round.keys() == rounds_of_a
    assert len(rounds_of_a) > 1
    assert all("a" in pair and len(pair) == 2 for pair in by_round.values())


def test_a_site_whose_secret_nobody_can_open_is_named_and_asked_last_over_a_resume(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    made = settings(num_rounds=4)
    with private_sites(tiny_model, tmp_path / "sites", "abcde") as sites:
        sites.spoil["a", Stage.SHARE] = unreadable
        sites.before[Stage.SHARE] = lambda: die() if len(asked_of(made)) == 3 else None
        with pytest.raises(SystemExit):
            run(sites, made)
        run(sites, settings(resume=made.out))
    (lost,) = events(made, SumLost)
    assert "the secret of site a cannot be put together" in lost.reason
    assert (lost.named, sorted(lost.suspects)[0]) == (["a"], "a")
    reasons = [event.reason for event in events(made, SiteFailed) if event.site == "a"]
    assert len(reasons) == 1
    assert "its secret cannot be put together" in reasons[0]
    asked = asked_of(made)
    found = next(number for number, names in enumerate(asked) if "a" in names)
    assert asked[found + 1 :] == [list("bcde")] * (len(asked) - found - 1)


def test_one_liar_of_eight_sites_loses_one_round_and_no_more(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """Nobody can tell who it was: those that had no part in the lost sum are asked from then on."""
    made = settings(num_rounds=6)
    with private_sites(tiny_model, tmp_path / "sites", "abcdefgh") as sites:
        sites.spoil["a", Stage.MASK] = absurd
        run(sites, made)
    (lost,) = events(made, SumLost)
    assert "a" in lost.suspects
    later = asked_of(made)[lost.server_round :]
    assert later
    assert not any(set(asked) & set(lost.suspects) for asked in later)


def test_a_damaged_lineage_does_not_hide_a_lost_round(settings: Make, sites: SecureSites) -> None:
    made = settings(num_rounds=2)
    sites.before[Stage.SHARE] = lambda: die() if len(asked_of(made)) == 2 else None
    with pytest.raises(SystemExit):
        run(sites, made)
    (Path(made.out) / "round-0001" / "lineage.json").write_text("{")
    with pytest.raises(ResumeError, match=r"round-0001/lineage\.json is damaged"):
        run(sites, settings(resume=made.out))


def test_a_stop_says_of_a_named_site_what_is_known_of_it(settings: Make) -> None:
    with RunDirectory.start(settings()) as directory:
        directory.last_round = 1
        lost = [LostRound(1, "x", ("a", "b", "c"), named=("b",))]
        with pytest.raises(RoundError) as seen:
            stop_if_lost(lost, directory)
    assert "were site a, b, c; at odds with most of the others: site b. Every" in str(seen.value)


def test_lost_rounds_in_a_row_end_with_the_last_one_that_is_over() -> None:
    lost = [LostRound(n, "", ()) for n in (1, 3, 4)]
    rows = [[each.server_round for each in lost_in_a_row(lost, last)] for last in range(6)]
    assert rows == [[], [1], [], [3], [3, 4], []]


@pytest.mark.parametrize(
    ("aggregation", "noise", "lost_rounds", "last_round", "is_it"),
    [
        ("factors", 0.0, [2], 2, True),
        ("alternating", 0.0, [2], 2, False),  # the other factor has its turn
        ("alternating", 0.0, [2, 3], 3, True),
        ("alternating", 0.0, [1, 2], 2, False),  # A is drawn anew
        ("alternating", 0.0, [1, 2], 3, False),  # a sum was opened since
        ("factors", 1.0, [2, 3], 3, False),
    ],
)
def test_a_run_is_stuck_where_the_same_updates_would_be_summed_again(
    settings: Make,
    aggregation: str,
    noise: float,
    lost_rounds: list[int],
    last_round: int,
    is_it: bool,
) -> None:
    chosen = settings(aggregation=aggregation, training=PRIVATE | {"noise_multiplier": noise})
    lost = [LostRound(number, "", ()) for number in lost_rounds]
    assert is_stuck(lost, last_round, chosen) is is_it
