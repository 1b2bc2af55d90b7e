"""The two Flower apps against each other: real messages, real training, no network."""

import re
from pathlib import Path

import httpx
import pytest
from flwr.app import Message

from client.batches import encode_records
from client.evaluation import evaluate
from client.model import add_adapter, load_model, load_tokenizer
from client.records import read_records
from federation import grid_sites, server_app
from federation.adapter import read_adapter
from federation.events import AdapterResent, SiteFailed, UpdateReceived, read_events
from federation.status import summarise
from federation.wire import REFERENCE_MISSING
from tests.conftest import write_records, write_tiny_model
from tests.simulated import LocalGrid


@pytest.fixture
def run_config(tiny_model: Path, tmp_path: Path) -> dict[str, object]:
    for index, name in enumerate(("bank", "clinic")):
        write_records(tmp_path / "sites" / name / "train.jsonl", 20 + 20 * index, topic=name)
    return {
        "base_model": str(tiny_model),
        "out": str(tmp_path / "run"),
        "simulated_sites": str(tmp_path / "sites"),
        "num_rounds": 3,
        "num_sites": 2,
        "adapter.rank": 4,
        "training.num_steps": 6,
        "training.batch_size": 4,
        "training.learning_rate": 0.01,
        "training.max_tokens": 64,
        "training.dtype": "float32",
    }


def partitions(count: int) -> list[dict[str, object]]:
    return [{"partition-id": index, "num-partitions": count} for index in range(count)]


def loss(model_directory: Path, data: Path, adapter: Path | None) -> float:
    examples = encode_records(read_records(data), load_tokenizer(model_directory), 64)
    model = load_model(model_directory, "float32")
    if adapter:
        model = add_adapter(model, read_adapter(adapter)).eval()
    return evaluate(model, examples, pad_id=0).loss


def test_a_run_through_both_apps_learns_from_both_sites(
    run_config: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    grid = LocalGrid(partitions(2), run_config)
    server_app.main(grid, grid.server_context)
    events = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    updates = [event for event in events if isinstance(event, UpdateReceived)]
    assert sorted({u.name: u.num_examples for u in updates}.items()) == [
        ("bank", 20),
        ("clinic", 40),
    ]
    assert summarise(tmp_path / "run" / "events.jsonl")["rounds_done"] == 3
    for name in ("bank", "clinic"):
        data = tmp_path / "sites" / name / "train.jsonl"
        before = loss(tiny_model, data, None)
        after = loss(tiny_model, data, tmp_path / "run" / "adapter")
        assert after < before - 0.3


def test_a_real_site_says_itself_where_its_data_and_model_are(
    run_config: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    own = [
        {"data": str(tmp_path / "sites" / name / "train.jsonl"), "base_model": str(tiny_model)}
        for name in ("bank", "clinic")
    ]
    grid = LocalGrid(own, run_config | {"simulated_sites": "", "num_rounds": 1})
    server_app.main(grid, grid.server_context)
    updates = [
        e
        for _, e in read_events(tmp_path / "run" / "events.jsonl")
        if isinstance(e, UpdateReceived)
    ]
    assert [u.name for u in updates] == ["", ""], "a site that gives no name has none"


def test_a_site_with_another_base_model_is_left_out_by_name(
    run_config: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    nodes = [
        {"data": str(tmp_path / "sites" / "bank" / "train.jsonl"), "base_model": str(model)}
        for model in (tiny_model, other)
    ]
    grid = LocalGrid(nodes, run_config | {"num_rounds": 1})
    server_app.main(grid, grid.server_context)
    (failed,) = [
        e for _, e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiteFailed)
    ]
    assert "this site holds" in failed.reason
    assert "install the run's base model" in failed.reason


def test_no_text_leaves_a_site_whose_data_is_bad(
    run_config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "sites" / "bank" / "train.jsonl"
    bad.write_text('{"prompt": "Mrs Jones", "response": "fever"}\nMrs Jones has a fever\n')
    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 1})
    server_app.main(grid, grid.server_context)
    log = (tmp_path / "run" / "events.jsonl").read_text()
    assert "train.jsonl:2: not JSON" in log
    captured = capsys.readouterr()
    assert "Jones" not in log + captured.out + captured.err


def test_an_unexpected_failure_leaves_as_its_type_alone(
    run_config: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from client import privacy

    secret = "senoJ srM"[::-1]  # a traceback quotes source lines: it must not stand in one

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"while reading: {secret}")

    monkeypatch.setattr(privacy, "train_records", broken)
    grid = LocalGrid(partitions(2), run_config)
    with pytest.raises(SystemExit) as end:
        server_app.main(grid, grid.server_context)
    assert end.value.code == 1
    log = (tmp_path / "run" / "events.jsonl").read_text()
    assert "the site failed with RuntimeError" in log
    captured = capsys.readouterr()
    assert "Jones" not in log + captured.out + captured.err
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"base_model": ""}, "base_model is empty"),
        ({"base_model": "/nowhere"}, "/nowhere does not exist"),
        ({"num_rounds": 0}, "'num_rounds' is 0"),
        ({"training.epochs": 3}, "unknown setting 'epochs'"),
        ({"simulated_sites": ""}, "a simulation needs a directory"),
    ],
)
def test_bad_settings_end_the_run_in_one_sentence_without_a_model(
    run_config: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    sentence: str,
) -> None:
    grid = LocalGrid(partitions(2), run_config | change)
    with pytest.raises(SystemExit):
        server_app.main(grid, grid.server_context)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_on_a_real_site_the_run_names_no_file(
    run_config: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    for node in ({}, {"data": str(tmp_path / "sites" / "bank" / "train.jsonl")}):
        out = tmp_path / f"run{len(node)}"
        grid = LocalGrid([node, *partitions(1)], run_config | {"num_rounds": 1, "out": str(out)})
        server_app.main(grid, grid.server_context)
        (failed,) = [e for _, e in read_events(out / "events.jsonl") if isinstance(e, SiteFailed)]
        assert "this site does not say its" in failed.reason


def test_a_reason_names_a_file_but_not_where_it_lies(
    run_config: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    node = {"data": "/srv/st-mary/oncology/notes.jsonl", "base_model": str(tiny_model)}
    grid = LocalGrid([node, *partitions(1)], run_config | {"num_rounds": 1})
    server_app.main(grid, grid.server_context)
    (failed,) = [
        e for _, e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiteFailed)
    ]
    assert "notes.jsonl does not exist" in failed.reason
    assert "mary" not in failed.reason


@pytest.mark.parametrize(
    "spoiled", ["no result", "wrong type", "not numpy", "infinite", "an error without a reason"]
)
def test_a_malformed_reply_costs_only_its_site(
    run_config: dict[str, object], tmp_path: Path, spoiled: str
) -> None:
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
    from flwr.app.error import Error
    from flwr.app.message import make_message
    from flwr.common.serde_utils import error_from_proto, error_to_proto

    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 1})
    pull = grid.pull_messages

    def pull_spoiled(ids: list[str]) -> list[object]:
        messages = pull(ids)
        for index, message in enumerate(messages):
            if message.metadata.src_node_id == 100 and message.has_content():
                content = message.content
                if spoiled == "no result":
                    del content["result"]
                elif spoiled == "wrong type":
                    content["result"] = ConfigRecord({"num-examples": "many"})
                elif spoiled == "infinite":
                    content["result"] = MetricRecord({"num-examples": float("inf")})
                elif spoiled == "an error without a reason":
                    arrived = error_from_proto(error_to_proto(Error(1001, "")))
                    messages[index] = make_message(message.metadata, error=arrived)
                else:
                    bad = Array(np.zeros(3, dtype=np.uint8))
                    bad.data = b"PK not a numpy array"
                    content["adapter"] = ArrayRecord({"adapter": bad})
        return messages

    grid.pull_messages = pull_spoiled
    server_app.main(grid, grid.server_context)
    assert summarise(tmp_path / "run" / "events.jsonl")["rounds"][0]["num_updates"] == 1


