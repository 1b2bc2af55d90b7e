"""A site's daemon: takes a run's messages, asks the trainer, sends its answers.

It executes nothing that a run brings, and knows neither the data nor the model: what may be
answered, and with what, is the trainer's decision. Its own state is one message in hand, so that it
may be killed at any moment: the next life takes that message up again.

With ``node = "supernode"`` a stock flower-supernode takes the messages and the daemon only keeps it
and the trainer running; the app of the run then holds the socket's other end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.child import Child, ChildError
from client.claim import claim
from client.health import Health, Status, health_endpoint
from client.peer import peer_at
from client.process import keep_to_itself
from client.reasons import SITE_ERROR
from client.site_log import SiteLog
from client.site_settings import SiteSettings
from client.supernode import refuse_shared_user, supernode_command, supernode_environment
from client.trainer_link import (
    MAX_LOST,
    Answered,
    LinkError,
    TrainerLostError,
    ask,
    request_head,
)
from federation.errors import UserError

if TYPE_CHECKING:
    from client.fleet import Asked, FleetNode

TRAINER_PATIENCE_S = 120.0
"""How long a trainer may end again and again: longer than a machine takes to free its memory."""
TRAINER_START_S = 20.0
"""How long the node waits for its first trainer before it connects without."""
SUPERNODE_PATIENCE_S = 90.0
"""A SuperNode that was killed cannot come back for 60 s: its lease holds, and it ends with 305."""
PROBE_S = 1.0
"""How old /healthz's word of the trainer may be: whoever asks often does not make us ask often."""
GOODBYE_S = 10.0
"""How long a child may take to end once there is nothing in hand."""


@dataclass
class _Life:
    """What the parts of a running daemon share."""

    settings: SiteSettings
    log: SiteLog
    health: Health
    stop: threading.Event
    children: list[Child] = field(default_factory=list)
    drained_at: float = float("inf")
    """Time of `time.monotonic` after which nothing is waited for."""
    is_closed_said: bool = False
    """Whether the log says that the socket's directory may not be entered."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever asks the trainer for `status`."""
    asked_at: float = float("-inf")
    """When `status` asked it last, in the time of `time.monotonic`."""
    is_trainer_up: bool = False
    """What it found."""

    def leave(self, *_: object) -> None:
        """Begin to leave; for signals."""
        if not self.stop.is_set():
            self.drained_at = time.monotonic() + self.settings.drain_s
            self.stop.set()

    def status(self) -> Status:
        """Return the status with the trainer as it is now, or was at most ``PROBE_S`` ago.

        The loop may have waited for the SuperLink, or for an answer, since it last looked.
        """
        with self.lock:
            now = time.monotonic()
            if now - self.asked_at >= PROBE_S:
                self.is_trainer_up = peer_at(self.settings.socket) == "answers"
                self.asked_at = now
            return replace(self.health.status, is_trainer_up=self.is_trainer_up)

    def is_patient(self) -> bool:
        """Whether the round in hand may go on."""
        return time.monotonic() < self.drained_at


def run_daemon(
    settings: SiteSettings, trainer_command: Sequence[str], *, config: Path | None = None
) -> None:
    """Serve until SIGTERM; the round in hand is answered first.

    Args:
        settings: Of the site.
        trainer_command: What starts the trainer as a child; "--parent PID" is added.
        config: The site.toml that the settings are from, which a SuperNode may not change.

    Raises:
        UserError: Another daemon has the state, the SuperLink does not take the key, or a stock
            SuperNode would run as somebody who reaches the records.
        ChildError: The trainer ends as soon as it is started.
    """
    keep_to_itself()
    log = SiteLog("daemon", settings.log, settings.log_level)
    with contextlib.ExitStack() as stack:
        # A moment, for `client status` holds the lock too while it looks.
        stack.enter_context(claim(settings.memory, "daemon", wait_s=0.5))
        status = Status(os.getpid(), node=settings.node)
        if settings.node == "supernode":
            status = replace(status, is_connected=None, is_supernode_up=False)
        health = Health(status, settings.memory / "status.json")
        life = _Life(settings, log, health, threading.Event())
        signal.signal(signal.SIGTERM, life.leave)
        signal.signal(signal.SIGINT, life.leave)
        if settings.health:
            stack.enter_context(health_endpoint(settings.health, life.status))
        log.say("daemon_ready", node=settings.node)
        trainer = _trainer_child(life, trainer_command)
        try:
            if settings.node == "resident":
                _serve(life, trainer)
            else:
                _supervise(life, trainer, config)
        finally:
            if trainer is not None:
                trainer.end(GOODBYE_S)
            node = "is_connected" if settings.node == "resident" else "is_supernode_up"
            health.update(**{node: False}, is_trainer_up=False, is_busy=False)
            log.say("daemon_left")


