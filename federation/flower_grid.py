"""A run's messages to its sites and their replies, with flwr's own client of the SuperLink.

With `federation.app_bundle` this is the one file of this room that uses names of flwr that are not
public. `tests/federation/test_flower_grid.py` holds each of them to the signature that it had in
the versions named there. For other grids (a simulation's) there is `federation.post.PublicPost`.

What flwr's own grid leaves open, and is closed here: it asks for one reply after another and waits
for the objects of a reply that is announced, 1 s at first and without end, so that one slow site
holds the replies of all others; it takes in whatever length a site sends; and it gives a run up
when an answer of the SuperLink to an upload is lost.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.superlink.grid.http_grid import HttpGrid

from federation.grid_sites import num_at_a_time
from federation.post import Post, PublicPost, Taken, fault_of

RETRY_S = (0.03, 2.0)
"""First and longest wait before a reply that was not whole is tried again; flwr has 1 and 10 s."""
PUSHES = 5
"""How often messages are pushed again when the SuperLink did not take one of their objects."""
FAULTS_S = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Waits after an answer with status 500: the SuperLink's fault, but perhaps not the next time."""
_ASKED_AT_ONCE = 256
"""Ids of messages in one look."""
_OBJECTS, _OBJECT_BYTES = 64, 1 << 18
"""A reply may have so many objects, and one more for so many bytes: flwr cuts at 5 MB."""
_NO_REPLYS = {httpx.codes.NOT_FOUND, httpx.codes.TOO_MANY_REQUESTS}
"""Statuses that no reply can bring about."""
_AWAY = {
    httpx.codes.BAD_GATEWAY,
    httpx.codes.SERVICE_UNAVAILABLE,
    httpx.codes.GATEWAY_TIMEOUT,
}
"""Statuses that a reply brings about only if others are answered at the same time."""
_RECORD_BYTES = 1 << 20
"""What a reply may hold beside its update."""
TOO_LONG = "the reply is longer than an update of this run's adapter can be: it was not taken in"

_log = logging.getLogger(__name__)


class PushError(Exception):
    """The SuperLink does not take the messages."""


class ReplyError(Exception):
    """A reply cannot be had, whatever is waited for."""


def open_post(grid: Grid) -> Post:
    """Return the post that goes with a grid."""
    return HttpPost(grid) if isinstance(grid, HttpGrid) else PublicPost(grid)


@dataclass
class _Announced:
    """A reply that the SuperLink knows of, while its content may still be on its way."""

    root: str
    object_ids: tuple[str, ...]
    """Of its objects, those that a site uploads last first."""
    next_try: float = 0.0
    wait_s: float = RETRY_S[0]
    faults: int = 0
    """Tries that failed by its own fault, as far as it can be told."""


@dataclass
class _Doubted:
    """A message that the SuperLink cannot be asked about, while it can be asked about others."""

    faults: int = 0
    next_try: float = 0.0


