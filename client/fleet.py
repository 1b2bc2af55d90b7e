"""A site as a Flower node: it takes messages from a SuperLink and sends replies, with no SuperNode.

A SuperLink hands a message out once, whatever becomes of it. So what came is written down before
its objects are pulled (`client.in_hand`), and given out again after a crash until it is answered.
The objects of a message stay on the SuperLink until the reply is there (the confirmation lets them
go), so they are not kept here. A reply's id follows from the message and the answer alone: the same
answer given twice is one reply. Between the SuperLink's note that a message was handed out and ours
that it came lie some milliseconds in which a crash loses it; the server asks again then.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.flower import FlowerClient, Outgoing, Pulled, content_of, expiry_of, reply_to
from client.in_hand import InHand, Memory
from client.reasons import SITE_ERROR
from client.superlink import (
    CertificateError,
    FleetError,
    FleetKeyError,
    RunOverError,
    Stopped,
    Superlink,
)
from federation.errors import FedgeError, UserError

HEARTBEAT_S = 30.0
"""Said with every heartbeat; the SuperLink waits twice as long for the next one."""
LAST_HEARTBEAT_S = 10.0
"""Said when the node leaves soon after a reply: the shortest that a SuperLink takes. It has 20 s
then to hand the reply out."""
LEASE_S = 70.0
"""How long a lease that somebody else holds is waited for: 60 s of the SuperLink, and a little."""
MAX_LIVES = 10
"""How many lives of this node one message may end before it is answered with an error."""
RECORD_BYTES = 1 << 20
"""For what a message holds beside its adapter."""
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
    configs: Mapping[str, Mapping[str, Any]] = field(repr=False)
    arrays: Mapping[str, memoryview] = field(repr=False)
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
        max_message_bytes: int = 1 << 32,
    ) -> None:
        """Read the key and what a crash left; nothing is sent before the ``with`` block.

        Args:
            superlink: HOST:PORT.
            root_certificate: PEM file of the CA that signed the SuperLink's certificate.
            node_key: OpenSSH private key on an elliptic curve, as `ssh-keygen -t ecdsa` makes it.
            memory: Directory of what is written down (`client.in_hand`); one node a directory.
            stop: Set by whoever wants the node to leave; every wait for the SuperLink ends then.
            say: Called with the name of an event and its values.
            max_message_bytes: Of the largest adapter that is fetched.

        Raises:
            UserError: Key or certificate cannot be read.
        """
        key, certificate = _read_key(node_key), _read_certificate(root_certificate)
        self._memory = Memory(memory)
        self._trust = hashlib.sha256(superlink.encode() + b"\0" + certificate).hexdigest()
        was_trusted = self._memory.was_trusted(self._trust)
        self._superlink = Superlink(stop, say, was_trusted=was_trusted)
        try:
            self._client = FlowerClient(superlink, certificate, key, self._superlink)
        except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
            raise UserError(
                f"superlink {superlink!r} or root_certificate {root_certificate.name} is not "
                f"usable ({type(error).__name__}): expected HOST:PORT and a PEM file"
            ) from None
        self._say = say
        self._max_bytes = max_message_bytes + RECORD_BYTES
        self._node_id: int | None = None
        self._bundles: dict[int, str] = {}
        self._replied_at = float("-inf")
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def is_connected(self) -> bool:
        """Whether the last request was answered."""
        return self._node_id is not None and not self._superlink.is_away

    @property
    def node_id(self) -> int:
        """Flower's number of this site."""
        if self._node_id is None:
            raise ValueError("a FleetNode speaks inside its with block only")
        return self._node_id

    def __enter__(self) -> Self:
        """Connect and keep the lease.

        Raises:
            FleetError: The SuperLink does not know this site's key, or another node holds its
                lease.
            CertificateError: The SuperLink's certificate is not one to trust, and was not before.
            Stopped: The node was told to leave first.
        """
        try:
            self._node_id = self._activate()
        except BaseException:
            self._client.close()
            raise
        self._memory.keep_node(self.node_id)
        self._memory.keep_trusted(self._trust)
        self._say("connected", node=str(self.node_id))
        if (hand := self._memory.in_hand()) is not None:
            self._memory.keep(replace(hand, lives=hand.lives + 1))
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease back, as far as nobody is waited for.

        A SuperLink hands out no reply of a site that is gone, not even one that it has: so after a
        reply the lease is only shortened. With a message in hand it is left for the next life.
        """
        self._leaving.set()
        self._heart.join(timeout=10)
        if self._memory.in_hand() is None:
            with contextlib.suppress(httpx.HTTPError, RuntimeError):
                if time.monotonic() - self._replied_at < 2 * HEARTBEAT_S:
                    self._client.beat_once(self.node_id, LAST_HEARTBEAT_S)
                else:
                    self._client.deactivate_once(self.node_id)
                    self._memory.forget_node()
        self._client.close()

    def receive(self) -> Asked | None:
        """Return the message in hand, or a new one; None when there is none.

        A message that can no longer be answered is let go, and so is one that cannot be read,
        whatever it raises: it would end the next life of this node like this one.

        Raises:
            FleetKeyError: The site was removed from the SuperLink.
            Stopped: The node was told to leave.
        """
        hand = self._memory.in_hand()
        if hand is None:
            pulled = self._client.pull(self.node_id)
            if pulled is None:
                return None
            hand = InHand(time.time(), pulled.message, pulled.tree)
            self._memory.keep(hand)
        try:
            if hand.lives <= MAX_LIVES:
                return self._open(hand)
            self._say("message_lost", reason=f"it ended {hand.lives} lives of this node")
            self._send_error(hand, SITE_ERROR, "this site's node ended with it, again and again")
        except (Stopped, FleetKeyError):
            raise
        except RunOverError:
            self._say("run_over")
        except Exception as error:
            is_ours = isinstance(error, FedgeError)
            reason = str(error)[:200] if is_ours else type(error).__name__
            self._say("message_lost", reason=reason)
        self._memory.forget()
        return None

    def note_lost(self, asked: Asked) -> int:
        """Note that a trainer ended over a message; return how many did, in all lives."""
        hand = self._held(asked)
        hand = replace(hand, lost=hand.lost + 1)
        self._memory.keep(hand)
        return hand.lost

    def reply(
        self,
        asked: Asked,
        *,
        arrays: Mapping[str, bytes],
        metrics: Mapping[str, Mapping[str, float]],
        configs: Mapping[str, Mapping[str, Any]],
    ) -> bool:
        """Send the answer; return whether somebody waited for it.

        Args:
            asked: What ``receive`` returned last.
            arrays: Bytes by name.
            metrics: Records of numbers by name.
            configs: Records of scalars by name.

        Raises:
            FleetError: The SuperLink refused it.
            Stopped: The node was told to leave; the next life sends it.
        """
        hand = self._held(asked)
        pulled = Pulled(hand.message, hand.tree)
        content = content_of(arrays, metrics, configs)
        return self._send(hand, pulled, reply_to(pulled, hand.received_at, content))

    def reply_error(self, asked: Asked, code: int, reason: str) -> bool:
        """Send an error instead; the first one given for a message is the one that is sent.

        Raises:
            FleetError: The SuperLink refused it.
            Stopped: The node was told to leave; the next life sends it.
        """
        return self._send_error(self._held(asked), code, reason)

    def give_up(self) -> None:
        """Let the message in hand go without a reply."""
        self._memory.forget()

    def _activate(self) -> int:
        """Return this site's node id; the SuperLink counts it as connected then."""
        deadline = time.monotonic() + LEASE_S
        while True:
            try:
                return self._client.activate(HEARTBEAT_S)
            except CertificateError:  # no matter of a lease that ends
                raise
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
            is_known = self._client.beat(node_id, HEARTBEAT_S)
        except (FleetError, FleetKeyError):
            return None
        if not is_known:
            return None
        self._say("lease_taken_over")
        self._replied_at = time.monotonic()  # perhaps: that life may have replied just before
        return node_id

    def _beat(self) -> None:
        wait = 0.0
        while not self._leaving.wait(wait):
            try:
                is_known = self._client.beat_once(self.node_id, HEARTBEAT_S)
                wait = 0.7 * HEARTBEAT_S if is_known else 5.0
            except Exception as error:  # the loop that pulls meets the same and says it
                self._say("heartbeat_failed", reason=type(error).__name__)
                wait = 2.0

    def _open(self, hand: InHand) -> Asked:
        """Pull a message's objects.

        Raises:
            RunOverError: Its run is over.
            FleetError: It expired, or its content cannot be had.
        """
        pulled = Pulled(hand.message, hand.tree)
        metadata = pulled.metadata
        expires_at = expiry_of(pulled, hand.received_at)
        left_s = expires_at - time.time()
        if left_s <= 0:
            raise FleetError("the message expired")
        if metadata.run_id not in self._bundles:
            bundle = self._client.bundle(self.node_id, metadata.run_id)
            self._bundles[metadata.run_id] = bundle
        content = self._client.fetch(self.node_id, pulled, max(1.0, left_s), self._max_bytes)
        return Asked(
            metadata.message_id,
            metadata.run_id,
            metadata.message_type,
            metadata.group_id,
            self._bundles[metadata.run_id],
            expires_at,
            content.configs,
            content.arrays,
        )

    def _held(self, asked: Asked) -> InHand:
        hand = self._memory.in_hand()
        if hand is None or Pulled(hand.message, hand.tree).metadata.message_id != asked.message_id:
            raise ValueError("only the message in hand can be answered")
        return hand

    def _send_error(self, hand: InHand, code: int, reason: str) -> bool:
        if hand.error is None:
            hand = replace(hand, error=(code, reason))
            self._memory.keep(hand)
        pulled = Pulled(hand.message, hand.tree)
        reply = reply_to(pulled, hand.received_at, hand.error or (code, reason))
        return self._send(hand, pulled, reply)

    def _send(self, hand: InHand, pulled: Pulled, reply: Outgoing) -> bool:
        try:
            is_taken = self._push(hand, reply)
            self._replied_at = time.monotonic()
            if is_taken:
                self._client.confirm(self.node_id, pulled)
        except RunOverError:
            is_taken = False
        self._memory.forget()
        return is_taken

    def _push(self, hand: InHand, reply: Outgoing) -> bool:
        """Upload a reply, or what is missing of it; return whether the SuperLink took it."""
        for _ in range(PUSHES):
            missing, session = self._client.begin_push(self.node_id, reply)
            if not missing and not hand.sessions:
                return False  # not even its head is wanted: it expired, or was answered
            if not missing:
                # All is there; or the server took the reply half uploaded and waits for the rest,
                # which only the session of an earlier life may still bring.
                self._client.upload(self.node_id, reply, reply.objects, hand.sessions)
                return True
            hand = replace(hand, sessions=(*hand.sessions, session))
            self._memory.keep(hand)
            if self._client.upload(self.node_id, reply, missing, [session]) >= missing:
                return True
        raise FleetError(
            f"the reply could not be uploaded in {PUSHES} sessions of the SuperLink: its upload "
            "is too slow for the size"
        )


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


def _read_certificate(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"root_certificate {path.name}: {error.strerror}: name the PEM file of the "
            "SuperLink's CA"
        ) from None
