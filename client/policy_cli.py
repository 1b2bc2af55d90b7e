"""`client policy`: what a site's policy allows, and what it makes of a request.

Exit codes of `explain`: 0 the request is allowed, 1 it is refused, 2 something has to be changed
before it can be judged.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federation.command import print_result

if TYPE_CHECKING:
    from client.ledger import Spent
    from client.policy import Policy
    from client.policy_rules import Finding

policy_app = typer.Typer(
    help="The site's policy: what it allows, and what it makes of a request.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
_UNMASKED = (
    "Warning: a secure sum without noise does not hide this site from a server that lies: it can "
    "ask for two sums of like updates, with this site in one of them, and subtract; set "
    "privacy.required = true."
)


@policy_app.command()
def check(
    policy: Annotated[Path, typer.Argument(help="policy.toml")], as_json: Json = False
) -> None:
    """Say whether a policy can be read, and in sentences what it allows."""
    from client.policy import read_policy

    read = read_policy(policy)
    sentences = allowed_in_words(read)
    print_result(
        {"policy": read.model_dump(mode="json", by_alias=True), "allows": sentences},
        as_json,
        lambda: typer.echo("\n".join(sentences)),
    )


@policy_app.command()
def explain(
    request: Annotated[Path, typer.Argument(help="JSON of a request, with its adapter's facts.")],
    policy: Annotated[Path, typer.Option(help="policy.toml")],
    ledger: Annotated[
        Path | None, typer.Option(help="What was spent so far; without it, nothing.")
    ] = None,
    data_set: Annotated[
        str, typer.Option(help="First digits of the data set's fingerprint in the ledger.")
    ] = "",
    num_records: Annotated[
        int, typer.Option(min=0, help="Records of the data set, where there is no ledger.")
    ] = 0,
    at: Annotated[
        str | None, typer.Option(help="When it is asked, such as 2026-11-24T23:00+01:00. Now.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what each rule of a policy says of a request. Nothing is trained or charged."""
    from client.ledger import Spent
    from client.policy import read_policy
    from client.request import RequestError, parse_request
    from client.verdict import judge, judge_all
    from federation.accountant import epsilon_of

    read = read_policy(policy)
    try:
        head = request.read_bytes()
    except OSError as error:
        raise RequestError(f"{request} cannot be read: {error.strerror}") from None
    asked = parse_request(head)
    now = _moment(at)
    spent = _spent(ledger, data_set, asked.run) if ledger else Spent((), num_records, {})
    verdict = judge(asked, read, spent, now, epsilon_of)
    findings = judge_all(asked, read, spent, now, epsilon_of)
    result = {
        "is_allowed": verdict.is_allowed,
        "rule": verdict.rule,
        "reason": verdict.reason,
        "rules": [{"rule": rule, **vars(finding)} for rule, finding in findings.items()],
    }
    print_result(result, as_json, lambda: _print_findings(findings, verdict.reason))
    if not verdict.is_allowed:
        raise typer.Exit(1)


