"""A site as a Flower node: it takes messages from a SuperLink and sends replies, with no SuperNode.

This is the one file that uses names of flwr that are not public. `tests/client/test_fleet.py` holds
each of them to the signature that it had in the versions named there.

A SuperLink hands a message out once, whatever becomes of it. So what came is written down before
its objects are pulled (`client.in_hand`), and given out again after a crash until it is answered.
The objects of a message stay on the SuperLink until the reply is there (the confirmation lets them
go), so they are not kept here. A reply's id follows from the message and the answer alone: the same
answer given twice is one reply. Between the SuperLink's note that a message was handed out and ours
that it came lie some milliseconds in which a crash loses it; the server asks again then.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
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

from client.in_hand import InHand, Memory
from client.superlink import FleetError, FleetKeyError, RunOverError, Superlink
from federation.errors import UserError
from federation.server_app import bytes_of

HEARTBEAT_S = 30.0
"""Said with every heartbeat; the SuperLink waits twice as long for the next one."""
LAST_HEARTBEAT_S = 10.0
"""Said when the node leaves soon after a reply: the shortest that a SuperLink takes. It has 20 s
then to hand the reply out."""
LEASE_S = 70.0
"""How long a lease that somebody else holds is waited for: 60 s of the SuperLink, and a little."""
OBJECT_BACKOFF_S = (0.03, 0.1)
"""First and longest wait for an object that is announced but not uploaded; flwr has 1 and 10 s."""
PUSHES = 3
"""How often a reply is begun anew when the SuperLink's push session (180 s) ran out on it."""


@dataclass(frozen=True)
class Asked:
    """A message, as plain values."""

    message_id: str
    run_id: int
    """Flower's number of the run."""
    kind: str
    """Flower's message type: "train", "evaluate", "query", …"""
    group: str
    """Of the run's own choice; we put the number of the round there."""
    bundle: str
    """sha256 of the app bundle that the run carries; the bundle itself is not even pulled."""
    expires_at: float
    """Seconds since 1970; no reply counts after it."""
    configs: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)
    arrays: Mapping[str, memoryview] = field(repr=False, default_factory=dict)
    """Byte arrays by name of the record; what is no such array is left out."""


