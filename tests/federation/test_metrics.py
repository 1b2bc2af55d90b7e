"""Runs that ask for fewer numbers: what travels, what is logged, what every site weighs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from federation.adapter import read_adapter
from federation.events import RoundFinished, SiteFailed, UpdateReceived
from federation.metrics import METRICS, count_in, mean_of, metric_names, number_in
from federation.server_app import _say
from federation.settings import SettingsError
from federation.status import summarise
from federation.tables import status_view
from tests.federation.runs import Settings, dense, events, named_sites, run, weights_of
from tests.simulated import in_rounds, say


def test_names_keep_their_order_and_nothing_is_a_choice_too() -> None:
    assert metric_names("seconds, num-examples") == ("seconds", "num-examples")
    assert metric_names(" ") == ()
    assert metric_names(",".join(METRICS)) == METRICS


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ("seconds,loss", "the test: metrics names 'loss': expected some of num-examples, train_l"),
        ("seconds,", "metrics names '': expected some of"),
        ("seconds,train_loss, seconds", "metrics names seconds twice: expected each once"),
    ],
)
def test_a_wrong_name_is_one_sentence(settings: Settings, metrics: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        settings(metrics=metrics)


def test_a_mean_is_weighted_and_unknown_where_one_value_is() -> None:
    assert mean_of([1.0, 4.0], [10, 30]) == (10 * 1.0 + 30 * 4.0) / 40
    assert mean_of([1.0, 4.0], [None, None]) == 2.5
    assert mean_of([1.0, None], [10, 30]) is None
    assert mean_of([], []) is None


@pytest.mark.parametrize("name", METRICS)
def test_a_site_that_withholds_an_asked_number_is_named_and_the_others_go_on(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults["b"] = in_rounds({2}, say(**{name.replace("-", "_"): None}))
    run(sites, settings())
    (failed,) = events(settings(), SiteFailed)
    assert (failed.site, failed.server_round) == ("b", 2)
    assert failed.reason == f"the reply brings no number {name}, which this run asks for"
    assert len(events(settings(), UpdateReceived)) == 5


@pytest.mark.parametrize("said", ["many", [1, 2], None, float("inf"), float("nan")])
def test_what_is_no_count_is_none(said: object) -> None:
    assert count_in({"num-examples": said}, "num-examples") is None
    assert count_in({"num-examples": 12.0}, "num-examples") == 12
    assert number_in({}, "seconds") is None


def test_without_counts_every_site_weighs_the_same(settings: Settings, tmp_path: Path) -> None:
    # One round of factors: the mean that a hand computes, from what the sites made.
    uncounted = settings(metrics="seconds", num_rounds=1, aggregation="factors")
    sites = named_sites(tmp_path / "s")
    made = read_adapter(run(sites, uncounted))
    equal = settings(out=str(tmp_path / "equal"), num_rounds=1, aggregation="factors")
    others = named_sites(tmp_path / "o")
    others.num_examples = dict.fromkeys("abc", 7)
    assert weights_of(run(others, equal)) == weights_of(Path(uncounted.out) / "adapter")
    counted = settings(out=str(tmp_path / "counted"), num_rounds=1, aggregation="factors")
    weighted = read_adapter(run(named_sites(tmp_path / "w"), counted))
    name = next(iter(made.modules))
    assert (dense(made.modules[name]) != dense(weighted.modules[name])).any()


def test_numbers_that_nobody_asked_for_are_neither_logged_nor_shown(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = named_sites(tmp_path / "s")
    # Out of range, but nobody looks at it; where it was asked it would cost the site its round.
    sites.faults["c"] = say(num_examples=-4711, train_loss=float("nan"))
    few = settings(metrics="seconds")
    run(sites, few)
    assert [request.metrics for _, request in sites.requests] == [("seconds",)] * 2
    updates = events(few, UpdateReceived)
    assert len(updates) == 6
    assert {(u.num_examples, u.train_loss, u.seconds) for u in updates} == {(None, None, 0.1)}
    log = (Path(few.out) / "events.jsonl").read_text()
    assert "4711" not in log
    (_, last) = finished = events(few, RoundFinished)
    assert [event.train_loss for event in finished] == [None, None]
    statement = json.loads((Path(few.out) / "round-0002" / "lineage.json").read_text())
    assert "4711" not in json.dumps(statement)
    assert "train_loss" not in statement["predicate"]["metrics"]
    _say(last)
    assert "train loss –," in capsys.readouterr().err
    summary = summarise(Path(few.out) / "events.jsonl")
    assert [site["last_loss"] for site in summary["site_rows"]] == [None] * 3
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(status_view(summary))
    assert console.export_text().count("–") == 2 + 3  # a loss a round, one a site


def test_a_run_that_asks_for_nothing_runs(settings: Settings, tmp_path: Path) -> None:
    run(named_sites(tmp_path / "s"), settings(metrics=""))
    assert {u.seconds for u in events(settings(), UpdateReceived)} == {None}


def test_a_run_begun_before_this_setting_asks_for_what_it_did(
    settings: Settings, tmp_path: Path
) -> None:
    run(named_sites(tmp_path / "s"), settings())
    described = Path(settings().out) / "run.json"
    values = json.loads(described.read_text())
    del values["settings"]["metrics"]
    values["settings"]["num_rounds"] = 3
    described.write_text(json.dumps(values))
    more = named_sites(tmp_path / "m")
    run(more, settings().model_copy(update={"resume": settings().out}))
    assert [request.metrics for _, request in more.requests] == [METRICS]