def _trainer_child(life: _Life, command: Sequence[str]) -> Child | None:
    if not life.settings.is_child:
        return None
    words = [*command, "--parent", str(os.getpid())]
    trainer = Child("trainer", words, patience_s=TRAINER_PATIENCE_S, say=life.log.say)
    life.children.append(trainer)
    return trainer


def _serve(life: _Life, trainer: Child | None) -> None:
    """Be the Flower node: receive, ask the trainer, reply."""
    from client.fleet import FleetNode
    from client.superlink import FleetError, Stopped

    settings = life.settings

    def say(event: str, **values: Any) -> None:
        if event in ("connected", "superlink_back", "superlink_away"):
            life.health.update(is_connected=event != "superlink_away")
        life.log.say(event, **values)

    node = FleetNode(
        settings.superlink,
        settings.root_certificate,
        settings.node_key,
        memory=settings.memory,
        stop=life.stop,
        say=say,
        max_message_bytes=settings.max_message_bytes,
    )
    _await_trainer(life, trainer)  # after key and certificate were looked at
    with contextlib.suppress(Stopped), node:
        answered_at = float("-inf")
        while not life.stop.is_set():
            _keep_up(life, trainer)
            asked = node.receive()
            if asked is None:
                since_answer_s = time.monotonic() - answered_at
                life.stop.wait(pause_s(since_answer_s, settings.poll_s, settings.idle_poll_s))
                continue
            try:
                _answer(life, node, trainer, asked)
            except FleetError as error:
                life.log.say("reply_lost", group=_shown(asked.group), reason=str(error))
                node.give_up()
            except (Stopped, UserError, ChildError):
                raise
            except Exception as error:  # a message is made by others, and must not end this loop
                life.log.say("message_lost", reason=type(error).__name__)
                _refuse(node, asked)
            life.health.update(is_busy=False)
            answered_at = time.monotonic()


def pause_s(since_answer_s: float, shortest_s: float, longest_s: float) -> float:
    """Return how long to wait after a look that found no message.

    The rounds of a run follow each other as soon as its slowest site has answered: 5 % of the time
    since the last answer is little beside that, and leaves the SuperLink alone while others train.
    """
    return min(max(shortest_s, 0.05 * since_answer_s), max(shortest_s, longest_s))


def _refuse(node: FleetNode, asked: Asked) -> None:
    """Answer a message that cannot be read with a constant sentence, or let it go."""
    from client.superlink import Stopped

    try:
        node.reply_error(asked, SITE_ERROR, "this site's node cannot read the message")
    except (Stopped, UserError):
        raise
    except Exception:  # not even its head can be answered
        node.give_up()


def _keep_up(life: _Life, trainer: Child | None) -> None:
    if trainer is not None:
        trainer.keep_up()
    peer = peer_at(life.settings.socket)
    # For good if socket_group is wrong; or the trainer is not ready yet.
    if peer == "forbidden" and not life.is_closed_said:
        life.is_closed_said = True
        life.log.say("trainer_closed", setting="socket_group")
    is_up = peer == "answers" and (trainer is None or trainer.is_running)
    restarts = sum(child.restarts for child in life.children)
    life.health.update(is_trainer_up=is_up, restarts=restarts)


def _await_trainer(life: _Life, trainer: Child | None) -> None:
    """Start the trainer, and give it a while: a mistake in its files ends it in its first seconds.

    Afterwards nobody looks before the SuperLink has answered, which may take days.

    Raises:
        ChildError: It ended, and needs a change.
    """
    _keep_up(life, trainer)
    deadline = time.monotonic() + TRAINER_START_S
    while trainer is not None and not life.health.status.is_trainer_up:
        if time.monotonic() > deadline or life.stop.wait(0.05):
            return
        _keep_up(life, trainer)


