"""The ClientApp asked directly, as a server that knows wire version 2 asks it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import client_app
from client.reasons import SITE_ERROR
from client.round import resident_model
from federation.adapter import Adapter, initial_adapter
from federation.base_model import model_digest
from federation.wire import REFERENCE_MISSING, Update, content_digest, encode, open_update
from tests.conftest import write_records

TRAINING = {
    "num_steps": 2,
    "batch_size": 2,
    "learning_rate": 0.01,
    "max_tokens": 64,
    "dtype": "float32",
}


class Server:
    """What a server does for one site: sends adapters and opens the updates."""

    def __init__(self, base_model: Path, directory: Path, node: dict[str, object]) -> None:
        self.directory = directory
        self.digest = model_digest(base_model)
        data = write_records(directory / "bank" / "train.jsonl", 12)
        real = {"data": str(data), "base_model": str(base_model), "state": str(directory / "state")}
        self.node = real | node
        self.run_config: dict[str, object] = {}
        self.served = initial_adapter(base_model, rank=4, alpha=8.0, targets="attention", seed=0)
        self.held: Update | None = None

    def ask(self, server_round: int, message: bytes, **request: object) -> Message:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        simulation = request.pop("simulation", None)
        content = {
            "adapter": ArrayRecord({"adapter": Array(np.frombuffer(message, dtype=np.uint8))}),
            "training": ConfigRecord(TRAINING),
            "round": ConfigRecord({"server_round": server_round, **request}),
        }
        if simulation:
            content["simulation"] = ConfigRecord(simulation)
        asked = Message(content=RecordDict(content), message_type="train", dst_node_id=7)
        asked.metadata.__dict__["_message_id"] = "1"
        context = Context(1, 7, dict(self.node), RecordDict(), dict(self.run_config))
        return client_app.app(asked, context)

    def whole(self, adapter: Adapter | None = None) -> bytes:
        return encode(adapter or self.served, dtype="float32", base_model=self.digest)

    def open(self, message: bytes, name: str, reference: Update | None = None) -> Update:
        path = self.directory / name
        path.write_bytes(message)
        return open_update(path, reference=reference)


def update_of(reply: Message) -> bytes:
    assert reply.has_content(), reply.error.reason
    sent: bytes = reply.content["adapter"]["adapter"].numpy().tobytes()
    return sent


def failure_of(reply: Message) -> tuple[int, str]:
    assert reply.has_error()
    return reply.error.code, reply.error.reason


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Server:
    return Server(tiny_model, tmp_path, {})


def same(one: Adapter, other: Adapter, factors: str = "AB") -> bool:
    return all(
        ("B" not in factors or torch.equal(f.b_OR, other.modules[n].b_OR))
        and ("A" not in factors or torch.equal(f.a_RI, other.modules[n].a_RI))
        for n, f in one.modules.items()
    )


def test_a_request_of_old_gets_a_whole_float32_update_and_leaves_no_state(server: Server) -> None:
    update = server.open(update_of(server.ask(1, server.whole())), "update")
    assert (update.dtype, update.factors, update.reference) == ("float32", "AB", "")
    assert not same(update.adapter(), server.served, "B")
    assert not (server.directory / "state").exists()


@pytest.mark.parametrize("metrics", [["seconds"], ["train_loss", "num-examples"], []])
def test_only_the_numbers_that_are_asked_for_leave(server: Server, metrics: list[str]) -> None:
    reply = server.ask(1, server.whole(), metrics=metrics)
    assert update_of(reply)
    assert set(reply.content["result"]) == set(metrics)


@pytest.mark.parametrize("factors", ["A", "B"])
@pytest.mark.parametrize("uplink", ["float32", "int8"])
def test_a_frozen_factor_comes_back_bit_for_bit(server: Server, factors: str, uplink: str) -> None:
    trained = server.open(update_of(server.ask(1, server.whole())), "first").adapter()
    held = server.open(server.whole(trained), "held")
    message = update_of(
        server.ask(2, server.whole(trained), trains=factors, uplink=uplink, run="a1")
    )
    update = server.open(message, "update", held)
    assert update.factors == factors
    other = "A" if factors == "B" else "B"
    assert same(update.adapter(), trained, other)
    assert not same(update.adapter(), trained, factors)


def test_freezing_a_factor_is_over_when_the_next_round_trains_both(server: Server) -> None:
    first = update_of(server.ask(1, server.whole()))
    update_of(server.ask(1, server.whole(), trains="B"))
    assert update_of(server.ask(1, server.whole())) == first


@pytest.mark.parametrize("uplink", ["int8", "int4"])
def test_changes_down_and_up_over_three_rounds_stay_in_step(server: Server, uplink: str) -> None:
    wires = {"uplink": uplink, "downlink": "int8", "run": "a1"}
    held = server.open(server.whole(), "served-1")
    message, target = server.whole(), server.served
    for number in (1, 2, 3):
        reply = update_of(server.ask(number, message, **wires))
        assert len(reply) < 0.5 * len(server.whole()), "headers weigh in a model this small"
        update = server.open(reply, f"update-{number}", held)
        target = update.adapter()
        change = encode(target, dtype="int8", base_model=server.digest, reference=held)
        arrived = server.open(change, f"change-{number}", held)
        held = server.open(server.whole(arrived.adapter()), f"served-{number + 1}")
        assert held.checksum == arrived.sha256_of_content
        message = change
    kept = {path.name for path in (server.directory / "state" / "run-a1").iterdir()}
    assert len(kept) == 5
    assert not same(target, server.served)


def test_a_round_asked_twice_gives_the_same_bytes(server: Server) -> None:
    wires = {"uplink": "int4", "run": "a1"}
    first = update_of(server.ask(1, server.whole(), **wires))
    second = update_of(server.ask(2, server.whole(), **wires))
    assert update_of(server.ask(2, server.whole(), **wires)) == second
    shutil.rmtree(server.directory / "state")
    assert update_of(server.ask(1, server.whole(), **wires)) == first
    without_first = Server(Path(str(server.node["base_model"])), server.directory / "other", {})
    assert update_of(without_first.ask(2, server.whole(), **wires)) != second, "no residual"


def test_a_site_that_lacks_the_reference_says_so_and_takes_the_whole(server: Server) -> None:
    held = server.open(server.whole(), "served")
    target = server.open(update_of(server.ask(1, server.whole())), "update").adapter()
    change = encode(target, dtype="int8", base_model=server.digest, reference=held)
    wires = {"downlink": "int8", "run": "a1"}
    code, reason = failure_of(server.ask(2, change, **wires))
    assert code == REFERENCE_MISSING
    assert content_digest(server.served, server.digest)[:16] in reason
    assert str(server.directory) not in reason
    update_of(server.ask(2, server.whole(), **wires))
    update_of(server.ask(3, change, **wires))
    another_run = failure_of(server.ask(3, change, downlink="int8", run="b2"))
    assert another_run[0] == REFERENCE_MISSING


def test_a_site_of_rank_2_trains_and_sends_the_first_two_slices(
    tiny_model: Path, tmp_path: Path
) -> None:
    small = Server(tiny_model, tmp_path / "small", {"rank": 2})
    large = Server(tiny_model, tmp_path / "large", {"rank": 64})
    held = small.open(small.whole(), "held")
    for uplink in ("float32", "int8"):
        reply = update_of(small.ask(1, small.whole(), uplink=uplink, run="a1"))
        update = small.open(reply, "update", held)
        assert (update.rank, update.alpha) == (2, 4.0)
        alone = update_of(small.ask(1, small.whole(small.served.first_slices(2))))
        trained = small.open(alone, "alone").adapter()
        for name, factors in update.adapter().modules.items():
            torch.testing.assert_close(factors.b_OR, trained.modules[name].b_OR, atol=1e-3, rtol=0)
    whole = large.open(update_of(large.ask(1, large.whole())), "update")
    assert whole.rank == 4


def test_the_base_is_loaded_once_whatever_the_ranks(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import model

    loads: list[Path] = []
    load = model.load_model

    def counted(directory: Path, dtype: str) -> Any:
        loads.append(directory)
        return load(directory, dtype)

    monkeypatch.setattr(model, "load_model", counted)
    resident_model.cache_clear()
    small = Server(tiny_model, tmp_path / "small", {"rank": 2})
    large = Server(tiny_model, tmp_path / "large", {})
    alternating = [update_of(s.ask(1, s.whole())) for s in (small, large, small, large)]
    assert loads == [tiny_model]
    assert alternating[:2] == alternating[2:], "a relaid model trains as a fresh one"


def test_on_a_real_site_the_simulation_record_is_never_read(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    other = write_records(tmp_path / "planted" / "evil" / "train.jsonl", 30).parents[1]
    planted = {"base_model": "/nowhere", "simulated_sites": str(other)}
    plain = server.ask(1, server.whole())
    reply = server.ask(1, server.whole(), simulation=planted)
    assert update_of(reply) == update_of(plain)
    assert reply.content["result"]["num-examples"] == 12
    del server.node["data"]
    code, reason = failure_of(server.ask(1, server.whole(), simulation=planted))
    assert code == SITE_ERROR
    assert "does not say its data" in reason


@pytest.mark.parametrize(
    "place", ["Jane Doe's ward/for: her/{}", "{tmp}/Jane Doe's ward/for: her/{}", "Jane/{}"]
)
@pytest.mark.parametrize("key", ["data", "base_model"])
def test_where_a_sites_files_lie_is_not_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    server.node[key] = place.format("gone.jsonl", tmp=tmp_path)
    _, reason = failure_of(server.ask(1, server.whole()))
    assert "gone.jsonl does not exist" in reason
    assert "Jane" not in reason
    assert "her" not in reason.replace("Hugging", "")


@pytest.mark.parametrize("variable", ["HOME", "XDG_STATE_HOME"])
def test_where_a_site_keeps_its_state_by_default_is_not_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "mary ann"))
    del server.node["state"]
    update_of(server.ask(1, server.whole(), uplink="int8", run="a1"))
    (state,) = (tmp_path / "mary ann").rglob("run-a1/state.json")
    state.write_text("{")
    _, reason = failure_of(server.ask(2, server.whole(), uplink="int8", run="a1"))
    assert "state.json is damaged" in reason
    assert "mary" not in reason
    assert "ann" not in reason


def test_in_simulation_the_record_goes_before_the_run_config(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    for name in ("bank", "clinic"):
        write_records(tmp_path / "sites" / name / "train.jsonl", 6 if name == "bank" else 9)
    record = {"base_model": str(tiny_model), "simulated_sites": str(tmp_path / "sites")}
    server.node = {"partition-id": 1}
    reply = server.ask(1, server.whole(), simulation=record, uplink="int8", run="a1")
    assert reply.content["result"]["num-examples"] == 9
    assert (tmp_path / "site-state" / "clinic" / "run-a1" / "state.json").is_file()
    server.run_config = record
    assert server.ask(1, server.whole()).content["result"]["num-examples"] == 9


@pytest.mark.parametrize(
    ("request_of_the_round", "sentence"),
    [
        ({"uplink": "int3"}, "the round's uplink is 'int3', this site knows float32, bfloat16"),
        ({"trains": "C"}, "the round's trains is 'C', this site knows AB, B, A"),
        ({"uplink": "int8"}, "the run calls itself '': expected 1 to 64 hex digits"),
        ({"uplink": "int8", "run": "../../up"}, "the run calls itself '"),
    ],
)
def test_a_round_that_this_site_does_not_know_is_refused_in_one_sentence(
    server: Server, request_of_the_round: dict[str, object], sentence: str
) -> None:
    code, reason = failure_of(server.ask(1, server.whole(), **request_of_the_round))
    assert code == SITE_ERROR
    assert sentence in reason


def test_a_site_without_a_trainer_takes_part_in_no_secure_sum(
    tiny_model: Path, tmp_path: Path
) -> None:
    server = Server(tiny_model, tmp_path, {})
    reply = server.ask(1, server.whole(), run="ab", stage="advertise", attempt=1)
    assert reply.error.code == SITE_ERROR
    assert "only a site's trainer answers: start `client daemon`" in reply.error.reason
