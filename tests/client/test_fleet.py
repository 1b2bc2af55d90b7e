"""The private names of flwr that a resident node uses, and the node against a real SuperLink."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flwr
import pytest

from client import superlink as superlink_calls
from client.fleet import FleetNode
from client.in_hand import Memory
from client.superlink import FleetError, FleetKeyError, Stopped
from federation.errors import UserError
from tests.private_names import TESTED, fields, parameters, unlisted

ROOT = Path(__file__).parents[2]
FUNCTIONS = {
    "flwr.app.message.make_message": "metadata content error",
    "flwr.app.message.remove_content_from_message": "message",
    "flwr.app.metadata.Metadata": "run_id message_id src_node_id dst_node_id reply_to_message_id "
    "group_id created_at ttl message_type src_task_id dst_task_id",
    "flwr.common.serde.message_from_proto": "message_proto",
    "flwr.common.serde.message_to_proto": "message",
    "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects": "obj",
    "flwr.supercore.inflatable.inflatable_object.get_object_tree": "obj",
    "flwr.supercore.inflatable.inflatable_object.iterate_object_tree": "tree",
    "flwr.supercore.inflatable.inflatable_object.no_object_id_recompute": "",
    "flwr.supercore.inflatable.inflatable_protobuf_utils.make_pull_object_fn_protobuf": (
        "pull_object_protobuf node run_id"
    ),
    "flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents": (
        "object_id object_contents keep_object_contents objects"
    ),
    "flwr.supercore.inflatable.inflatable_utils.pull_objects": (
        "object_ids pull_object_fn max_concurrent_pulls max_time max_tries_per_object "
        "initial_backoff backoff_cap"
    ),
    "flwr.supercore.inflatable.inflatable_utils.push_object_contents_from_iterable": (
        "object_contents push_object_fn max_concurrent_pushes"
    ),
    "flwr.supercore.interceptors.http.runtime_version.RuntimeVersionHttpInterceptor": (
        "component_name"
    ),
    "flwr.supercore.primitives.asymmetric.public_key_to_bytes": "public_key",
    "flwr.supernode.fleet_http_client.FleetHttpClient.close": "self",
    "flwr.supernode.fleet_http_client.FleetHttpClient.from_server_address": (
        "server_address insecure root_certificates interceptors retry_invoker"
    ),
    "flwr.supernode.fleet_http_client.FleetHttpClient.ActivateNode": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.DeactivateNode": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.SendNodeHeartbeat": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.PullMessages": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.PushMessages": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.GetRun": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.PullObject": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.PushObject": "self request",
    "flwr.supernode.fleet_http_client.FleetHttpClient.ConfirmMessageReceived": "self request",
    "flwr.supernode.node_auth_http_interceptor.NodeAuthHttpInterceptor": "private_key public_key",
}
"""Every function that client.flower uses and flwr does not promise, with its parameters."""

MESSAGES = {
    "fleet_pb2.ActivateNodeRequest": "public_key heartbeat_interval",
    "fleet_pb2.ActivateNodeResponse": "node_id",
    "fleet_pb2.DeactivateNodeRequest": "node_id",
    "fleet_pb2.PullMessagesRequest": "node",
    "fleet_pb2.PullMessagesResponse": "messages_list message_object_trees",
    "fleet_pb2.PushMessagesRequest": (
        "node messages_list message_object_trees clientapp_runtime_list"
    ),
    "fleet_pb2.PushMessagesResponse": "objects_to_push session_id",
    "heartbeat_pb2.SendNodeHeartbeatRequest": "node heartbeat_interval",
    "heartbeat_pb2.SendNodeHeartbeatResponse": "success",
    "message_pb2.PushObjectRequest": "node run_id object_id object_content session_id",
    "message_pb2.PushObjectResponse": "stored",
    "message_pb2.ConfirmMessageReceivedRequest": "node run_id message_object_id",
    "message_pb2.ObjectTree": "object_id children",
    "node_pb2.Node": "node_id",
    "run_pb2.GetRunRequest": "node run_id",
    "run_pb2.Run": "fab_hash",
}
"""Every protobuf message that it fills or reads, with the fields that it needs."""


def test_this_version_of_flwr_is_one_that_was_tested() -> None:
    assert flwr.__version__ in TESTED


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_private_function_has_the_parameters_it_had(name: str) -> None:
    assert parameters(name) == FUNCTIONS[name].split()


@pytest.mark.parametrize("name", MESSAGES)
def test_a_protobuf_message_has_the_fields_we_use(name: str) -> None:
    assert set(MESSAGES[name].split()) <= fields(name)


def test_every_private_name_of_the_node_is_in_the_list() -> None:
    listed = {*FUNCTIONS, *(f"flwr.proto.{name}" for name in MESSAGES)}
    assert unlisted(ROOT / "client" / "flower.py", listed, ["flwr.app"]) == [
        "flwr.app.message.Message",
        "flwr.proto.message_pb2.Message",
    ]


def test_a_key_that_is_none_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    (tmp_path / "node").write_text("no key")
    for key, certificate, sentence in (
        ("gone", "ca.crt", "node_key gone: No such file or directory: make one with"),
        ("node", "ca.crt", "node_key node is no OpenSSH private key: make one with"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            node(tmp_path, tmp_path / key, tmp_path / certificate, "localhost:1")
        assert str(tmp_path) not in str(caught.value)


def test_what_is_in_hand_survives_and_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    from client.in_hand import InHand

    memory = Memory(tmp_path)
    assert memory.in_hand() is None
    kept = InHand(12.5, "bQ==", "dA==", ("a", "b"), (1001, "no"), lives=2, lost=1)
    memory.keep(kept)
    assert Memory(tmp_path).in_hand() == kept
    for damage in ("", "{", "[]", '{"sessions": 3}'):
        (tmp_path / "asked.json").write_text(damage)
        assert memory.in_hand() is None
    memory.forget()
    memory.forget()
    memory.keep_node(7)
    assert memory.node_id() == 7
    memory.forget_node()
    assert memory.node_id() is None


# Against a real SuperLink


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.superlink import LocalSuperlink

    made = LocalSuperlink(tmp_path_factory.mktemp("superlink"))
    yield made
    made.close()


Said = list[tuple[str, dict[str, Any]]]


def node(
    memory: Path,
    key: Path,
    certificate: Path,
    address: str,
    *,
    stop: threading.Event | None = None,
    said: Said | None = None,
) -> FleetNode:
    memory.mkdir(exist_ok=True)

    def say(event: str, **values: Any) -> None:
        if said is not None:
            said.append((event, values))

    return FleetNode(
        address, certificate, key, memory=memory, stop=stop or threading.Event(), say=say
    )


def node_of(superlink: Any, memory: Path | None = None, **more: Any) -> FleetNode:
    """Return the site's node; all its lives share a memory, as they must."""
    memory = memory or superlink.directory / "memory"
    return node(memory, superlink.node_key, superlink.certificate, superlink.address, **more)


