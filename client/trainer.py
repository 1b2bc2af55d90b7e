"""What a site does with a question: may it be answered, was it answered before, train, keep, note.

The order is the guarantee. Nothing is opened before its head and header were admitted, and nothing
trained before it was allowed; the answer is on disk before it is noted as spent, and it is noted
before a byte of it leaves. A crash between any two of these leads to the same bytes or to none, and
never to a second draw of noise, but for a draw that a kill left without an answer, and that only so
often. A private round that fails is an answer too, the same for each cause.

No socket and no thread here: `client.trainer_service` has those.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from client.answers import MAX_BEGUN, Answers, Kept
from client.reasons import Refused, code_and_reason
from client.round import (
    Answer,
    Begun,
    RoundRequest,
    answer_received,
    num_model_loads,
    open_received,
    read_request,
)
from client.settings import TrainingSettings
from client.site import Site
from client.site_state import SiteState
from client.trainer_link import LinkError, read_object
from federation.accountant import PrivacyEvent
from federation.errors import FedgeError
from federation.settings import load_settings
from federation.wire import Update, header_of

if TYPE_CHECKING:
    from client.secure_sum import Membership
    from federation.header import Header

KeyOf = Callable[[RoundRequest], bytes]
"""The key of a round's random numbers: `client.randomness.RandomStream`."""
_NOT_ASKED = ("bundle", "description", "signature", "stage", "attempt")
"""Keys of a head that say who asks, and how far a secure sum is: not what is to be trained."""


class RoundFailedError(FedgeError):
    """A private round failed after it was allowed: the one sentence that leaves of that."""

    def __init__(self) -> None:
        super().__init__("the site failed in this private round; its own log says why")


@dataclass(frozen=True)
class Facts:
    """What the message itself says, whatever its head claims."""

    base_model: str
    """Digest, in hex."""
    rank: int
    """Of what this site trains: its own rank may be below the message's."""
    served_rank: int
    """Of the message."""
    alpha: float
    shapes: Mapping[str, tuple[int, int]]
    """Out and in features of each module."""
    num_bytes: int
    """Of the message."""
    adapter: str
    """Content digest: the adapter's name on both sides, whatever the message that brought it."""


@dataclass(frozen=True)
class Said:
    """The head of a message, read: what the run says."""

    content: bytes = field(repr=False)
    head: Mapping[str, Any] = field(repr=False)
    request: RoundRequest
    settings: TrainingSettings

    def about(self, facts: Facts) -> Question:
        """Return the question that it is about an adapter."""
        return Question(self.content, self.head, self.request, self.settings, **vars(facts))


