"""The private names of flwr that a run's server uses, and its post against a real SuperLink."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr
import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.superlink import FleetError
from federation import flower_grid
from federation.flower_grid import TOO_LONG, HttpPost, PushError, open_post
from federation.grid_sites import SMALL_BYTES, GridSites, bytes_of, record_of
from federation.post import PublicPost
from federation.sites import Request
from tests.private_names import TESTED, fields, parameters, unlisted
from tests.simulated import LocalGrid

ROOT = Path(__file__).parents[2]

FUNCTIONS = {
    "flwr.app.message.remove_content_from_message": "message",
    "flwr.common.serde.message_to_proto": "message",
    "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects": "obj",
    "flwr.supercore.inflatable.inflatable_object.get_object_tree": "obj",
    "flwr.supercore.inflatable.inflatable_object.iterate_object_tree": "tree",
    "flwr.supercore.inflatable.inflatable_object.no_object_id_recompute": "",
    "flwr.supercore.inflatable.inflatable_utils.ObjectPullError": "object_id reason",
    "flwr.supercore.inflatable.inflatable_utils.ObjectPushError": "object_id run_id session_id",
    "flwr.supercore.inflatable.inflatable_utils.ObjectUnavailableError": "object_id",
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
    "flwr.supercore.runtime.RuntimeHttpClient.ConfirmMessageReceived": "self request",
    "flwr.supercore.runtime.RuntimeHttpClient.PullMessages": "self request",
    "flwr.supercore.runtime.RuntimeHttpClient.PullObject": "self request",
    "flwr.supercore.runtime.RuntimeHttpClient.PushMessages": "self request",
    "flwr.supercore.runtime.RuntimeHttpClient.PushObject": "self request",
    "flwr.superlink.grid.http_grid.HttpGrid": (
        "runtime_api_address insecure root_certificates token"
    ),
}
"""Every function that federation.flower_grid uses and flwr does not promise."""

MESSAGES = {
    "message_pb2.ConfirmMessageReceivedRequest": "node run_id message_object_id",
    "message_pb2.ObjectTree": "object_id children",
    "message_pb2.PullObjectRequest": "node run_id object_id",
    "message_pb2.PullObjectResponse": "object_found object_available object_content",
    "message_pb2.PushObjectRequest": "node run_id object_id object_content session_id",
    "message_pb2.PushObjectResponse": "stored",
    "runtime_pb2.PullAppMessagesRequest": "message_ids",
    "runtime_pb2.PullAppMessagesResponse": "messages_list message_object_trees",
    "runtime_pb2.PushAppMessagesRequest": "messages_list message_object_trees",
    "runtime_pb2.PushAppMessagesResponse": "message_ids objects_to_push session_id",
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


def test_every_private_name_of_the_server_is_in_the_list() -> None:
    listed = {*FUNCTIONS, *(f"flwr.proto.{name}" for name in MESSAGES)}
    source = ROOT / "federation" / "flower_grid.py"
    assert unlisted(source, listed, ["flwr.app", "flwr.serverapp"]) == []


def test_a_grid_that_is_no_connection_to_a_superlink_is_asked_by_its_public_functions() -> None:
    assert isinstance(open_post(LocalGrid([], {})), PublicPost)


@pytest.mark.parametrize("size", [0, 5, SMALL_BYTES, SMALL_BYTES + 1])
def test_bytes_travel_in_one_object_or_in_an_array_and_come_back(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "message").write_bytes(content)
    for record in (record_of(content), record_of(tmp_path / "message")):
        assert isinstance(record, ConfigRecord) == (size <= SMALL_BYTES)
        assert bytes(bytes_of(record["adapter"])) == content
    for strange in (3, "text", Array(np.zeros(4, np.float32))):
        with pytest.raises(ValueError, match=r"int|str|float32"):
            bytes_of(strange)


# Against a real SuperLink


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.superlink import LocalSuperlink

    made = LocalSuperlink(tmp_path_factory.mktemp("superlink"))
    yield made
    made.close()


@pytest.fixture
def post(superlink: Any) -> Iterator[HttpPost]:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = superlink.run_id, 1, 1
    grid = superlink.grid()
    made = open_post(grid)
    assert isinstance(made, HttpPost)
    yield made
    grid._disconnect()


def node_of(superlink: Any) -> Any:
    """Return the site's node; all its lives share a memory, as they must."""
    from client.fleet import FleetNode

    memory = superlink.directory / "memory"
    memory.mkdir(exist_ok=True)
    return FleetNode(
        superlink.address,
        superlink.certificate,
        superlink.node_key,
        memory=memory,
        stop=threading.Event(),
        say=lambda *_, **__: None,
    )