def crash(connection: FleetNode) -> None:
    """End a node without a word to the SuperLink."""
    connection._leaving.set()
    connection._heart.join(10)
    connection._client.close()


def answer(connection: FleetNode, asked: Any, update: bytes = b"update") -> bool:
    return connection.reply(
        asked,
        arrays={"adapter": update},
        metrics={"result": {"num-examples": 3, "train_loss": 0.5, "seconds": 1.0}},
        configs={"site": {"name": "bank"}},
    )


@pytest.mark.slow
def test_a_message_comes_as_plain_values_and_its_reply_arrives_whole(
    superlink: Any,
) -> None:
    content = bytes(range(256)) * 50_000  # more than one chunk of Flower's 5 MB
    with node_of(superlink) as connection:
        message_id = superlink.send(content)
        asked = connection.receive()
        assert asked is not None
        assert (asked.message_id, asked.kind, asked.group) == (message_id, "train", "1")
        assert (asked.run_id, asked.bundle) == (superlink.run_id, "ab" * 32)
        assert asked.configs["round"] == {"server_round": 1, "run": "ab" * 8}
        assert bytes(asked.arrays["adapter"]) == content
        assert answer(connection, asked, content[::-1])
        assert connection.receive() is None
    taken = superlink.take_reply(message_id)
    reply = superlink.whole_reply(taken)
    assert reply.content["adapter"]["adapter"].numpy().tobytes() == content[::-1]
    assert reply.content["result"]["num-examples"] == 3
    assert reply.metadata.reply_to_message_id == message_id
    assert [path.name for path in (superlink.directory / "memory").iterdir()] == ["node.json"]