@dataclass(frozen=True)
class Question:
    """What a run asks of this site in one round: what its policy judges."""

    content: bytes = field(repr=False)
    """The head as it came: a policy parses it anew, more strictly."""
    head: Mapping[str, Any] = field(repr=False)
    """The same, parsed."""
    request: RoundRequest
    settings: TrainingSettings
    base_model: str
    """This and what follows: see `Facts`."""
    rank: int
    served_rank: int
    alpha: float
    shapes: Mapping[str, tuple[int, int]]
    num_bytes: int
    adapter: str
    is_repeated: bool = False
    """Whether this very question was answered before: what leaves is that answer, and costs no
    privacy that is not spent already."""
    leaving: str = ""
    """sha256 of the masked vector that would leave, where it is made already."""

    @property
    def digest(self) -> str:
        """sha256 of all that decides the answer."""
        asked = {key: value for key, value in self.head.items() if key not in _NOT_ASKED}
        text = json.dumps({**asked, "adapter": self.adapter}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What goes back over the socket."""

    head: Mapping[str, Any]
    update: Path | None = None


class Gate(Protocol):
    """This site's policy and ledger, as the trainer needs them: `client.gate` has the real one."""

    def admit(self, said: Said, header: Header, rank: int) -> None:
        """Raise `client.reasons.Refused` for a message whose head and header the policy refuses.

        It has not been opened: what only its content tells is judged by ``allow``.
        """
        ...

    def allow(self, question: Question) -> PrivacyEvent | None:
        """Return what a question that the policy allows will cost, None for no noise.

        Else it raises `client.reasons.Refused`.
        """
        ...

    def release(self, question: Question, measured: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers that may leave beside the update."""
        ...

    def record(self, question: Question, kept: Kept) -> None:
        """Put what is about to leave into the ledger; it is on disk when this returns.

        Called again for an answer that is sent again: it notes an answer once. In a secure sum
        every attempt masks the same update anew: it notes each, and charges none, for
        ``record_training`` did.
        """
        ...

    def record_training(self, question: Question, kept: Kept) -> None:
        """Charge the training for a secure sum, whose update does not leave by itself."""
        ...

    def membership(self) -> Membership:
        """Return who this site is in secure sums; raise `client.reasons.Refused` if nobody."""
        ...

    @property
    def data_set(self) -> str:
        """Digest of the records that are trained on now."""
        ...


class Trainer:
    """One site's model, data and state, behind its policy and its ledger."""

    def __init__(
        self, site: Site, gate: Gate, say: Callable[..., None], *, key_of: KeyOf | None = None
    ) -> None:
        """Nothing is loaded before the first question that is allowed.

        Args:
            site: Whose model, data and state.
            gate: Its policy and its ledger.
            say: Called with the name of an event and its values, for the log.
            key_of: Makes the noise of a round the same every time, so that a test can compare two
                runs. Whoever knows the key knows the noise: no setting leads here, and a site
                leaves it None, for noise from the operating system.
        """
        self.site = site
        self.gate = gate
        self.say = say
        self._key_of = key_of

    def answer(self, head: bytes, message: Path, scratch: Path) -> Reply:
        """Return the answer to a question; whatever goes wrong is an answer too.

        Args:
            head: JSON, as it came.
            message: The adapter or its change, as it came.
            scratch: Directory for files that may go when this returns.
        """
        try:
            return self._answer(head, message, scratch)
        except Exception as error:
            code, reason = code_and_reason(error, self._own_paths)
            self.say("question_failed", code=code, error=type(error).__name__, where=_where(error))
            return Reply({"code": code, "reason": reason})

    @property
    def _own_paths(self) -> list[str]:
        return [str(path) for path in (self.site.data, self.site.base_model, self.site.state)]

    def _answer(self, head: bytes, message: Path, scratch: Path) -> Reply:
        began = time.perf_counter()
        said = read_head(head)
        if "stage" in said.head:
            from client.secure_round import answer_stage

            return answer_stage(self, said, message, scratch)
        if "secure_sum" in said.head:
            raise LinkError("the head says the terms of a secure sum, and no stage of it")
        request = said.request
        received = self.opened(said, message)
        question = said.about(facts_of(received, self.site))
        kept, training_s = self.kept_answer(
            question,
            lambda begun: answer_received(
                received,
                self.site,
                said.settings,
                request,
                key=self.key(request),
                begun=begun,
            ),
        )
        self.note(question, kept, self.gate.record)
        self.say(
            "answered",
            run=request.run,
            server_round=request.server_round,
            num_bytes=kept.num_bytes,
            is_new=training_s is not None,
            seconds=round(time.perf_counter() - began, 4),
            training_s=round(training_s or 0.0, 4),
            num_model_loads=num_model_loads(),
        )
        update = Answers(self.site.state, request.run).path(kept)
        return Reply(self.reply_head(kept.num_bytes, kept.metrics), update)

    def opened(self, said: Said, message: Path) -> Update:
        """Return what a message brought: opened only once the policy admits what it says of itself.

        Raises:
            Refused: It does not.
            FedgeError: See `client.round.open_received`.
        """
        header = header_of(message)
        rank = header.rank if self.site.rank is None else min(self.site.rank, header.rank)
        self.gate.admit(said, header, rank)
        return open_received(message, self.site, said.request)

    def kept_answer(
        self, question: Question, train: Callable[[Begun], Answer]
    ) -> tuple[Kept, float | None]:
        """Return the answer to a question, on disk, and how long it was trained for, in seconds.

        None where it was given before.

        Args:
            question: What is asked.
            train: Makes the answer, once it is allowed; not called when it was given before.

        Raises:
            Refused: The policy does not allow it, the round was answered to another question, or
                the answer was never charged, and would now be charged to other records.
            RoundFailedError: The round is private and failed, now or when it was asked before.
        """
        answers = Answers(self.site.state, question.request.run)
        kept = answers.find(question.request.server_round, question.digest)
        event = self.gate.allow(replace(question, is_repeated=kept is not None))
        if kept is None:
            SiteState(self.site.state, question.request.run).take_back_unless(answers.is_noted)
            return self._new_answer(question, answers, event, train)
        if not kept.is_noted and kept.data_set != self.gate.data_set:
            raise Refused(
                "data_set",
                "this site's records changed since it trained this round: go on to another",
            )
        if kept.is_failed:
            self.note(question, kept, self.gate.record)
            raise RoundFailedError
        return kept, None

    def note(
        self, question: Question, kept: Kept, record: Callable[[Question, Kept], None]
    ) -> None:
        """Charge an answer, and note that it is charged: now it may be told that there is one.

        Raises:
            RoundFailedError: The round is private and the ledger took no row: whether the training
                went well is not told before it is charged.
            FedgeError: The ledger took no row in a round without noise.
        """
        try:
            record(question, kept)
            Answers(self.site.state, question.request.run).note(kept)
        except Exception as error:
            if not question.settings.noise_multiplier:
                raise
            self._say_failure(error)
            raise RoundFailedError from None

    def _new_answer(
        self,
        question: Question,
        answers: Answers,
        judged: PrivacyEvent | None,
        train: Callable[[Begun], Answer],
    ) -> tuple[Kept, float]:
        """Train; in a private round whatever goes wrong from here on leaves as one sentence.

        Which error it is may depend on the records and on the noise: on numbers that overflow, on
        memory for the records that were drawn. So once noise may have been drawn, a failure is the
        round's answer: it is charged and kept, and whoever asks again gets no second draw. What a
        kill ended is begun anew ``MAX_BEGUN`` - 1 times; then it is such a failure too.
        """
        server_round, started = question.request.server_round, time.perf_counter()
        if judged is not None and answers.num_begun(server_round) >= MAX_BEGUN:
            self.say("private_round_given_up", run=question.request.run, server_round=server_round)
            self._keep_failure(question, answers, judged)
            raise RoundFailedError
        spent: list[PrivacyEvent] = []

        def begun(event: PrivacyEvent | None) -> None:
            if event != judged:
                raise AssertionError(f"allowed was {judged}, and the training would be {event}")
            if event is not None:
                answers.note_begun(server_round)
                spent.append(event)

        try:
            answer = train(begun)
            self.say("trained", run=question.request.run, server_round=server_round)
            measured = {
                "num-examples": answer.num_examples,
                "train_loss": answer.train_loss,
                "seconds": time.perf_counter() - started,
            }
            kept = answers.keep(
                server_round,
                question=question.digest,
                adapter=question.adapter,
                update=answer.update,
                metrics=self.gate.release(question, measured),
                num_examples=answer.num_examples,
                data_set=self.gate.data_set,
                event=answer.event,
            )
        except Exception as error:
            if not question.settings.noise_multiplier:
                raise
            self._say_failure(error)
            for event in spent:
                self._keep_failure(question, answers, event)
            raise RoundFailedError from None
        return kept, answer.training_s

    def key(self, request: RoundRequest) -> bytes | None:
        """Return the key of a round's noise; None, as always but in a test, draws a new one."""
        return self._key_of(request) if self._key_of else None

    def _keep_failure(self, question: Question, answers: Answers, event: PrivacyEvent) -> None:
        try:
            kept = answers.keep(
                question.request.server_round,
                question=question.digest,
                adapter=question.adapter,
                update=b"",
                metrics={},
                data_set=self.gate.data_set,
                event=event,
            )
            self.gate.record(question, kept)
            answers.note(kept)
        except Exception as error:  # a full disk: it has nothing to do with records or noise
            self._say_failure(error)

    def _say_failure(self, error: Exception) -> None:
        """Put into this site's log what does not leave it."""
        _, reason = code_and_reason(error, self._own_paths)
        name = type(error).__name__
        self.say("private_round_failed", error=name, reason=reason, where=_where(error))

    def reply_head(self, num_bytes: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the head of a reply that is no error."""
        return {
            "code": 0,
            "metrics": dict(metrics),
            "site": self.site.name,
            "num_bytes": num_bytes,
        }


def _where(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]


def read_head(head: bytes) -> Said:
    """Return what a head says, and the two parts of it that a round is trained by.

    Raises:
        LinkError: The head is no JSON object, or says no round.
        WireError: It names a format or a factor that this version does not know.
        SettingsError: A training setting is unknown or out of range.
    """
    values = read_object(head)
    server_round = values.get("server_round")
    if type(server_round) is not int or server_round < 1:
        raise LinkError("the head's server_round is no whole number from 1 on")
    training = values.get("training")
    if not isinstance(training, dict):
        raise LinkError("the head says no table of training settings")
    wanted = values.get("metrics", [])
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise LinkError("the head's metrics are no list of names")
    settings = load_settings(TrainingSettings, training, "the run's training settings")
    return Said(head, values, read_request(values), settings)


def facts_of(received: Update, site: Site) -> Facts:
    """Return what a message says of its adapter."""
    return Facts(
        base_model=received.base_model,
        rank=received.rank if site.rank is None else min(site.rank, received.rank),
        served_rank=received.rank,
        alpha=received.alpha,
        shapes=received.shapes(),
        num_bytes=received.num_bytes,
        adapter=received.sha256_of_content,
    )