class FleetNode:
    """The connection of one site to one SuperLink, for the time of a ``with`` block."""

    def __init__(
        self,
        superlink: str,
        root_certificate: Path,
        node_key: Path,
        *,
        memory: Path,
        stop: threading.Event,
        say: Callable[..., None],
    ) -> None:
        """Read the key and what a crash left; nothing is sent before the ``with`` block.

        Args:
            superlink: HOST:PORT.
            root_certificate: PEM file of the CA that signed the SuperLink's certificate.
            node_key: OpenSSH private key on an elliptic curve, as `ssh-keygen -t ecdsa` makes it.
            memory: Directory of node.json and asked.json; one node a directory.
            stop: Set by whoever wants the node to leave; every wait for the SuperLink ends then.
            say: Called with the name of an event and its values.

        Raises:
            UserError: Key or certificate cannot be read.
        """
        key = _read_key(node_key)
        try:
            certificate = root_certificate.read_bytes()
        except OSError as error:
            raise UserError(
                f"root_certificate {root_certificate.name}: {error.strerror}: name the PEM file "
                "of the SuperLink's CA"
            ) from None
        # Its console lines hold addresses and tracebacks; ours say what happened.
        logging.getLogger("flwr").disabled = True
        self._public_key = public_key_to_bytes(key.public_key())
        try:
            self._client = FleetHttpClient.from_server_address(
                superlink,
                False,
                certificate,
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(key, key.public_key()),
                ],
            )
        except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
            raise UserError(
                f"superlink {superlink!r} or root_certificate {root_certificate.name} is not "
                f"usable ({type(error).__name__}): expected HOST:PORT and a PEM file"
            ) from None
        self._memory = Memory(memory)
        self._superlink = Superlink(stop, say)
        self._say = say
        self._node: Node | None = None
        self._bundles: dict[int, str] = {}
        self._replied_at = float("-inf")
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def is_connected(self) -> bool:
        """Whether the last request was answered."""
        return self._node is not None and not self._superlink.is_away

    @property
    def node_id(self) -> int:
        """Flower's number of this site."""
        return int(self._connected().node_id)

    def __enter__(self) -> Self:
        """Connect and keep the lease.

        Raises:
            FleetKeyError: The SuperLink does not know this site's key.
            FleetError: Another node holds the lease of this key.
            Stopped: The node was told to leave first.
        """
        try:
            self._node = Node(node_id=self._activate())
        except BaseException:
            self._client.close()
            raise
        self._memory.keep_node(self.node_id)
        self._say("connected", node=str(self._node.node_id))
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease back, as far as nobody is waited for.

        A SuperLink hands out no reply of a site that is gone, not even one that it has: so after a
        reply the lease is only shortened. With a message in hand it is left for the next life.
        """
        self._leaving.set()
        if self._heart.is_alive():
            self._heart.join(timeout=10)
        if self._node is not None and self._memory.in_hand() is None:
            with contextlib.suppress(httpx.HTTPError, RuntimeError):
                if time.monotonic() - self._replied_at < 2 * HEARTBEAT_S:
                    self._client.SendNodeHeartbeat(_heartbeat(self.node_id, LAST_HEARTBEAT_S))
                else:
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
                    self._memory.forget_node()
        self._client.close()

    def receive(self) -> Asked | None:
        """Return the message in hand, or a new one; None when there is none.

        A message that can no longer be answered is let go.

        Raises:
            FleetKeyError: The site was removed from the SuperLink.
            Stopped: The node was told to leave.
        """
        hand = self._memory.in_hand()
        if hand is None:
            response = self._superlink.call(
                self._client.PullMessages, PullMessagesRequest(node=self._connected())
            )
            if not response.messages_list:
                return None
            hand = InHand(
                time.time(),
                _to_text(response.messages_list[0].SerializeToString()),
                _to_text(response.message_object_trees[0].SerializeToString()),
            )
            self._memory.keep(hand)
        try:
            return self._open(hand)
        except RunOverError:
            self._say("run_over")
        except (FleetError, ValueError, KeyError, TypeError) as error:
            self._say("message_lost", reason=type(error).__name__)
        except Exception as error:
            # flwr's own errors for an object that is gone derive from Exception itself.
            if type(error).__module__.partition(".")[0] != "flwr":
                raise
            self._say("message_lost", reason=type(error).__name__)
        self._memory.forget()
        return None

    def reply(
        self,
        asked: Asked,
        *,
        arrays: Mapping[str, bytes],
        metrics: Mapping[str, Mapping[str, float]],
        configs: Mapping[str, Mapping[str, Any]],
        seconds: float,
    ) -> bool:
        """Send the answer; return whether somebody waited for it.

        Args:
            asked: What ``receive`` returned last.
            arrays: Bytes by name.
            metrics: Records of numbers by name.
            configs: Records of scalars by name.
            seconds: That the answer took; Flower adds them up for each run.

        Raises:
            FleetError: The SuperLink refused it.
            Stopped: The node was told to leave; the next life sends it.
        """
        import numpy as np

        records = {
            name: ArrayRecord({name: Array(np.frombuffer(content, dtype=np.uint8))})
            for name, content in arrays.items()
        }
        content = RecordDict(
            {
                **records,
                **{name: MetricRecord(dict(values)) for name, values in metrics.items()},
                **{name: ConfigRecord(dict(values)) for name, values in configs.items()},
            }
        )
        return self._send(asked, content, seconds)

    def reply_error(self, asked: Asked, code: int, reason: str) -> bool:
        """Send an error instead; the first one given for a message is the one that is sent.

        Raises:
            FleetError: The SuperLink refused it.
            Stopped: The node was told to leave; the next life sends it.
        """
        hand = self._held()
        if hand.error is None:
            self._memory.keep(replace(hand, error=(code, reason)))
        else:
            code, reason = hand.error
        return self._send(asked, Error(code, reason), 0.0)

    def give_up(self) -> None:
        """Let the message in hand go without a reply."""
        self._memory.forget()

    def _activate(self) -> int:
        """Return this site's node id; the SuperLink counts it as connected then."""
        deadline = time.monotonic() + LEASE_S
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_S)
        while True:
            try:
                return int(self._superlink.call(self._client.ActivateNode, request).node_id)
            except FleetError as error:
                if (node_id := self._take_over()) is not None:
                    return node_id
                if time.monotonic() >= deadline:
                    raise FleetError(
                        f"the SuperLink did not activate this site in {LEASE_S:g} s ({error}): "
                        "register its public key, or end the other node that uses the same key"
                    ) from None
                self._say("not_activated", seconds_left=round(deadline - time.monotonic()))
                self._superlink.pause(5.0)

    def _take_over(self) -> int | None:
        """Go on with the lease of an earlier life that ended without giving it back.

        The SuperLink takes a heartbeat from whoever holds the key, connected or not.
        """
        node_id = self._memory.node_id()
        if node_id is None:
            return None
        try:
            response = self._superlink.call(self._client.SendNodeHeartbeat, _heartbeat(node_id))
        except (FleetError, FleetKeyError):
            return None
        if not response.success:
            return None
        self._say("lease_taken_over")
        self._replied_at = time.monotonic()  # perhaps: that life may have replied just before
        return node_id

    def _beat(self) -> None:
        wait = 0.0
        while not self._leaving.wait(wait):
            try:
                response = self._client.SendNodeHeartbeat(_heartbeat(self.node_id))
                wait = 0.7 * HEARTBEAT_S if response.success else 5.0
            except Exception as error:  # the loop that pulls meets the same and says it
                self._say("heartbeat_failed", reason=type(error).__name__)
                wait = 2.0

    def _connected(self) -> Node:
        if self._node is None:
            raise ValueError("a FleetNode speaks inside its with block only")
        return self._node

    def _open(self, hand: InHand) -> Asked:
        """Pull a message's objects.

        Raises:
            RunOverError: Its run is over.
            ValueError: It expired.
        """
        message, tree = _from_hand(hand)
        metadata = message.metadata
        if metadata.created_at + metadata.ttl <= time.time():
            raise ValueError("the message expired")
        pull = make_pull_object_fn_protobuf(
            partial(self._superlink.call, self._client.PullObject),
            self._connected(),
            metadata.run_id,
        )
        bundle = self._bundle(metadata.run_id)
        ids = [part.object_id for part in iterate_object_tree(tree)]
        first, longest = OBJECT_BACKOFF_S
        objects = pull_objects(
            ids,
            pull,
            initial_backoff=first,
            backoff_cap=longest,
            max_time=max(1.0, metadata.created_at + metadata.ttl - time.time()),
            max_tries_per_object=None,
        )
        whole = inflate_object_from_contents(tree.object_id, objects)
        content = whole.content if whole.has_content() else RecordDict()
        return Asked(
            metadata.message_id,
            metadata.run_id,
            metadata.message_type,
            metadata.group_id,
            bundle,
            metadata.created_at + metadata.ttl,
            {name: dict(record) for name, record in content.config_records.items()},
            dict(_byte_arrays(content)),
        )

    def _bundle(self, run_id: int) -> str:
        if run_id not in self._bundles:
            request = GetRunRequest(node=self._connected(), run_id=run_id)
            self._bundles[run_id] = str(
                self._superlink.call(self._client.GetRun, request).run.fab_hash
            )
        return self._bundles[run_id]

    def _send(self, asked: Asked, answer: RecordDict | Error, seconds: float) -> bool:
        hand = self._held()
        message = _reply_to(hand, answer)
        if message.metadata.reply_to_message_id != asked.message_id:
            raise ValueError("only the message in hand can be answered")
        try:
            is_taken = self._push(hand, message, seconds)
            self._replied_at = time.monotonic()
            if is_taken:
                confirm = ConfirmMessageReceivedRequest(
                    node=self._connected(),
                    run_id=asked.run_id,
                    message_object_id=asked.message_id,
                )
                self._superlink.call(self._client.ConfirmMessageReceived, confirm)
        except RunOverError:
            is_taken = False
        self._memory.forget()
        return is_taken

    def _push(self, hand: InHand, message: Message, seconds: float) -> bool:
        """Upload a reply, or what is missing of it; return whether the SuperLink took it."""
        with no_object_id_recompute():
            tree = get_object_tree(message)
            objects = get_all_nested_objects(message)
        request = PushMessagesRequest(
            node=self._connected(),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        for _ in range(PUSHES):
            response = self._superlink.call(self._client.PushMessages, request)
            missing = set(response.objects_to_push)
            if tree.object_id not in missing and not hand.sessions:
                return False
            hand = replace(hand, sessions=(*hand.sessions, response.session_id))
            self._memory.keep(hand)
            sessions = [response.session_id]
            if not missing:
                # All is there; or the server took the reply half uploaded and waits for the rest,
                # which only the session of an earlier life may still bring.
                missing, sessions = set(objects), list(hand.sessions[:-1])
            stored = self._upload(message, objects, missing, sessions)
            if stored >= missing or not response.objects_to_push:
                return True
        raise FleetError(
            f"the reply could not be uploaded in {PUSHES} sessions of the SuperLink: its upload "
            "is too slow for the size"
        )

    def _held(self) -> InHand:
        hand = self._memory.in_hand()
        if hand is None:
            raise ValueError("there is no message in hand")
        return hand

    def _upload(
        self,
        message: Message,
        objects: Mapping[str, Any],
        missing: set[str],
        sessions: list[str],
    ) -> set[str]:
        """Push objects in the first session that takes each; return the ids of those taken."""
        stored: set[str] = set()

        def push(object_id: str, content: bytes) -> None:
            for session in sessions:
                request = PushObjectRequest(
                    node=self._connected(),
                    run_id=message.metadata.run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=session,
                )
                if self._superlink.call(self._client.PushObject, request).stored:
                    stored.add(object_id)
                    return

        contents = ((name, objects[name].deflate()) for name in objects if name in missing)
        push_object_contents_from_iterable(contents, push)
        return stored


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a node key.

    Raises:
        UserError: There is none.
    """
    way_out = "make one with `ssh-keygen -t ecdsa -b 384` and register its public half"
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"node_key {path.name}: {error.strerror}: {way_out}") from None
    except Exception:
        raise UserError(f"node_key {path.name} is no OpenSSH private key: {way_out}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"node_key {path.name} is not on an elliptic curve: {way_out}")
    return key


def _heartbeat(node_id: int, interval_s: float = HEARTBEAT_S) -> SendNodeHeartbeatRequest:
    return SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=interval_s)


def _byte_arrays(content: RecordDict) -> Iterator[tuple[str, memoryview]]:
    for name, record in content.array_records.items():
        if len(record) == 1:
            with contextlib.suppress(ValueError):
                yield name, bytes_of(next(iter(record.values())))


def _from_hand(hand: InHand) -> tuple[Message, ObjectTree]:
    message = message_from_proto(ProtoMessage.FromString(base64.b64decode(hand.message)))
    return message, ObjectTree.FromString(base64.b64decode(hand.tree))


def _reply_to(hand: InHand, answer: RecordDict | Error) -> Message:
    """Return the reply whose id follows from the message in hand and the answer alone."""
    asked = _from_hand(hand)[0].metadata
    metadata = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=hand.received_at,
        ttl=asked.created_at + asked.ttl - hand.received_at,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )
    metadata.delivered_at = ""
    if isinstance(answer, Error):
        message = make_message(metadata, error=answer)
    else:
        message = make_message(metadata, content=answer)
    metadata.__dict__["_message_id"] = message.object_id
    return message


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