def message_to(node_id: int, content: bytes) -> Message:
    records = {
        "adapter": ArrayRecord({"adapter": Array(np.frombuffer(content, np.uint8))}),
        "round": ConfigRecord({"server_round": 1}),
    }
    return Message(RecordDict(records), dst_node_id=node_id, message_type="train", ttl=600.0)


def answer(node: Any, asked: Any, update: bytes) -> bool:
    return bool(
        node.reply(
            asked,
            arrays={"adapter": update},
            metrics={"result": {"seconds": 1.0}},
            configs={"site": {"name": "bank"}},
        )
    )


def taken(post: HttpPost, *message_ids: str, max_bytes: int = 1 << 30) -> Any:
    """Look and take until there is a reply."""
    limits = dict.fromkeys(message_ids, max_bytes)
    while (reply := post.take(limits)) is None:
        post.look(limits)
    return reply


def num_objects(superlink: Any) -> int:
    from flwr.supercore.object_store.sql_object_store import StoredObject
    from sqlalchemy import func, select

    store = superlink.state.object_store
    with store.session() as session:
        return int(session.scalar(select(func.count()).select_from(StoredObject)))


@pytest.mark.slow
def test_a_message_reaches_its_site_and_the_reply_comes_back_whole(
    superlink: Any, post: HttpPost
) -> None:
    content = bytes(range(256)) * 70_000  # more than one piece of Flower's 5 MB, with repetitions
    update = np.random.default_rng(0).bytes(17_000_000)
    with node_of(superlink) as node:
        (message_id,) = post.push([message_to(superlink.node_id, content)])
        assert message_id is not None
        post.look([message_id])
        assert post.take({message_id: 1 << 30}) is None
        asked = node.receive()
        assert bytes(asked.arrays["adapter"]) == content
        assert answer(node, asked, update)
        reply = taken(post, message_id)
    assert reply.message.content["adapter"]["adapter"].numpy().tobytes() == update
    assert reply.message.metadata.reply_to_message_id == message_id
    post.look([])
    assert num_objects(superlink) == 0, "what was taken in is let go"


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes", [10_000_000, 40_000_000])
def test_a_reply_that_is_too_long_is_refused_before_it_is_in_memory(
    superlink: Any,
    post: HttpPost,
    monkeypatch: pytest.MonkeyPatch,
    num_bytes: int,
) -> None:
    """In many pieces, or in one: nothing is taken in beyond the bound and the records' megabyte."""
    pieces = []
    pull_object = post._client.PullObject
    monkeypatch.setattr(
        post._client,
        "PullObject",
        lambda request: pieces.append(pull_object(request)) or pieces[-1],  # type: ignore[func-returns-value]
    )
    if num_bytes > 30_000_000:
        from flwr.app.message import array

        monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1 << 30)
    with node_of(superlink) as node:
        (message_id,) = post.push([message_to(superlink.node_id, b"adapter")])
        assert message_id is not None
        assert answer(node, node.receive(), np.random.default_rng(1).bytes(num_bytes))
        reply = taken(post, message_id, max_bytes=7_000_000)
    assert (reply.message, reply.reason) == (None, TOO_LONG)
    assert sum(len(piece.object_content) for piece in pieces) <= 7_000_000 + (1 << 20)
    post.look([])
    assert num_objects(superlink) == 0


@pytest.mark.slow
def test_a_site_that_announces_and_never_uploads_costs_its_own_reply_alone(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.corestate import sql_corestate

    with node_of(superlink) as node:
        sent = [message_to(superlink.node_id, bytes([index])) for index in range(2)]
        ids = [str(message_id) for message_id in post.push(sent)]
        asked = node.receive()
        monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 3)
        monkeypatch.setattr(node._client, "upload", lambda *_: set())
        monkeypatch.setattr("client.fleet.PUSHES", 1)
        with pytest.raises(FleetError, match="could not be uploaded"):
            answer(node, asked, b"update" * 99)
        monkeypatch.undo()
        node.give_up()
        post.look(ids)
        assert post.take(dict.fromkeys(ids, 1 << 20)) is None
        other = node.receive()
        assert answer(node, other, b"whole")
        reply = taken(post, *ids)
        assert (reply.message_id, reply.message is None) == (other.message_id, False)
        lost = taken(post, asked.message_id)
    assert (lost.message_id, lost.message) == (asked.message_id, None)
    assert "announced a reply and did not upload it" in lost.reason


