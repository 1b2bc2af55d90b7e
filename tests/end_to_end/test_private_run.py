"""A run with differential privacy on three sites whose policies are the template's.

Flower's messages, the real trainer, the real policy and the real ledger of every site, in this
process and without a network.
"""

import json
import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message
from flwr.common.config import parse_config_args

from client.fingerprint import fingerprint, read_secret
from client.flower import content_of
from client.gate import SiteGate
from client.ledger import LEDGER, Ledger, Spent, read_ledger
from client.policy import Policy, read_policy
from client.policy_template import policy_template
from client.request import SiteRequest, parse_request, with_facts
from client.round import site_records
from client.site import Site
from client.trainer import Trainer
from client.trainer_link import request_head
from client.verdict import judge
from federation import server_app
from federation.accountant import PrivacyEvent, epsilon_of
from federation.adapter import read_adapter
from federation.events import Event, RoundFinished, SiteFailed, UpdateReceived, read_events
from federation.grid_sites import ADAPTER, RESULT, ROUND, SITE, TRAINING, bytes_of
from federation.plan import privacy_cost
from federation.settings import FederationSettings, load_settings
from federation.status import summarise
from tests.client.policy_example import opened_template
from tests.conftest import write_records
from tests.simulated import LocalGrid

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "running-across-institutions.md"
NUM_RECORDS, DELTA = 40, 1e-6
RUN_ID, BASE = "ab" * 16, "d" * 64
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
UNSPENT = Spent(events=(), num_records=4000, answered={})
ROUND_COST = PrivacyEvent(noise_multiplier=2.0, sampling_rate=4 / NUM_RECORDS, steps=2)
"""What a round of `RUN` spends at each site."""
RUN: dict[str, Any] = {
    "num_rounds": 4,
    "num_sites": 3,
    "quorum": 2,
    "round_attempts": 1,
    "aggregation": "alternating",
    "metrics": "",
    "adapter.rank": 4,
    "training.num_steps": 2,
    "training.batch_size": 4,
    "training.max_tokens": 64,
    "training.dtype": "float32",
    "training.noise_multiplier": 2.0,
}


class Institution:
    """One site: its trainer behind its policy and its ledger."""

    def __init__(self, base_model: Path, directory: Path, epsilon: float) -> None:
        data = write_records(directory / "data.jsonl", NUM_RECORDS, topic=directory.name)
        self.site = Site(base_model, data, directory.name, directory / "state", None)
        self.site.state.mkdir()
        policy = directory / "policy.toml"
        policy.write_text(opened_template(epsilon))
        data_set = fingerprint(site_records(data), read_secret(self.site.state))
        ledger = Ledger.open(self.ledger)
        self.gate = SiteGate(
            read_policy(policy), ledger, data_set, say=lambda *_, **__: None, now=lambda: NOON
        )
        self.trainer = Trainer(self.site, self.gate, say=lambda *_, **__: None)

    @property
    def ledger(self) -> Path:
        return self.site.state / LEDGER

    def answer(self, message: Message) -> Message:
        """Answer as the daemon does, without its socket."""
        scratch = Path(tempfile.mkdtemp(dir=self.site.state))
        arrived = scratch / "message"
        arrived.write_bytes(bytes_of(message.content[ADAPTER][ADAPTER]))
        records = message.content
        head = request_head(dict(records[ROUND]), dict(records[TRAINING]), "c" * 64)
        reply = self.trainer.answer(json.dumps(head).encode(), arrived, scratch)
        if reply.update is None:
            return Message(Error(reply.head["code"], reply.head["reason"]), reply_to=message)
        content = content_of(
            {ADAPTER: reply.update.read_bytes()},
            {RESULT: reply.head["metrics"]},
            {SITE: {"name": reply.head["site"]}},
        )
        return Message(content, reply_to=message)


@pytest.fixture
def institutions(tiny_model: Path, tmp_path: Path) -> Iterator[list[Institution]]:
    """Three sites; the budget of the last, clinic, is enough for two rounds and not for three."""
    two, three = (epsilon_of([ROUND_COST] * rounds, DELTA) for rounds in (2, 3))
    budgets = {"bank": 8.0, "billing": 8.0, "clinic": (two + three) / 2}
    sites = [Institution(tiny_model, tmp_path / name, budget) for name, budget in budgets.items()]
    with ExitStack() as stack:
        for each in sites:
            stack.enter_context(each.gate)
        yield sites


def grid_of(institutions: list[Institution], base_model: Path, out: Path, **more: Any) -> LocalGrid:
    values = RUN | {"base_model": str(base_model), "out": str(out)} | more
    grid = LocalGrid([{"name": each.site.name} for each in institutions], values)
    by_name = {each.site.name: each for each in institutions}

    def answer(message: Message, context: Context) -> Message:
        return by_name[str(context.node_config["name"])].answer(message)

    grid.answer = answer
    return grid


def events(out: Path, kind: type[Event]) -> list[Any]:
    return [event for _, event in read_events(out / "events.jsonl") if isinstance(event, kind)]


