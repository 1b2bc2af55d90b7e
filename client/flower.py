"""Flower's Fleet API, spoken with flwr's own client functions.

This is the one file that uses names of flwr that are not public. `tests/client/test_fleet.py` holds
each of them to the signature that it had in the versions named there. What a site does with the
messages is in `client.fleet`, which knows no flwr.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, MetricRecord, RecordDict
from flwr.app.message import Message, make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.superlink import FleetError, Superlink
from federation.errors import FedgeError
from federation.grid_sites import bytes_of, num_at_a_time, record_of

OBJECT_BACKOFF_S = (0.03, 0.1)
"""First and longest wait for an object that is announced but not uploaded; flwr has 1 and 10 s."""
MAX_RESPONSE_BYTES = 64 << 20
"""Largest answer to one request that is read: Flower cuts a message into objects of 5 MiB."""
MAX_TTL_S = 7 * 24 * 3600.0
"""How long a message counts at most, whatever it says."""


@dataclass(frozen=True)
class Pulled:
    """A message that was handed out, without its content."""

    message: str
    tree: str
    """Protobuf in base64: the message, and the ids of its objects."""

    @property
    def metadata(self) -> Metadata:
        """Of the message: its run, its id, until when it counts."""
        return message_from_proto(ProtoMessage.FromString(base64.b64decode(self.message))).metadata

    @property
    def root(self) -> ObjectTree:
        """The tree of its objects."""
        tree: ObjectTree = ObjectTree.FromString(base64.b64decode(self.tree))
        return tree


@dataclass(frozen=True)
class Content:
    """What a message holds, as plain values."""

    configs: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, memoryview]
    """Byte arrays by name of the record; what is no such array is left out."""


@dataclass(frozen=True)
class Outgoing:
    """A reply, whole."""

    message: Message
    tree: ObjectTree
    objects: Mapping[str, Any]


class FlowerClient:
    """The requests of one node."""

    def __init__(
        self,
        address: str,
        certificate: bytes,
        key: ec.EllipticCurvePrivateKey,
        superlink: Superlink,
    ) -> None:
        """Nothing is sent yet.

        Args:
            address: HOST:PORT.
            certificate: PEM of the CA that signed the SuperLink's certificate.
            key: The node's.
            superlink: Makes the requests, as often as it takes.

        Raises:
            ValueError: The address is none.
            OSError: The certificate is none.
        """
        # Its console lines hold addresses and tracebacks; ours say what happened.
        logging.getLogger("flwr").disabled = True
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            address,
            False,
            certificate,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        _bound_responses(self._client._client, MAX_RESPONSE_BYTES)
        self._superlink = superlink

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def activate(self, interval_s: float) -> int:
        """Take the lease of this node's key; return the node id."""
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=interval_s)
        return int(self._superlink.call(self._client.ActivateNode, request).node_id)

    def beat_once(self, node_id: int, interval_s: float) -> bool:
        """Prolong the lease, in one try; return whether the SuperLink knows the node."""
        return bool(self._client.SendNodeHeartbeat(_heartbeat(node_id, interval_s)).success)

    def beat(self, node_id: int, interval_s: float) -> bool:
        """Prolong the lease; return whether the SuperLink knows the node."""
        request = _heartbeat(node_id, interval_s)
        return bool(self._superlink.call(self._client.SendNodeHeartbeat, request).success)

    def deactivate_once(self, node_id: int) -> None:
        """Give the lease back, in one try."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def pull(self, node_id: int) -> Pulled | None:
        """Return a message for this node, or None. The SuperLink hands it out this once."""
        request = PullMessagesRequest(node=Node(node_id=node_id))
        response = self._superlink.call(self._client.PullMessages, request)
        if not (response.messages_list and response.message_object_trees):
            return None
        return Pulled(
            _to_text(response.messages_list[0].SerializeToString()),
            _to_text(response.message_object_trees[0].SerializeToString()),
        )

    def bundle(self, node_id: int, run_id: int) -> str:
        """Return the sha256 of the app bundle that a run carries."""
        request = GetRunRequest(node=Node(node_id=node_id), run_id=run_id)
        return str(self._superlink.call(self._client.GetRun, request).run.fab_hash)

    def fetch(self, node_id: int, pulled: Pulled, max_s: float, max_bytes: int) -> Content:
        """Return a message's content; its objects stay where they are.

        Raises:
            FleetError: They are gone, did not come in ``max_s``, have more than ``max_bytes``, or
                are no message.
        """
        node = Node(node_id=node_id)
        pull_one = make_pull_object_fn_protobuf(
            partial(self._superlink.call, self._client.PullObject), node, pulled.metadata.run_id
        )
        pull = _up_to(max_bytes, pull_one)
        first, longest = OBJECT_BACKOFF_S
        try:
            ids = [part.object_id for part in iterate_object_tree(pulled.root)]
            objects = pull_objects(
                ids,
                pull,
                max_concurrent_pulls=num_at_a_time(len(ids)),
                initial_backoff=first,
                backoff_cap=longest,
                max_time=max_s,
                max_tries_per_object=None,
            )
            whole = inflate_object_from_contents(pulled.root.object_id, objects)
            content = whole.content if whole.has_content() else RecordDict()
            arrays = dict(_byte_arrays(content))
            configs = {
                name: dict(record)
                for name, record in content.config_records.items()
                if name not in arrays
            }
            return Content(configs, arrays)
        except FedgeError:
            raise
        except Exception as error:  # a message is made by others: it may raise whatever there is
            raise FleetError(
                f"a message's content cannot be had ({type(error).__name__})"
            ) from None

    def begin_push(self, node_id: int, reply: Outgoing) -> tuple[set[str], str]:
        """Announce a reply; return the ids of the objects that are missing, and a session for them.

        The same reply announced again is the same reply: only what is missing is asked for. Flower
        wants to hear how long the answer took: that is told by the records, so it hears 0.
        """
        request = PushMessagesRequest(
            node=Node(node_id=node_id),
            messages_list=[message_to_proto(remove_content_from_message(reply.message))],
            message_object_trees=[reply.tree],
            clientapp_runtime_list=[0.0],
        )
        response = self._superlink.call(self._client.PushMessages, request)
        return set(response.objects_to_push), str(response.session_id)

    def upload(
        self, node_id: int, reply: Outgoing, missing: Collection[str], sessions: Sequence[str]
    ) -> set[str]:
        """Push objects in the first session that takes each; return the ids of those taken."""
        stored: set[str] = set()

        def push(object_id: str, content: bytes) -> None:
            for session in sessions:
                request = PushObjectRequest(
                    node=Node(node_id=node_id),
                    run_id=reply.message.metadata.run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=session,
                )
                if self._superlink.call(self._client.PushObject, request).stored:
                    stored.add(object_id)
                    return

        wanted = [name for name in reply.objects if name in missing]
        push_object_contents_from_iterable(
            ((name, reply.objects[name].deflate()) for name in wanted),
            push,
            max_concurrent_pushes=num_at_a_time(len(wanted)),
        )
        return stored

    def confirm(self, node_id: int, pulled: Pulled) -> None:
        """Let the objects of a message go: they will not be asked for again."""
        metadata = pulled.metadata
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=node_id),
            run_id=metadata.run_id,
            message_object_id=metadata.message_id,
        )
        self._superlink.call(self._client.ConfirmMessageReceived, request)


def content_of(
    arrays: Mapping[str, bytes],
    metrics: Mapping[str, Mapping[str, float]],
    configs: Mapping[str, Mapping[str, Any]],
) -> RecordDict:
    """Return a reply's content."""
    return RecordDict(
        {
            **{name: record_of(content) for name, content in arrays.items()},
            **{name: MetricRecord(dict(values)) for name, values in metrics.items()},
            **{name: ConfigRecord(dict(values)) for name, values in configs.items()},
        }
    )