def as_if_answers_were_lost(post: HttpPost, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """Let the SuperLink do one request of a push, and ask again as if it had not answered."""
    count = 0

    def twice(method: Any) -> Any:
        def call(request: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                method(request)
            return method(request)

        return call

    for name in ("PushMessages", "PushObject"):
        monkeypatch.setattr(post._client, name, twice(getattr(post._client, name)))


@pytest.mark.slow
@pytest.mark.parametrize("point", range(1, 9))
def test_a_push_survives_the_loss_of_any_one_answer_of_the_superlink(
    superlink: Any,
    post: HttpPost,
    monkeypatch: pytest.MonkeyPatch,
    point: int,
) -> None:
    """As when the SuperLink is killed after it did what was asked and before it said so."""
    as_if_answers_were_lost(post, monkeypatch, point)
    content = bytes([point]) * 1000
    with node_of(superlink) as node:
        ids = post.push([message_to(superlink.node_id, content) for _ in range(2)])
        for _ in ids:
            asked = node.receive()
            assert bytes(asked.arrays["adapter"]) == content
            assert asked.message_id in ids
            assert answer(node, asked, b"update")
            assert taken(post, asked.message_id).message is not None
        assert node.receive() is None, "each message is handed out once"


@pytest.mark.slow
def test_a_push_that_the_superlink_forgot_is_done_again_and_the_site_that_waits_gets_it(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage longer than a push session: the SuperLink lets the message go, head and all."""
    from flwr.supercore.corestate import sql_corestate

    push_messages = post._client.PushMessages
    claimed = []

    def expired(request: Any) -> Any:
        monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 0)
        response = push_messages(request)
        monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 180)
        monkeypatch.setattr(post._client, "PushMessages", push_messages)
        claimed.append(node._client.pull(node.node_id))  # the site has the head by then
        return response

    monkeypatch.setattr(post._client, "PushMessages", expired)
    with node_of(superlink) as node:
        (message_id,) = post.push([message_to(superlink.node_id, b"adapter")])
        assert claimed[0] is not None
        content = node._client.fetch(node.node_id, claimed[0], 5.0, 1 << 20)
        assert bytes(content.arrays["adapter"]) == b"adapter"
        asked = node.receive()
        assert asked.message_id == message_id, "and is handed out again, under the same id"
        assert answer(node, asked, b"update")
        assert taken(post, str(message_id)).message is not None


def refused(status: int) -> Any:
    """Raise what flwr's client raises where the SuperLink answers with this status."""
    asked = httpx.Request("POST", "https://superlink")
    raise httpx.HTTPStatusError("", request=asked, response=httpx.Response(status, request=asked))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PullObject", "PullMessages"])
@pytest.mark.parametrize("status", [500, 413])
def test_a_reply_that_the_superlink_cannot_hand_out_costs_its_own_site_alone(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch, method: str, status: int
) -> None:
    monkeypatch.setattr(flower_grid, "FAULTS_S", (0.01, 0.01))
    with node_of(superlink) as node:
        sent = [message_to(superlink.node_id, bytes([index])) for index in range(3)]
        ids = [str(message_id) for message_id in post.push(sent)]
        for index in range(3):
            assert answer(node, node.receive(), bytes([index]) * 9)
        spoiled = {ids[1]}
        if method == "PullObject":
            post.look(ids)
            tree = {name: set(post._announced[name].object_ids) for name in ids}
            spoiled = tree[ids[1]] - tree[ids[0]] - tree[ids[2]]
        whole = getattr(post._client, method)

        def call(request: Any) -> Any:
            named = {*getattr(request, "message_ids", []), getattr(request, "object_id", "")}
            return refused(status) if spoiled & named else whole(request)

        monkeypatch.setattr(post._client, method, call)
        replies = {}
        while left := [name for name in ids if name not in replies]:
            reply = taken(post, *left)
            replies[reply.message_id] = reply
    assert [replies[name].message is None for name in ids] == [False, True, False]
    assert f"HTTP {status}" in replies[ids[1]].reason


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PullObject", "PullMessages"])
@pytest.mark.parametrize("status", [500, 502, 503, 413, 429, 404])
def test_a_fault_that_meets_every_site_costs_none_its_reply(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch, method: str, status: int
) -> None:
    monkeypatch.setattr(flower_grid, "FAULTS_S", (0.001,) * 3)
    whole = getattr(post._client, method)
    with node_of(superlink) as node:
        sent = [message_to(superlink.node_id, bytes([index])) for index in range(3)]
        ids = [str(message_id) for message_id in post.push(sent)]
        for index in range(3):
            assert answer(node, node.receive(), bytes([index]) * 9)
        limits = dict.fromkeys(ids, 1 << 20)
        monkeypatch.setattr(post._client, method, lambda _: refused(status))
        until = time.monotonic() + 0.3  # far longer than the tries that one reply has
        while time.monotonic() < until:
            post.look(ids)
            assert post.take(limits) is None
        monkeypatch.setattr(post._client, method, whole)
        replies = []
        while len(replies) < 3:
            replies.append(taken(post, *ids))
    assert {reply.message_id for reply in replies} == set(ids)
    assert all(reply.message is not None for reply in replies)


@pytest.mark.slow
def test_one_fault_while_a_spoiled_reply_is_looked_for_costs_no_other_site(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request that names one message fails; the first that names another alone too."""
    monkeypatch.setattr(flower_grid, "FAULTS_S", (0.001,) * 3)
    whole = post._client.PullMessages
    with node_of(superlink) as node:
        sent = [message_to(superlink.node_id, bytes([index])) for index in range(4)]
        ids = [str(message_id) for message_id in post.push(sent)]
        for index in range(4):
            assert answer(node, node.receive(), bytes([index]) * 9)
        hiccups = [ids[1]]

        def call(request: Any) -> Any:
            named = list(request.message_ids)
            if named == hiccups:
                hiccups.clear()
                return refused(500)
            return refused(500) if ids[0] in named else whole(request)

        monkeypatch.setattr(post._client, "PullMessages", call)
        replies = {}
        while left := [name for name in ids if name not in replies]:
            reply = taken(post, *left)
            replies[reply.message_id] = reply
    assert hiccups == []
    assert [replies[name].message is None for name in ids] == [True, False, False, False]


@pytest.mark.slow
def test_the_objects_of_a_reply_that_could_not_be_handed_out_stay(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_grid, "FAULTS_S", (0.001,) * 3)
    with node_of(superlink) as node:
        (message_id,) = post.push([message_to(superlink.node_id, b"adapter")])
        assert answer(node, node.receive(), b"update")
        monkeypatch.setattr(post._client, "PullObject", lambda _: refused(500))
        reply = taken(post, str(message_id))
    assert (reply.message, "HTTP 500" in reply.reason) == (None, True)
    before = num_objects(superlink)
    post.look([])
    assert num_objects(superlink) == before > 0
    superlink.state.object_store.clear()


@pytest.mark.slow
def test_a_superlink_that_knows_the_run_no_more_ends_it(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node_of(superlink) as node:
        (message_id,) = post.push([message_to(superlink.node_id, b"adapter")])
        assert answer(node, node.receive(), b"update")
        monkeypatch.setattr(post._client, "PullMessages", lambda _: refused(403))
        with pytest.raises(httpx.HTTPStatusError):
            post.look([str(message_id)])


def test_what_comes_late_in_a_secure_sum_is_not_even_downloaded(tmp_path: Path) -> None:
    grid = LocalGrid([{}, {}], {})
    grid.answer = lambda message, _: Message(RecordDict(), reply_to=message)
    pulled: list[str] = []
    grid.spoil = lambda message: pulled.append(message.metadata.reply_to_message_id) or [message]  # type: ignore[func-returns-value, attr-defined]
    sites = GridSites(grid, 600.0)  # type: ignore[arg-type]
    (tmp_path / "message").write_bytes(b"a")
    asked = Request(1, tmp_path / "message", {}, secure_sum={"cohort": 2}, stage="mask", attempt=1)
    sites.send(["100", "101"], asked)
    assert (sites.receive() or asked).attempt == 1
    sites.send(["100"], replace(asked, attempt=2))
    sites.send(["101"], replace(asked, attempt=2))
    attempts = [reply.attempt for _ in range(9) if (reply := sites.receive()) is not None]
    assert attempts == [2, 2], "both of the attempt that goes on, none of the one before"
    assert len(pulled) == 3


@pytest.mark.slow
def test_a_masked_vector_that_comes_late_is_let_go_without_a_download(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two replies to an attempt that is over, one of them taken in before; with the real post."""
    del post._client._client.event_hooks["response"][:]  # another post takes its place
    sites = GridSites(post._grid, 600.0)
    assert isinstance(sites._post, HttpPost)
    post = sites._post
    (tmp_path / "message").write_bytes(b"adapter")
    asked = Request(1, tmp_path / "message", {}, secure_sum={"cohort": 2}, stage="mask", attempt=1)
    to = [str(superlink.node_id)]
    superlink.state.object_store.clear()
    attempts = []

    def receive() -> None:
        while (reply := sites.receive()) is None:
            pass
        assert "not readable" not in str(reply.error)
        attempts.append(reply.attempt)

    with node_of(superlink) as node:
        sites.send(to, asked)
        sites.send(to, asked)
        for content in (b"first", b"late"):
            assert answer(node, node.receive(), content)
        receive()
        (late,) = post._announced.values()
        pulled = []
        pull_object = post._client.PullObject
        monkeypatch.setattr(
            post._client,
            "PullObject",
            lambda request: pulled.append(request.object_id) or pull_object(request),  # type: ignore[func-returns-value]
        )
        sites.send(to, replace(asked, attempt=2))
        assert answer(node, node.receive(), b"in time")
        receive()
    assert attempts == [1, 2]
    assert late.root not in pulled
    assert len(pulled) == len(late.object_ids), "as many as one reply has"
    assert sites.receive() is None
    post.look([])
    assert num_objects(superlink) == 0


@pytest.mark.slow
def test_what_is_left_of_one_replys_download_takes_no_room_of_the_next_reply(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try ends at the first object that is missing, while another is still on its way."""
    from flwr.app.message import array
    from flwr.proto.message_pb2 import PullObjectResponse

    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 50_000)
    monkeypatch.setattr(flower_grid, "_RECORD_BYTES", 20_000)
    size, source = 700_000, np.random.default_rng(2)
    with node_of(superlink) as node:
        sent = [message_to(superlink.node_id, bytes([index])) for index in range(2)]
        ids = [str(message_id) for message_id in post.push(sent)]
        for _ in ids:
            assert answer(node, node.receive(), source.bytes(size))
    post.look(ids)
    first, second = post._announced
    of_first = set(post._announced[first].object_ids)
    of_first -= set(post._announced[second].object_ids)
    whole, leftover, is_missing = post._client.PullObject, [], iter([True])
    is_on_its_way, is_next_begun = threading.Event(), threading.Event()

    def call(request: Any) -> Any:
        answered = whole(request)
        if is_next_begun.is_set() or len(answered.object_content) < 50_000:
            return answered
        if request.object_id not in of_first:
            is_next_begun.set()
            leftover[0].join(30)
        elif next(is_missing, False):
            assert is_on_its_way.wait(30)
            return PullObjectResponse(object_found=True, object_available=False)
        else:
            leftover.append(threading.current_thread())
            is_on_its_way.set()
            assert is_next_begun.wait(30)
        return answered

    monkeypatch.setattr(post._client, "PullObject", call)
    replies = [taken(post, *ids, max_bytes=size) for _ in ids]
    assert [reply.reason for reply in replies] == ["", ""]
    assert [reply.message_id for reply in replies] == [second, first]


@pytest.mark.slow
def test_a_superlink_that_takes_no_object_ends_the_push_with_one_sentence(
    superlink: Any, post: HttpPost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.proto.message_pb2 import PushObjectResponse

    monkeypatch.setattr(post._client, "PushObject", lambda _: PushObjectResponse(stored=False))
    monkeypatch.setattr(flower_grid, "PUSHES", 2)
    with pytest.raises(PushError, match="did not take the objects of the messages 2 times"):
        post.push([message_to(superlink.node_id, b"adapter")])
