"""How messages go to sites and replies come back: what `federation.grid_sites` needs of a grid.

`PublicPost` does it by the public functions of any grid, `federation.flower_grid` by its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import httpx

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid


@dataclass(frozen=True)
class Taken:
    """A reply, or why there is none."""

    message_id: str
    """Of the message that it answers."""
    message: Message | None
    reason: str = ""


class Post(Protocol):
    """Messages out, replies in. One reply is in memory at a time."""

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send messages; return their ids, nothing for one that the SuperLink does not take."""
        ...

    def look(self, message_ids: Iterable[str]) -> None:
        """Ask which of these messages are answered; `take` brings the replies."""
        ...

    def take(self, limits: Mapping[str, int]) -> Taken | None:
        """Return a reply that is there whole, or None.

        Args:
            limits: By id of the message: the longest update that is taken in. Replies to others
                are forgotten.
        """
        ...


class PublicPost:
    """By the public functions of any grid. It asks for one message id at a time."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._ids: deque[str] = deque()

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send messages; return their ids, nothing for one that the SuperLink does not take."""
        return list(self._grid.push_messages(messages))

    def look(self, message_ids: Iterable[str]) -> None:
        """Note what `take` asks for."""
        self._ids = deque(message_ids)

    def take(self, limits: Mapping[str, int]) -> Taken | None:
        """Return the first reply that is there. What reading it raises is its site's."""
        while self._ids:
            message_id = self._ids.popleft()
            if message_id not in limits:
                continue
            try:
                messages = list(self._grid.pull_messages([message_id]))
            except httpx.HTTPStatusError as error:
                return Taken(message_id, None, fault_of(error))
            except (httpx.HTTPError, OSError):  # the SuperLink's, or this machine's
                raise
            except Exception as error:  # whatever one site sends must not end the others' run
                reason = f"the reply is not readable ({type(error).__name__})"
                return Taken(message_id, None, reason)
            if messages:
                return Taken(message_id, messages[0])
        return None


def fault_of(error: httpx.HTTPStatusError) -> str:
    """Return the reason why a reply cannot be had.

    Raises:
        httpx.HTTPStatusError: It is nothing about one reply: the run is stopped, or its token over.
    """
    status = error.response.status_code
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise error
    return f"the SuperLink answers HTTP {status} when it is asked for the reply: see its log"