def reply_to(pulled: Pulled, received_at: float, answer: RecordDict | tuple[int, str]) -> Outgoing:
    """Return the reply whose id follows from these three and nothing else.

    Args:
        pulled: What is answered.
        received_at: Seconds since 1970: when the reply says that it was made.
        answer: `content_of`, or an error's code and reason.
    """
    asked = pulled.metadata
    metadata = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=received_at,
        ttl=asked.created_at + asked.ttl - received_at,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )
    metadata.delivered_at = ""
    if isinstance(answer, tuple):
        message = make_message(metadata, error=Error(*answer))
    else:
        message = make_message(metadata, content=answer)
    with no_object_id_recompute():
        metadata.__dict__["_message_id"] = message.object_id
        return Outgoing(message, get_object_tree(message), get_all_nested_objects(message))


def expiry_of(pulled: Pulled, received_at: float) -> float:
    """Return until when a reply to a message counts, in seconds since 1970.

    Args:
        pulled: The message.
        received_at: When it came: it counts for `MAX_TTL_S` from then on at most.

    Raises:
        FleetError: It says no such moment.
    """
    ends = float(pulled.metadata.created_at + pulled.metadata.ttl)
    if not math.isfinite(ends):
        raise FleetError("a message says no moment until which it counts")
    return min(ends, received_at + MAX_TTL_S)


def _heartbeat(node_id: int, interval_s: float) -> SendNodeHeartbeatRequest:
    return SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=interval_s)


def _byte_arrays(content: RecordDict) -> Iterator[tuple[str, memoryview]]:
    for name, record in [*content.array_records.items(), *content.config_records.items()]:
        if len(record) == 1:
            with contextlib.suppress(ValueError):
                yield name, bytes_of(next(iter(record.values())))


def _up_to(max_bytes: int, pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return a function that pulls like another one, up to a sum of bytes; from any thread."""
    total, lock = 0, threading.Lock()

    def counted(object_id: str) -> bytes:
        nonlocal total
        content = pull(object_id)
        with lock:
            total += len(content)
        if total > max_bytes:
            raise FleetError(f"a message has more than {max_bytes} bytes, this site's largest")
        return content

    return counted


def _bound_responses(client: httpx.Client, max_bytes: int) -> None:
    """Let a client read no answer beyond a size, and none that grows while it is unpacked."""

    def check(response: httpx.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FleetError("the SuperLink packed an answer that nobody asked it to pack")
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = _Bounded(response.stream, max_bytes)

    client.headers["accept-encoding"] = "identity"
    client.event_hooks = {"response": [check]}


class _Bounded(httpx.SyncByteStream):
    """A body that ends with an error where it grows beyond a size."""

    def __init__(self, stream: httpx.SyncByteStream, max_bytes: int) -> None:
        self._stream, self._left = stream, max_bytes

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._left -= len(chunk)
            if self._left < 0:
                raise FleetError(f"an answer of the SuperLink has over {MAX_RESPONSE_BYTES} bytes")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