def allowed_in_words(policy: "Policy") -> list[str]:
    """Return what a policy allows, one sentence a line; what allows nothing says so."""
    from federation.metrics import DATA_METRICS

    is_closed = not policy.models.base or not (policy.runs.allowed or policy.runs.signers)
    runs, limits, privacy = policy.runs, policy.training, policy.privacy
    traffic, sums, metrics = policy.traffic, policy.aggregation, policy.metrics
    lines = ["Nothing is allowed: name a base model, and a run or a signer."] if is_closed else []
    lines += [f"Base models: {_words(policy.models.base)}."]
    lines += [f"Runs: {_words(runs.allowed)}; signers: {_words(runs.signers)}."]
    lines += [f"Bundles: {_words(runs.bundles)}."]
    lines += [f"Modules: {_words(policy.adapter.modules)}."]
    lines += [f"Rank: at most {policy.adapter.max_rank}, alpha {policy.adapter.max_alpha:g}."]
    lines += [f"A round: at most {limits.max_steps} steps of {limits.max_batch} records."]
    lines += [f"A record: at most {limits.max_tokens} tokens."]
    lines += [f"Learning rate: at most {limits.max_learning_rate:g}."]
    lines += [f"A run: at most round {limits.max_rounds}."]
    lines += [f"Formats that leave: {_words(traffic.uplink)}."]
    lines += [f"Bytes: {traffic.max_round_bytes:,} a round, {traffic.max_run_bytes:,} a run."]
    lines += [f"Aggregations: {_words(sums.kinds)}."]
    if sums.secure_sum_required:
        lines += [f"A secure sum is required, of at least {sums.min_cohort} sites."]
        lines += [f"Sites that may be in it: {_words(sums.cohort)}."]
    else:
        lines += ["No secure sum is required: the server may see this site's update by itself."]
        lines += [f"At least {sums.min_cohort} sites, without a secure sum by the server's word."]
    if privacy.required:
        lines += ["Differential privacy is required in every round."]
    else:
        lines += ["A round may have no noise: nothing bounds what its update tells of the records."]
        if sums.secure_sum_required:
            lines += [_UNMASKED]
    lines += [f"Noise multiplier: at least {privacy.noise_floor:g}."]
    lines += [f"Norm of one record's gradient: at most {privacy.max_record_clip_norm:g}."]
    lines += [f"A data set for life: epsilon {privacy.epsilon:g} at delta {privacy.delta:g}."]
    if not privacy.one_factor_only:
        lines += ["Under noise both factors may learn at once: their noise multiplies."]
    lines += [f"Metrics: {_words(metrics.allowed)}, {metrics.max_count} at most."]
    lines += [f"Digits of a metric: {metrics.digits}."]
    if bare := [name for name in metrics.allowed if name in DATA_METRICS]:
        lines += [f"Told by the records, and covered by no noise: {_words(bare)}."]
    quiet = policy.quiet_hours
    lines += [f"Quiet hours: {len(quiet.windows)} windows, time zone {quiet.time_zone}."]
    return lines


def _spent(ledger: Path, first_digits: str, run: str) -> "Spent":
    """Return what a ledger says of a data set and a run, while the trainer may be writing it."""
    import contextlib

    from client import chain
    from client.fingerprint import share_a_record
    from client.ledger import read_ledger
    from client.request import RequestError

    contents = read_ledger(ledger)
    names = [name for name in contents.data_sets if name.startswith(first_digits)]
    if len(names) != 1:
        raise RequestError(
            f"--data-set {first_digits!r} fits {len(names)} of the {len(contents.data_sets)} data "
            f"sets in {ledger.name}: expected one; `client ledger show --json` lists them"
        )
    with contextlib.closing(chain.connect(ledger, is_writer=False)) as connection:
        records = dict(connection.execute("SELECT fingerprint, records FROM data_sets"))
    own = records[names[0]]
    charged = {name for name, each in records.items() if share_a_record(each, own)} | {names[0]}
    return contents.spent(charged, contents.data_sets[names[0]], run)


def _words(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _moment(text: str | None) -> datetime:
    from client.request import RequestError

    try:
        moment = datetime.fromisoformat(text) if text else datetime.now().astimezone()
        return moment.astimezone()
    except (ValueError, OverflowError):
        raise RequestError(
            f"--at is {text!r:.80}: expected a moment such as 2026-11-24T23:00+01:00"
        ) from None


def _print_findings(findings: "dict[str, Finding]", reason: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("rule", "", "value", "limit"):
        table.add_column(column, overflow="fold", no_wrap=column in ("rule", ""))
    for rule, finding in findings.items():
        value = f"{finding.value} ({finding.note})" if finding.note else finding.value
        passed = "pass" if finding.is_allowed else "refuse"
        table.add_row(rule, passed, escape(value), escape(finding.limit))
    console = Console()
    console.print(table)
    console.print(escape(reason), soft_wrap=True)