class _Room:
    """The bytes that one reply may still have. Its downloads share it."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._lock = threading.Lock()

    def check(self, num_bytes: int) -> None:
        if num_bytes > self._left:
            raise ReplyError(TOO_LONG)

    def use(self, num_bytes: int) -> None:
        with self._lock:
            self._left -= num_bytes
        self.check(0)


class HttpPost:
    """By flwr's client of the Runtime API, as `HttpGrid` holds it."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._client: Any = grid._runtime_client
        self._announced: dict[str, _Announced] = {}
        self._done: list[str] = []
        """Replies whose objects may go: said in the next look, when nobody waits for it."""
        self._doubted: dict[str, _Doubted] = {}
        """By id of the message."""
        self._lost: dict[str, str] = {}
        """By id of the message: why the SuperLink cannot say whether it is answered."""
        self._failing: set[str] = set()
        """Messages whose replies could not be had since the last object of any that could."""
        self._of_this_thread = threading.local()
        """Its `room`: of the reply that the thread downloads."""
        # Before a response's body is read, so that no site chooses this process's memory.
        self._client._client.event_hooks["response"].append(self._refuse_long)

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send messages; return their ids, nothing for one that the SuperLink does not take.

        The same message pushed again is the same message, and the SuperLink asks for what it has
        not. So an object that it did not take, because it has it (it was ended before it could
        say so) or because it forgot the whole message (180 s without an upload), is mended by
        pushing again.

        Raises:
            PushError: It did not take them ``PUSHES`` times, or refuses requests of this size.
        """
        run_id = self._grid.run.run_id
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
            objects: dict[str, Any] = {}
            for message in messages:
                objects.update(get_all_nested_objects(message))
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
                message_object_trees=[get_object_tree(message) for message in messages],
            )
            for _ in range(PUSHES):
                try:
                    response = self._call(self._client.PushMessages, request)
                    missing = set(response.objects_to_push)
                    is_taken = self._upload(run_id, str(response.session_id), objects, missing)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
                        raise PushError("a request is too large (413)") from None
                    raise
                if is_taken:
                    return [message_id or None for message_id in response.message_ids]
                _log.warning("the SuperLink did not take every object: pushing again")
        raise PushError(f"the SuperLink did not take the objects of the messages {PUSHES} times")

    def look(self, message_ids: Iterable[str]) -> None:
        """Ask, in few requests, which of these messages are answered.

        A reply of which the SuperLink cannot say even that costs its own site only: it is asked
        for alone until it was in vain too often. A fault that meets all of them is the
        SuperLink's: no reply is lost by it, and the next look asks again.
        """
        self._let_go()
        known = self._announced.keys() | self._lost.keys()
        wanted = [name for name in message_ids if name not in known]
        alone = [name for name in wanted if name in self._doubted]
        others = [name for name in wanted if name not in self._doubted]
        due = [name for name in alone if time.monotonic() >= self._doubted[name].next_try]
        answered: list[str] = []
        failed: dict[str, httpx.HTTPStatusError] = {}
        for start in range(0, len(others), _ASKED_AT_ONCE):
            chunk = others[start : start + _ASKED_AT_ONCE]
            self._ask_for(chunk, FAULTS_S, answered, failed)
        for name in due:
            self._ask_for([name], (), answered, failed)
        for name in answered:
            self._doubted.pop(name, None)
        for name, error in failed.items():
            status = error.response.status_code
            is_lone = len(failed) == 1 and status not in _AWAY
            if status in _NO_REPLYS or not (answered or is_lone):
                _log.warning("asking again: %s", fault_of(error))
                continue
            doubted = self._doubted.setdefault(name, _Doubted())
            if doubted.faults == len(FAULTS_S):
                self._lost[name] = fault_of(error)
                del self._doubted[name]
            else:
                doubted.next_try = time.monotonic() + FAULTS_S[doubted.faults]
                doubted.faults += 1

    def _ask_for(
        self,
        wanted: Sequence[str],
        waits: Sequence[float],
        answered: list[str],
        failed: dict[str, httpx.HTTPStatusError],
    ) -> None:
        """Ask for some messages; add each to those that the SuperLink could be asked about or not.

        Raises:
            httpx.HTTPStatusError: The run is stopped, or its token over.
        """
        request = PullAppMessagesRequest(message_ids=wanted)
        try:
            response = self._call(self._client.PullMessages, request, waits)
        except httpx.HTTPStatusError as error:
            fault_of(error)
            if len(wanted) == 1 or error.response.status_code in _NO_REPLYS:
                failed |= dict.fromkeys(wanted, error)
                return
            middle = len(wanted) // 2
            for half in (wanted[:middle], wanted[middle:]):
                self._ask_for(half, (), answered, failed)
            return
        answered += wanted
        for head, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            metadata = head.metadata
            if metadata.reply_to_message_id in wanted:
                self._announced[metadata.reply_to_message_id] = _Announced(
                    metadata.message_id, _last_first(tree)
                )

    def take(self, limits: Mapping[str, int]) -> Taken | None:
        """Return the first announced reply that is there whole.

        One that is not is left for later, with growing pauses: it costs the others nothing. One
        that is wanted no more is let go without a download; if it is announced only after that,
        the SuperLink keeps it until the run is over.
        """
        for message_id in self._announced.keys() - limits.keys():
            self._done.append(self._announced.pop(message_id).root)
        for message_id in self._doubted.keys() - limits.keys():
            del self._doubted[message_id]
        while self._lost:
            message_id, reason = self._lost.popitem()
            if message_id in limits:
                return Taken(message_id, None, reason)
        for message_id, announced in list(self._announced.items()):
            if time.monotonic() < announced.next_try:
                continue
            taken = self._try(message_id, announced, limits[message_id])
            if taken is not None:
                del self._announced[message_id]
                return taken
        return None

    def _try(self, message_id: str, announced: _Announced, max_bytes: int) -> Taken | None:
        """Return a reply or why there will be none; None if it is worth another try later.

        What was taken in or refused may go. What the SuperLink could not hand out stays there: it
        may be whole, and whoever looks for the fault will want it.
        """
        try:
            message = self._fetch(announced, max_bytes)
        except httpx.HTTPStatusError as error:
            return self._try_later(message_id, announced, error)
        except (httpx.HTTPError, OSError):
            raise
        except ReplyError as error:
            taken = Taken(message_id, None, str(error))
        except Exception as error:  # whatever one site sends must not end the others' run
            taken = Taken(message_id, None, f"the reply is not readable ({type(error).__name__})")
        else:
            if message is None:
                announced.next_try = time.monotonic() + announced.wait_s
                announced.wait_s = min(2 * announced.wait_s, RETRY_S[1])
                return None
            taken = Taken(message_id, message)
        self._done.append(announced.root)
        return taken

    def _try_later(
        self, message_id: str, announced: _Announced, error: httpx.HTTPStatusError
    ) -> Taken | None:
        """Count a try that the SuperLink failed at; return why there is no reply after too many.

        What meets several replies and no object comes between is the SuperLink's own fault, as is
        what no reply can bring about: it is tried again for as long as the reply is wanted.
        """
        reason, status = fault_of(error), error.response.status_code
        self._failing.add(message_id)
        if status in _NO_REPLYS | _AWAY or len(self._failing) > 1:
            announced.next_try = time.monotonic() + FAULTS_S[-1]
            return None
        if announced.faults == len(FAULTS_S):
            return Taken(message_id, None, reason)
        announced.next_try = time.monotonic() + FAULTS_S[announced.faults]
        announced.faults += 1
        return None

    def _fetch(self, announced: _Announced, max_bytes: int) -> Message | None:
        """Return a reply, or None while it is not whole: nothing is waited for.

        What a site uploads last is asked for first, and the first object that is not there ends the
        try: little comes in vain.

        Raises:
            ReplyError: It is too long, or its objects are gone.
        """
        if len(announced.object_ids) > _OBJECTS + max_bytes // _OBJECT_BYTES:
            raise ReplyError(f"the reply has {len(announced.object_ids)} objects: too many")
        # Its own: flwr ends a try without waiting for what is still on its way.
        room = _Room(max_bytes + _RECORD_BYTES)
        gone: list[str] = []

        def pull(object_id: str) -> bytes:
            request = PullObjectRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, object_id=object_id
            )
            self._of_this_thread.room = room
            answer = self._call(self._client.PullObject, request, ())
            self._failing.clear()
            if not answer.object_found:
                gone.append(object_id)
                raise ObjectPullError(object_id, "gone")
            if not answer.object_available:
                raise ObjectUnavailableError(object_id)
            content: bytes = answer.object_content
            room.use(len(content))
            return content

        try:
            contents = pull_objects(
                list(announced.object_ids),
                pull,
                max_concurrent_pulls=num_at_a_time(len(announced.object_ids)),
                max_tries_per_object=1,
            )
        except ObjectPullError:
            if not gone:
                return None
            raise ReplyError(
                "the site announced a reply and did not upload it before the SuperLink's push "
                "session ended"
            ) from None
        message = cast("Message", inflate_object_from_contents(announced.root, contents))
        message.metadata.__dict__["_message_id"] = announced.root
        return message

    def _upload(
        self, run_id: int, session: str, objects: Mapping[str, Any], missing: set[str]
    ) -> bool:
        """Push objects; return whether the SuperLink took each of them."""

        # Deflated here, when its turn comes: flwr's function queues all that it is given.
        def push(object_id: str, _: bytes) -> None:
            request = PushObjectRequest(
                node=self._grid.node,
                run_id=run_id,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
                session_id=session,
            )
            if not self._call(self._client.PushObject, request).stored:
                raise ObjectPushError(object_id, run_id, session)

        wanted = [(name, b"") for name in objects if name in missing]
        try:
            push_object_contents_from_iterable(
                wanted, push, max_concurrent_pushes=num_at_a_time(len(wanted))
            )
        except ObjectPushError:
            return False
        return True

    def _let_go(self) -> None:
        """Let the objects of the replies that were taken in go."""
        while self._done:
            request = ConfirmMessageReceivedRequest(
                node=self._grid.node,
                run_id=self._grid.run.run_id,
                message_object_id=self._done.pop(),
            )
            try:
                self._call(self._client.ConfirmMessageReceived, request, ())
            except httpx.HTTPStatusError as error:  # they stay until the run is over
                _log.warning("the SuperLink keeps the objects of a reply: %s", fault_of(error))

    def _refuse_long(self, response: httpx.Response) -> None:
        if response.request.url.path.endswith("/pull-object"):
            length = int(response.headers.get("content-length", 0))
            # An object's id and type stand beside its content.
            self._of_this_thread.room.check(length - 1024)

    def _call(
        self, method: Callable[[Any], Any], request: Any, waits: Sequence[float] = FAULTS_S
    ) -> Any:
        """Make a request. flwr's client itself waits while the SuperLink is away."""
        for wait in waits:
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                if not _is_fault(error):
                    raise
            time.sleep(wait)
        return method(request)


def _is_fault(error: httpx.HTTPStatusError) -> bool:
    """Tell whether the same request may succeed later."""
    return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR


def _last_first(tree: ObjectTree) -> tuple[str, ...]:
    """Return the ids of a tree's objects, each once, in the reverse order of their upload."""
    return tuple(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))[::-1]
