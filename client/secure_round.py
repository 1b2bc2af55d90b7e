"""A site's part in the secure sum of one round, behind its policy and its ledger.

The stage ``advertise`` comes with the adapter. The site trains it then, before it says its keys: so
a site that is slow or down is missing from the roster, and costs nothing later. What it trained is
kept like any answer (`client.answers`): as the plain change of the factors, which leaves in
no other form than masked. Each attempt at the round's sum masks that same change. That a site says
its keys tells that its training went well: so the training is in the ledger, with all its cost,
before they leave.

The other stages bring what the server relays. They are judged like the first one, by the same head
and by what was read from its message. The masked vector is on disk, and in the ledger, before
a byte of it leaves.

    STATE/secure/run-<id>/round-<n>.json     the facts of the round's adapter
                          attempt.json, masked, revealed: client.secure_sum_state

Shape letters: N numbers of a piece of the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from client.answers import KEPT_ROUNDS, Answers, Kept
from client.reasons import Refused
from client.request import parse_request
from client.round import Answer, Begun, RoundRequest, train_received
from client.secure_sum_state import SecureSumSite
from client.site_state import SiteStateError
from client.trainer import Facts, Question, Reply, Said, Trainer, facts_of
from client.trainer_link import LinkError
from federation.adapter import Adapter
from federation.atomic import write_atomically
from federation.header import FACTORS, num_numbers
from federation.secure_messages import (
    MAX_MESSAGE_BYTES,
    SecureSumError,
    Stage,
    Terms,
    subject_of,
)
from federation.settings import Settings
from federation.wire import Update

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = "secure"
"""Directory of secure sums in a site's state directory."""
_PIECE = 1 << 18
"""Numbers of a change that are masked at a time."""


class Round(Settings):
    """What a site remembers of a round's first stage for the others."""

    question: str
    """`Question.digest`."""
    data_set: str
    """Digest of the records that it was trained on."""
    base_model: str
    rank: int
    served_rank: int = 0
    alpha: float
    shapes: dict[str, tuple[int, int]]
    num_bytes: int
    adapter: str

    @property
    def facts(self) -> Facts:
        """What its message said of its adapter."""
        return Facts(**self.model_dump(exclude={"question", "data_set"}))


def answer_stage(trainer: Trainer, said: Said, message: Path, scratch: Path) -> Reply:
    """Answer one stage of a secure sum.

    Args:
        trainer: Whose site and gate.
        said: The head of the question, with ``stage``, ``attempt`` and ``secure_sum``.
        message: The adapter in the first stage, later what the server relays.
        scratch: Directory for the answer.

    Raises:
        RequestError: The head is no request.
        Refused: The policy does not allow it, or the records are others now.
        SecureSumError: The protocol does not allow it.
        SiteStateError: What the site kept is damaged.
    """
    asked = parse_request(said.content)
    if not asked.stage:
        raise LinkError("the head says an empty stage: expected one of a secure sum, or none")
    stage = Stage(asked.stage)
    run, server_round = said.request.run, said.request.server_round
    # Asked for where it is used: so it is that of the policy that allowed this stage.
    site = SecureSumSite(trainer.site.state / ROOT, run, trainer.gate.membership)
    metrics: dict[str, float] = {}
    if stage == Stage.ADVERTISE:
        question = _trained(trainer, site, said, message)
        terms, is_private = terms_of(question), said.settings.noise_multiplier > 0
        trained = trained_digest(question)
        answer = site.advertise(terms, is_private=is_private, trained=trained)
        path = _spooled(scratch, answer)
    else:
        if message.stat().st_size > MAX_MESSAGE_BYTES:  # before it is in memory
            raise SecureSumError(
                f"stage {stage} has {message.stat().st_size} bytes: expected at most "
                f"{MAX_MESSAGE_BYTES}"
            )
        question, kept = _asked_again(trainer, said)
        if stage == Stage.MASK:
            question = replace(question, leaving=site.vector_digest)
        trainer.gate.allow(question)
        if stage == Stage.MASK:
            path = _masked(trainer, site, question, kept, message.read_bytes())
            metrics = dict(kept.metrics)
        else:
            path = _spooled(scratch, site.answer(stage, message.read_bytes()))
    num_bytes = path.stat().st_size
    trainer.say("answered", run=run, server_round=server_round, stage=stage, num_bytes=num_bytes)
    return Reply(trainer.reply_head(num_bytes, metrics), path)


def terms_of(question: Question) -> Terms:
    """Return the whole terms of an attempt, as this site knows them.

    Raises:
        SecureSumError: This site trains fewer slices than the adapter has.
    """
    asked = parse_request(question.content)
    if asked.secure_sum is None:
        raise AssertionError("a request with a stage has terms")
    trains = question.request.trains
    return Terms(
        run=asked.run,
        server_round=asked.server_round,
        attempt=asked.attempt,
        subject=subject_of(question.adapter, trains, asked.training),
        num_coordinates=num_numbers(question.shapes, question.rank, trains),
        **asked.secure_sum.model_dump(),
    )


def trained_digest(question: Question) -> str:
    """Return the digest of what decides an update without noise, however its settings are spelled.

    A default that is written out, 1 for 1.0, or a setting that is of no use without noise make no
    other update: so they make no other digest, as they do of ``Terms.subject``.
    """
    settings = question.settings.model_dump(exclude={"record_clip_norm", "checkpoint_every"})
    # -0.0 + 0.0 is 0.0.
    spelled = {k: v + 0.0 if isinstance(v, float) else v for k, v in settings.items()}
    return subject_of(question.adapter, question.request.trains, spelled)