def test_a_private_run_goes_on_without_the_site_whose_budget_is_spent(
    institutions: list[Institution],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    grid = grid_of(institutions, tiny_model, out)
    server_app.main(grid, grid.server_context)

    finished = events(out, RoundFinished)
    assert [(e.num_updates, e.train_loss) for e in finished] == [(n, None) for n in (3, 3, 2, 2)]
    assert summarise(out / "events.jsonl")["state"] == "finished"
    assert read_adapter(out / "adapter").rank == 4

    limit = f"{read_policy(institutions[2].site.data.parent / 'policy.toml').privacy.epsilon:.15g}"
    sentence = (
        "refused by this site's policy (privacy.epsilon): the privacy budget of this site's data "
        f"(epsilon {limit} for life) does not cover this round"
    )
    failed = events(out, SiteFailed)
    assert [(e.server_round, e.site) for e in failed] == [(3, "102"), (4, "102")]
    assert all(sentence in e.reason for e in failed)
    assert f"round 3: site 102 failed: {failed[0].reason}\n" in capsys.readouterr().err

    # Nothing of the records but noised updates left a site, and its ledger has each once.
    updates = events(out, UpdateReceived)
    assert {(u.num_examples, u.train_loss) for u in updates} == {(None, None)}
    for each, rounds in zip(institutions, (4, 4, 2), strict=True):
        rows = read_ledger(each.ledger).rows
        assert [row.server_round for row in rows] == list(range(1, rounds + 1))
        assert {row.event for row in rows} == {ROUND_COST}
        assert {tuple(row.metrics) for row in rows} == {()}
        sent = {u.sha256 for u in updates if u.name == each.site.name}
        assert {row.sha256 for row in rows} == sent


def test_a_run_that_asks_for_what_depends_on_the_records_is_refused_by_name(
    institutions: list[Institution], tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    grid = grid_of(institutions, tiny_model, out, metrics="num-examples,train_loss,seconds")
    with pytest.raises(SystemExit):
        server_app.main(grid, grid.server_context)
    reasons = {event.reason for event in events(out, SiteFailed)}
    assert len(reasons) == 1
    assert "(metrics.allowed): metric num-examples is not allowed: ask without it" in reasons.pop()
    assert [read_ledger(each.ledger).rows for each in institutions] == [[], [], []]


def guide_block(name: str) -> str:
    pattern = rf"<!-- tested: {name} -->\n```bash\n(.*?)```"
    (block,) = re.findall(pattern, GUIDE.read_text(), re.DOTALL)
    return str(block)


def asked_last(settings: FederationSettings, **more: Any) -> SiteRequest:
    """Return what a site is asked in the last round of a run."""
    head = {
        "run": RUN_ID,
        "bundle": "c" * 64,
        "server_round": settings.num_rounds,
        "uplink": settings.wire.uplink,
        "downlink": settings.wire.downlink,
        "aggregation": settings.aggregation,
        "training": settings.training,
        "metrics": settings.asked_metrics,
    }
    return with_facts(
        parse_request(json.dumps(head | more).encode()),
        shapes={"model.layers.0.self_attn.q_proj": (64, 64)},
        rank=settings.adapter.rank,
        alpha=settings.adapter.alpha,
        base_model=BASE,
        content_digest="e" * 64,
    )


def test_the_guides_private_run_is_one_that_the_template_lets_in() -> None:
    plan, start = (shlex.split(line) for line in guide_block("private run").splitlines())
    values = parse_config_args([start[-1]])
    settings = load_settings(FederationSettings, values, "the guide")
    planned = dict(pair.split("=") for flag, pair in pairwise(plan) if flag == "--set")
    assert {key: str(values[key]) for key in planned} == planned
    asked = asked_last(settings, trains="A", cohort=settings.quorum)
    policy = Policy.model_validate(tomllib.loads(opened_template(8.0)))
    assert judge(asked, policy, UNSPENT, NOON, epsilon_of).rule == "allowed"
    said = dict(pairwise(plan))
    cost = privacy_cost(settings, int(said["--records"]), 1e-6, float(said["--epsilon"]))
    assert f"epsilon {cost.epsilon:.2f} (delta 1e-6" in GUIDE.read_text()
    assert f"and {cost.noise_for_target:.4g} as the noise" in GUIDE.read_text()


def test_the_run_of_the_site_guide_is_let_in_by_what_init_writes() -> None:
    """With the base model and the run named and the other sites listed, and nothing else edited."""
    guide = GUIDE.with_name("setting-up-a-site.md").read_text()
    (line,) = re.findall(r"^    (flwr run .*)$", guide, re.MULTILINE)
    settings = load_settings(
        FederationSettings, parse_config_args([shlex.split(line)[-1]]), "the guide"
    )
    sums = settings.secure_sum
    terms = {
        "cohort": settings.num_sites,
        "threshold": sums.threshold,
        "clip": sums.clip,
        "bits": sums.bits,
        "max_examples": sums.max_examples,
    }
    asked = asked_last(settings, trains="B", stage="advertise", attempt=1, secure_sum=terms)
    text = policy_template(base_models=[BASE])
    text = text.replace("\nallowed = []", f'\nallowed = ["{RUN_ID}"]', 1)
    others = json.dumps([digit * 64 for digit in "123"])
    text = text.replace("\ncohort = []", f"\ncohort = {others}", 1)
    policy = load_settings(Policy, tomllib.loads(text), "the template")
    verdict = judge(asked, policy, UNSPENT, NOON, epsilon_of)
    assert verdict.rule == "allowed", verdict