@pytest.mark.slow
def test_the_coordinator_is_told_no_duration(superlink: Any) -> None:
    """Flower adds up what the nodes say of a run; `metrics` and the site's policy decide here."""
    message_id = superlink.send(b"adapter")
    with node_of(superlink) as connection:
        assert answer(connection, connection.receive())
    assert superlink.take_reply(message_id) is not None
    (run,) = superlink.state.get_run_info(run_ids=[superlink.run_id])
    assert run.clientapp_runtime == 0.0


@pytest.mark.slow
def test_a_message_in_hand_is_given_out_again_after_a_crash_and_its_lease_taken_over(
    superlink: Any, tmp_path: Path
) -> None:
    said: Said = []
    first = node_of(superlink)
    first.__enter__()
    message_id = superlink.send(b"adapter")
    assert first.receive() is not None
    crash(first)
    with node_of(superlink, said=said) as second:
        assert said[0][0] == "lease_taken_over"
        asked = second.receive()
        assert asked is not None
        assert asked.message_id == message_id
        assert bytes(asked.arrays["adapter"]) == b"adapter"
        assert answer(second, asked)
    assert superlink.take_reply(message_id) is not None


@pytest.mark.slow
@pytest.mark.parametrize("point", range(1, 12))
@pytest.mark.parametrize("is_taken_early", [False, True])
def test_a_reply_cut_off_at_any_request_is_completed_by_the_next_life(
    superlink: Any, tmp_path: Path, point: int, is_taken_early: bool
) -> None:
    """Taken early: the server took the reply's head while its objects were still to come."""
    message_id = superlink.send(bytes([point]) * 100)
    first = node_of(superlink)
    first.__enter__()
    asked = first.receive()
    assert asked is not None
    requests = 0
    call = first._superlink.call

    def counted(method: Any, request: Any) -> Any:
        nonlocal requests
        requests += 1
        if requests >= point:
            raise Stopped("cut off")
        return call(method, request)

    first._superlink.call = counted  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        answer(first, asked, bytes([point]) * 100_000)
    crash(first)
    taken = superlink.take_reply(message_id) if is_taken_early else None
    with node_of(superlink) as second:
        again = second.receive()
        if again is not None:
            answer(second, again, bytes([point]) * 100_000)
        else:
            assert requests < point, "only a reply that was sent whole is forgotten"
    taken = taken or superlink.take_reply(message_id)
    reply = superlink.whole_reply(taken)
    assert reply.content["adapter"]["adapter"].numpy().tobytes() == bytes([point]) * 100_000


@pytest.mark.slow
def test_the_first_error_given_for_a_message_is_the_one_that_is_sent(
    superlink: Any, tmp_path: Path
) -> None:
    message_id = superlink.send(b"adapter")
    first = node_of(superlink)
    first.__enter__()
    asked = first.receive()
    assert asked is not None
    first._superlink.call = _cut_off  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.reply_error(asked, 1003, "the first")
    crash(first)
    with node_of(superlink) as second:
        again = second.receive()
        assert again is not None
        assert second.reply_error(again, 1001, "the second")
    reply, _ = superlink.take_reply(message_id)
    assert (reply.error.code, reply.error.reason) == (1003, "the first")


