"""kill -9 of everything that a site runs, in private rounds whose updates carry error feedback.

Every run is held to one in this process that nobody disturbed: the same noise, from the same keys
(`tests.client.seeded_site`), gives the same adapter, bit for bit. What was charged is read back
from the ledgers. The moments come from a seed, which is printed with them.
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from client.ledger import LEDGER, read_ledger
from client.site import Site as ClientSite
from federation.accountant import epsilon_of
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from federation.status import summarise
from tests.client.seeded_site import key_of
from tests.conftest import write_records, write_tiny_model
from tests.end_to_end.killed_sites import (
    DELTA,
    EVENT,
    NAMES,
    NUM_RECORDS,
    NUM_ROUNDS,
    SETTINGS,
    Hunt,
    Killed,
    Run,
    started,
    submit,
)
from tests.end_to_end.test_resident_nodes import InProcess, assert_same

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from topology import Deployment, deployment

pytestmark = pytest.mark.slow
KILLS = 5
"""Of one kind of process and one site in a run: ten of a kind."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_model(directory / "base")
    for name in NAMES:
        write_records(directory / f"{name}.jsonl", NUM_RECORDS, topic=name)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("made"), [], Console(stderr=True)) as running:
        yield running


def undisturbed(inputs: Path, out: Path) -> Path:
    """Return the adapter of a run in this process with the same noise."""
    sites = {
        name: ClientSite(
            inputs / "base", inputs / f"{name}.jsonl", name, out.parent / "states" / name, None
        )
        for name in NAMES
    }
    scratch = out.parent / "scratch"
    scratch.mkdir(parents=True)
    values = SETTINGS | {"base_model": str(inputs / "base"), "out": str(out)}
    settings = load_settings(FederationSettings, values, "the test")
    return run_rounds(InProcess(inputs / "base", sites, scratch, key_of=key_of), settings)


def check(run: Run, sites: list[Killed], oracle: Path) -> None:
    """Hold a finished run to the undisturbed one, and its charges to one a round and site."""
    summary = summarise(run.out / "events.jsonl")
    assert summary["state"] == "finished", summary
    assert_same(run.out / "adapter", oracle)
    run_id = json.loads((run.out / "run.json").read_text())["run"]
    for site in sites:
        rows = read_ledger(site.directory / "state" / LEDGER).rows  # which checks the chain
        mine = [row for row in rows if row.run == run_id]
        assert [row.server_round for row in mine] == [1, 2, 3, 4, 5], site.name
        assert {row.event for row in mine} == {EVENT}
        spent = epsilon_of([EVENT] * len(rows), DELTA)
        assert rows[-1].epsilon == pytest.approx(spent), "all rounds of all runs, each once"


def check_kills(sites: list[Killed], kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        rounds = [number for site in sites for done, number in site.kills if done == kind]
        assert len(rounds) >= 10, kind
        assert len(set(rounds)) >= 3, f"those of a {kind} are spread over the run"


def kill_in_every_round(
    run: Run, sites: list[Killed], kinds: tuple[str, ...], seed: int, longest_s: float
) -> None:
    """Kill each kind ``KILLS`` times a site while that site works, at random moments of all rounds.

    A moment begins with an event in the site's log and lasts ``longest_s``. A kill that did not
    come to pass is made up for later: they may run a round ahead. A draw is killed twice at most,
    for the third time is a failure, and charged as one (`tests/client/test_killed_rounds.py`).
    """
    deadline = time.monotonic() + 900
    draw = random.Random(seed)  # noqa: S311 - which kill comes when is no secret
    while not run.is_over():
        assert time.monotonic() < deadline, "the run does not end"
        now = run.server_round()
        for site in sites:
            done = [kind for kind, _ in site.kills]
            due = [kind for kind in kinds if done.count(kind) < min(now + 1, KILLS)]
            is_safe = site.may_be_killed_in_its_draw()
            if site.is_at_work() and is_safe and due and draw.random() < 0.6:
                time.sleep(draw.uniform(0, longest_s))
                site.kill(draw.choice(due), now)
        run.made.services.check()
        time.sleep(0.05)


def kill_shims(run: Run, sites: list[Killed], seed: int) -> None:
    """Kill ``KILLS`` living shims a site, at most two a round; the last round makes up for all."""
    deadline = time.monotonic() + 900
    lives_s: list[float] = []
    hunts = [Hunt(site, random.Random(f"{seed}/{site.name}"), lives_s) for site in sites]  # noqa: S311
    while not run.is_over():
        assert time.monotonic() < deadline, "the run does not end"
        now = run.server_round()
        for hunt in hunts:
            rounds = [server_round for _, server_round in hunt.site.kills]
            is_due = now == NUM_ROUNDS or rounds.count(now) < 2
            hunt.look(is_due and len(rounds) < KILLS, now)
        run.made.services.check()
        time.sleep(0.02)
    print("whole lives of shims:", [round(life_s, 2) for life_s in lives_s], "s")


@pytest.mark.parametrize(
    ("node", "kinds", "longest_s"),
    [
        ("resident", ("trainer", "daemon"), 0.4),
        ("supernode", ("shim",), None),
        ("supernode", ("supernode",), 5.0),
    ],
    ids=["trainer-daemon", "shim", "supernode"],
)
def test_what_a_site_runs_may_die_in_every_round_and_nothing_is_lost_or_charged_twice(
    made: Deployment,
    inputs: Path,
    tmp_path: Path,
    node: str,
    kinds: tuple[str, ...],
    longest_s: float | None,
) -> None:
    oracle = undisturbed(inputs, tmp_path / "undisturbed" / "run")
    seed = 1
    with started(made, inputs, node) as sites:
        run = submit(made, inputs, tmp_path / "run")
        begun = time.monotonic()
        if longest_s is None:
            kill_shims(run, sites, seed)
        else:
            kill_in_every_round(run, sites, kinds, seed, longest_s)
        print("seed", seed, [site.kills for site in sites], round(time.monotonic() - begun), "s")
        check(run, sites, oracle)
        check_kills(sites, kinds)