def test_a_damaged_number_that_nobody_asked_for_costs_nothing(
    run_config: dict[str, object], tmp_path: Path
) -> None:
    from flwr.app import MetricRecord

    def spoil(message: Message) -> list[Message]:
        assert set(message.content["result"]) == {"seconds"}
        if message.metadata.src_node_id == 100:
            damaged = {"num-examples": float("inf"), "train_loss": [1.0, 2.0], "seconds": 1.5}
            message.content["result"] = MetricRecord(damaged)
        return [message]

    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 1, "metrics": "seconds"})
    grid.spoil = spoil
    server_app.main(grid, grid.server_context)
    log = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    updates = [event for event in log if isinstance(event, UpdateReceived)]
    assert len(updates) == 2
    assert {(u.num_examples, u.train_loss) for u in updates} == {(None, None)}
    assert 1.5 in {u.seconds for u in updates}


def test_a_reply_whose_body_is_no_protobuf_costs_only_its_site(
    run_config: dict[str, object], tmp_path: Path
) -> None:
    """As the SuperLink lets it pass and Flower's grid reads it."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import (
        inflate_object_from_contents,
        validate_object_content,
    )

    def spoil(message: Message) -> list[Message]:
        if message.metadata.src_node_id != 100:
            return [message]
        objects = get_all_nested_objects(message)
        contents = {name: item.deflate() for name, item in objects.items()}
        (broken,) = [n for n, raw in contents.items() if raw.startswith(b"MetricRecord")]
        contents[broken] = b"MetricRecord  3\0\xff\xff\xff"
        validate_object_content(contents[broken])
        return [inflate_object_from_contents(message.object_id, contents)]

    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 1})
    grid.spoil = spoil
    server_app.main(grid, grid.server_context)
    log = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    (failed,) = [event for event in log if isinstance(event, SiteFailed)]
    assert (failed.site, failed.reason) == ("100", "the reply is not readable (DecodeError)")
    assert sum(isinstance(event, UpdateReceived) for event in log) == 1


def refuse(grid: LocalGrid, *sites: int) -> None:
    """Let a grid answer for some sites as the SuperLink does once they are unregistered."""
    push = grid.push_messages

    def push_to_the_others(messages: list[Message]) -> list[str]:
        known = [m for m in messages if m.metadata.dst_node_id not in sites]
        ids = dict(zip([m.metadata.dst_node_id for m in known], push(known), strict=True))
        return [ids.get(message.metadata.dst_node_id, "") for message in messages]

    grid.push_messages = push_to_the_others


def test_a_site_that_was_unregistered_after_it_was_drawn_costs_only_itself(
    run_config: dict[str, object], tmp_path: Path
) -> None:
    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 2})
    refuse(grid, 101)
    server_app.main(grid, grid.server_context)
    log = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    failures = [event for event in log if isinstance(event, SiteFailed)]
    assert [(e.server_round, e.site) for e in failures] == [(1, "101"), (2, "101")]
    assert all("unregistered meanwhile" in event.reason for event in failures)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert [row["num_updates"] for row in summary["rounds"]] == [1, 1]


def test_a_site_that_was_unregistered_before_the_adapter_was_sent_again_costs_only_itself(
    run_config: dict[str, object], tmp_path: Path
) -> None:
    """The second message of round 2 goes to that site alone, so all that is sent is refused."""
    from flwr.app.error import Error
    from flwr.app.message import make_message

    def forgets(message: Message) -> list[Message]:
        if message.metadata.src_node_id != 101 or message.metadata.group_id != "2":
            return [message]
        refuse(grid, 101)
        return [make_message(message.metadata, error=Error(REFERENCE_MISSING, "no adapter"))]

    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 2, "wire.downlink": "int8"})
    grid.spoil = forgets
    server_app.main(grid, grid.server_context)
    log = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    (resent,) = [event for event in log if isinstance(event, AdapterResent)]
    (failed,) = [event for event in log if isinstance(event, SiteFailed)]
    assert (resent.site, failed.server_round, failed.site) == ("101", 2, "101")
    assert summarise(tmp_path / "run" / "events.jsonl")["rounds_done"] == 2


def test_a_round_whose_every_message_is_refused_ends_the_run_with_the_cause(
    run_config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = LocalGrid(partitions(2), run_config)
    refuse(grid, 100, 101)
    with pytest.raises(SystemExit):
        server_app.main(grid, grid.server_context)
    assert "unregistered meanwhile, or the run was stopped" in capsys.readouterr().err


def test_a_superlink_that_takes_no_message_of_this_size_ends_the_run_in_one_sentence(
    run_config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Flower's grid answers 413 with no ids at all."""
    grid = LocalGrid(partitions(2), run_config)
    grid.push_messages = lambda _: []
    with pytest.raises(SystemExit):
        server_app.main(grid, grid.server_context)
    sentence = "answered for 0 of 2 messages: a site is gone, or the SuperLink .* of this size"
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize("error", [httpx.ConnectError("TLS"), OSError(24, "Too many open files")])
def test_a_superlink_that_cannot_be_asked_is_no_fault_of_a_site(
    run_config: dict[str, object], tmp_path: Path, error: Exception
) -> None:
    def away(_: Message) -> list[Message]:
        raise error

    grid = LocalGrid(partitions(2), run_config | {"num_rounds": 1})
    grid.spoil = away
    with pytest.raises(type(error)):
        server_app.main(grid, grid.server_context)
    kinds = {type(event) for _, event in read_events(tmp_path / "run" / "events.jsonl")}
    assert SiteFailed not in kinds