def change_bytes(trained: Adapter, received: Update, factors: str) -> bytes:
    """Return what training changed, as float32 in the order of a message's tensors.

    Raises:
        SecureSumError: It is not finite.
    """
    parts = []
    for module in sorted(trained.shapes()):
        for factor in FACTORS[factors]:
            rows_RC = trained.rows(module, factor, trained.rank)
            change_RC = rows_RC - received.rows(module, factor, trained.rank)
            parts.append(change_RC.flatten().numpy())
    change_N = np.concatenate(parts).astype("<f4", copy=False)
    if not np.isfinite(change_N).all():
        raise SecureSumError("the training gave NaN or infinity: lower the learning rate")
    return change_N.tobytes()


def _trained(trainer: Trainer, sums: SecureSumSite, said: Said, message: Path) -> Question:
    """Return the question of the first stage, once its answer is on disk and charged."""
    site, request = trainer.site, said.request
    received = trainer.opened(said, message)
    if site.rank is not None and site.rank < received.rank:
        raise SecureSumError(
            f"this site trains rank {site.rank} of {received.rank}: a secure sum adds whole "
            "adapters, so expected all"
        )
    facts = facts_of(received, site)
    question = said.about(facts)
    # Before the training: else it would be trained, and charged, to be refused then.
    is_private = said.settings.noise_multiplier > 0
    sums.check(terms_of(question), is_private=is_private, trained=trained_digest(question))
    data_set = trainer.gate.data_set

    def train(begun: Begun) -> Answer:
        # Before the training: what is kept of it must not be taken for other records'.
        _write(site.state, question, data_set, facts)
        trained, answer = train_received(
            received, site, said.settings, request, key=trainer.key(request), begun=begun
        )
        return replace(answer, update=change_bytes(trained, received, request.trains))

    kept, _ = trainer.kept_answer(question, train)
    _refuse_other_records(_read(site.state, said), question, data_set)
    trainer.note(question, kept, trainer.gate.record_training)
    return question


def _asked_again(trainer: Trainer, said: Said) -> tuple[Question, Kept]:
    """Return the question of a later stage, that of the first, and the answer that is on disk."""
    kept = _read(trainer.site.state, said)
    if kept is None or (question := said.about(kept.facts)).digest != kept.question:
        raise SecureSumError(
            f"round {said.request.server_round}: this site advertised for no such round, or on "
            "other terms: begin with stage advertise"
        )
    _refuse_other_records(kept, question, trainer.gate.data_set)
    answers = Answers(trainer.site.state, said.request.run)
    answer = answers.find(said.request.server_round, question.digest)
    if answer is None or answer.is_failed or not answer.is_noted:
        raise SiteStateError(
            f"what was trained for round {said.request.server_round} is gone, or not charged: it "
            "cannot be summed"
        )
    return replace(question, is_repeated=True), answer


def _masked(
    trainer: Trainer, site: SecureSumSite, question: Question, kept: Kept, request: bytes
) -> Path:
    """Return the file of the masked change, which is in the ledger."""
    run, server_round = question.request.run, question.request.server_round
    answers = Answers(trainer.site.state, run)
    # How numbers are rounded is no secret, and the same in every attempt: so two attempts mask
    # the same integers.
    rng = np.random.default_rng(int(kept.sha256, 16))
    path = site.masked_vector(request, _pieces(answers.path(kept)), kept.num_examples, rng)
    digest = site.vector_digest
    trainer.gate.record(question, replace(kept, sha256=digest, num_bytes=path.stat().st_size))
    trainer.say("masked", run=run, server_round=server_round, num_clipped=site.num_clipped)
    return path


def _pieces(path: Path) -> Iterator[NDArray[np.float32]]:
    with path.open("rb") as file:
        while raw := file.read(4 * _PIECE):
            yield np.frombuffer(raw, "<f4")


def _spooled(scratch: Path, content: bytes) -> Path:
    path = scratch / "answer"
    path.write_bytes(content)
    return path


def _refuse_other_records(kept: Round | None, question: Question, data_set: str) -> None:
    """Let nothing leave that is charged to other records than it was trained on.

    Raises:
        Refused: The records changed since the round was trained.
    """
    if kept is None or (kept.question, kept.data_set) != (question.digest, data_set):
        raise Refused(
            "data_set", "this site's records changed since it trained this round: go on to another"
        )


def _path(state: Path, request: RoundRequest) -> Path:
    return state / ROOT / f"run-{request.run}" / f"round-{request.server_round}.json"


def _write(state: Path, question: Question, data_set: str, facts: Facts) -> None:
    """Note the facts of a round, and forget those of rounds whose updates are not kept."""
    kept = Round(question=question.digest, data_set=data_set, **vars(facts))
    (state / ROOT).mkdir(mode=0o700, parents=True, exist_ok=True)
    path = _path(state, question.request)
    write_atomically(path, kept.model_dump_json())
    for old in path.parent.glob("round-*.json"):
        number = int(old.stem.removeprefix("round-"))
        if number <= question.request.server_round - KEPT_ROUNDS:
            old.unlink()


def _read(state: Path, said: Said) -> Round | None:
    path = _path(state, said.request)
    if not path.is_file():
        return None
    try:
        return Round.model_validate_json(path.read_bytes())
    except ValidationError:
        raise SiteStateError(
            f"{path} is damaged: remove it; this site then drops out of the round"
        ) from None