def _answer(life: _Life, node: FleetNode, trainer: Child | None, asked: Asked) -> None:
    """Answer the message in hand, or leave it in hand for the next life."""
    from federation.grid_sites import ADAPTER, RESULT, SITE

    group = _shown(asked.group)
    life.log.say("asked", kind=_shown(asked.kind), group=group, bundle=_shown(asked.bundle)[:16])
    life.health.update(run=str(asked.run_id), server_round=_number(asked.group), is_busy=True)
    started = time.monotonic()
    try:
        answer = _answer_of(life, node, trainer, asked)
        if answer is None:
            return
        if answer.code == 0:
            is_taken = node.reply(
                asked,
                arrays={ADAPTER: answer.update},
                metrics={RESULT: answer.head["metrics"]},
                configs={SITE: {"name": answer.head["site"]}},
            )
        else:
            is_taken = node.reply_error(asked, answer.code, str(answer.head.get("reason", "")))
    except LinkError as error:
        is_taken = node.reply_error(asked, SITE_ERROR, str(error))
        answer = Answered({"code": SITE_ERROR}, b"")
    if not is_taken:
        life.log.say("reply_lost", group=group)
    was = life.health.status
    now = datetime.now(UTC).isoformat(timespec="seconds")
    counts = (
        {"num_answered": was.num_answered + 1, "last_answer_at": now}
        if answer.code == 0
        else {"num_refused": was.num_refused + 1}
    )
    life.health.update(**counts)
    life.log.say(
        "replied",
        group=group,
        code=answer.code,
        num_bytes=len(answer.update),
        seconds=round(time.monotonic() - started, 3),
    )


def _answer_of(
    life: _Life, node: FleetNode, trainer: Child | None, asked: Asked
) -> Answered | None:
    """Return the trainer's answer, through as many of its lives as it takes; None = no time left.

    Raises:
        LinkError: The message is no question for a trainer.
    """
    from federation.grid_sites import ADAPTER, ROUND, TRAINING

    if asked.kind != "train":
        raise LinkError(f"this site answers train messages, not {_shown(asked.kind)!r}")
    missing = {ROUND, TRAINING} - asked.configs.keys() | {ADAPTER} - asked.arrays.keys()
    if missing:
        raise LinkError(f"the message holds no {sorted(missing)[0]} record that can be read")
    head = request_head(asked.configs[ROUND], asked.configs[TRAINING], asked.bundle)

    def is_wanted() -> bool:
        return life.is_patient() and time.time() < asked.expires_at

    while is_wanted():
        _keep_up(life, trainer)
        if not life.health.status.is_trainer_up:
            time.sleep(0.05)
            continue
        try:
            answer = ask(life.settings.socket, head, asked.arrays[ADAPTER], is_wanted=is_wanted)
        except TrainerLostError as error:
            if error.was_asked and is_wanted():
                lost = node.note_lost(asked)
                life.log.say("trainer_lost", lost=lost)
                if lost >= MAX_LOST:
                    raise LinkError(f"the trainer ended {lost} times while it answered") from None
            time.sleep(0.1)
            continue
        if trainer is not None:
            trainer.note_work()
        return answer
    return None


def _shown(text: str) -> str:
    """Return the beginning of a run's own word as printable ASCII, for the log."""
    return ascii(text)[1:-1][:40]


def _number(group: str) -> int:
    return int(group) if group.isdecimal() and len(group) < 10 else 0


def _supervise(life: _Life, trainer: Child | None, config: Path | None) -> None:
    """Keep a stock SuperNode running beside the trainer."""
    settings = life.settings
    with _free_port() as port:
        command = supernode_command(settings, port)
    supernode = Child(
        "SuperNode",
        command,
        patience_s=SUPERNODE_PATIENCE_S,
        say=life.log.say,
        environment=supernode_environment(os.environ, settings.memory),
    )
    life.children.append(supernode)
    try:
        while not life.stop.wait(0.2):
            _keep_up(life, trainer)
            if not supernode.is_running:  # no moment in which it runs unchecked
                refuse_shared_user(settings, config)
            if life.health.status.is_trainer_up:
                supernode.keep_up()
            life.health.update(is_supernode_up=supernode.is_running)
    finally:
        supernode.end(GOODBYE_S)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])