@pytest.mark.parametrize(
    ("waited_s", "look_s", "expected_s"),
    [
        (0.0, 0.01, 0.05),  # a fast round: at once again
        (5.0, 0.01, 0.15),  # a stock SuperNode's round
        (600.0, 0.01, 1.0),  # training: hidden in the 3 s that a stock SuperNode sleeps
        (5.0, 0.5, 2.0),  # many sites: the SuperLink has four fifths of the time for others
        (600.0, 60.0, 5.0),
    ],
)
def test_the_superlink_is_not_kept_busy_by_being_asked(
    waited_s: float, look_s: float, expected_s: float
) -> None:
    assert grid_sites.pause_s(waited_s, look_s) == pytest.approx(expected_s)


def test_a_simulation_resumes_with_nothing_but_its_directory(
    run_config: dict[str, object], tmp_path: Path
) -> None:
    short = {"quorum": 2, "round_attempts": 1, "round_timeout_s": 1.0}
    grid = LocalGrid(partitions(2), run_config | short)
    first_round = iter([True, True])
    grid.spoil = lambda message: [message] if next(first_round, False) else []
    with pytest.raises(SystemExit):
        server_app.main(grid, grid.server_context)
    assert summarise(tmp_path / "run" / "events.jsonl")["rounds_done"] == 1
    bare = {"resume": str(tmp_path / "run"), "base_model": "", "out": "", "simulated_sites": ""}
    again = LocalGrid(partitions(2), bare)
    server_app.main(again, again.server_context)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert (summary["state"], summary["rounds_done"], summary["resumed"]) == ("finished", 3, 1)