def _cut_off(*_: Any) -> Any:
    raise Stopped("cut off")


@pytest.mark.slow
def test_a_message_that_expired_or_whose_objects_are_gone_is_let_go(
    superlink: Any, tmp_path: Path
) -> None:
    said: Said = []
    with node_of(superlink, said=said) as connection:
        message_id = superlink.send(b"adapter")
        superlink.state.object_store.delete(message_id)
        assert connection.receive() is None
        assert connection.receive() is None
        message_id = superlink.send(b"adapter")
        assert connection.receive() is not None
        path = superlink.directory / "memory" / "asked.json"
        in_hand = json.loads(path.read_text())
        from flwr.proto.message_pb2 import Message as ProtoMessage

        message = ProtoMessage.FromString(base64.b64decode(in_hand["message"]))
        message.metadata.ttl = 0.0
        in_hand["message"] = base64.b64encode(message.SerializeToString()).decode()
        path.write_text(json.dumps(in_hand))
        assert connection.receive() is None
        assert not path.is_file()
    assert [name for name, _ in said if name == "message_lost"]


@pytest.mark.slow
def test_an_unregistered_key_and_a_strange_certificate_are_refused(
    superlink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import fleet

    monkeypatch.setattr(fleet, "LEASE_S", 0.0)
    from certificates import make_authority, make_node_key

    stranger = make_node_key(tmp_path / "stranger")
    other = make_authority(tmp_path / "other")
    with pytest.raises(FleetError, match="did not activate this site in 0 s .*: register its"):
        node(tmp_path / "a", stranger, superlink.certificate, superlink.address).__enter__()
    with pytest.raises(FleetError, match="certificate is not signed by root_certificate"):
        node(tmp_path / "b", superlink.node_key, other, superlink.address).__enter__()


@pytest.mark.slow
def test_a_site_that_is_removed_is_told_so(superlink: Any, tmp_path: Path) -> None:
    from certificates import make_node_key
    from flwr.common.constant import NOOP_FLWR_AID

    leaver = make_node_key(tmp_path)
    node_id = superlink.register(leaver)
    with node(tmp_path, leaver, superlink.certificate, superlink.address) as connection:
        assert connection.receive() is None
        superlink.state.delete_node(NOOP_FLWR_AID, node_id)
        with pytest.raises(FleetKeyError, match="does not accept this site's key"):
            connection.receive()


@pytest.mark.slow
def test_a_key_that_another_node_uses_is_waited_for_and_then_refused(
    superlink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import fleet

    said: Said = []
    with node_of(superlink):
        monkeypatch.setattr(fleet, "LEASE_S", 0.0)
        with pytest.raises(FleetError, match="or end the other node that uses the same key"):
            node_of(superlink, tmp_path / "two", said=said).__enter__()
        monkeypatch.setattr(fleet, "LEASE_S", 70.0)
        stop = threading.Event()
        waiting = node_of(superlink, tmp_path / "two", said=said, stop=stop)
        stop.set()
        with pytest.raises(Stopped):
            waiting.__enter__()
    assert said[-1][0] == "not_activated"


@pytest.mark.slow
def test_a_superlink_that_is_restarted_is_waited_for(
    superlink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink_calls, "RETRY_S", (0.05, 0.2))
    said: Said = []
    with node_of(superlink, said=said) as connection:
        message_id = superlink.send(b"adapter")
        superlink.stop()
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(connection.receive()))
        thread.start()
        while ("superlink_away", {"reason": "ConnectError"}) not in said:
            thread.join(0.05)
            assert thread.is_alive()
        assert not connection.is_connected
        superlink.start()
        thread.join(30)
        assert got[0].message_id == message_id
        assert connection.is_connected
        assert answer(connection, got[0])
    assert superlink.take_reply(message_id) is not None
    assert "superlink_back" in [name for name, _ in said]
