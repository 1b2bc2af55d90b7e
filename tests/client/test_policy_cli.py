import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from client.policy_rules import RULES
from client.policy_template import policy_template
from federation.accountant import PrivacyEvent, epsilon_of
from tests.client.ledgers import data_set, entry
from tests.client.policy_example import BASE, REQUEST, RUN, changed
from tests.client.test_cli import run

NOON = "2026-11-24T12:00+00:00"


def write_policy(tmp_path: Path, *, base: str = BASE, extra: str = "") -> Path:
    text = policy_template().replace("base = []", f'base = ["{base}"]')
    text = text.replace("allowed = []", f'allowed = ["{RUN}"]', 1)
    text = text.replace("cohort = []", 'cohort = ["any"]')
    path = tmp_path / "policy.toml"
    path.write_text(text + extra, encoding="utf-8")
    return path


def write_request(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "REQUEST.json"
    path.write_text(json.dumps(changed(REQUEST, metrics=[], **changes)))
    return path


def test_the_request_of_the_guide_is_one_that_a_policy_can_allow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "setting-up-a-site.md").read_text()
    (block,) = re.findall(r"^(    \{\"run\".*?\}\})\n\n", guide, re.DOTALL | re.MULTILINE)
    asked = json.loads(block)
    request = tmp_path / "REQUEST.json"
    request.write_text(block)
    words = ("policy", "explain", request, "--num-records", 1000, "--policy")
    allowing = write_policy(tmp_path, base=asked["adapter"]["base_model"])
    assert run(monkeypatch, *words, allowing) == 0, capsys.readouterr()
    new = tmp_path / "new.toml"
    new.write_text(policy_template(base_models=[asked["adapter"]["base_model"]]))
    capsys.readouterr()
    assert run(monkeypatch, *words, new) == 1
    assert "refused by this site's policy (runs.allowed)" in capsys.readouterr().out


def test_explain_prints_every_rule_and_ends_0_for_an_allowed_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (
        *("policy", "explain", write_request(tmp_path), "--policy", write_policy(tmp_path)),
        *("--num-records", 1000, "--at", NOON),
    )
    assert run(monkeypatch, *arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["is_allowed"], result["rule"]) == (True, "allowed")
    assert [rule["rule"] for rule in result["rules"]] == list(RULES)
    epsilon = next(rule for rule in result["rules"] if rule["rule"] == "privacy.epsilon")
    assert float(epsilon["value"].split()[0]) < 8
    assert epsilon["limit"] == "at most 8 for life at delta 1e-06"
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(rule in printed for rule in RULES)
    assert "refuse" not in printed


def test_explain_ends_1_and_shows_every_broken_rule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    request = write_request(tmp_path, adapter__rank=65, trains="AB")
    policy = write_policy(tmp_path)
    arguments = ("policy", "explain", request, "--policy", policy, "--num-records", 1000)
    assert run(monkeypatch, *arguments, "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["rule"] == "adapter.max_rank"
    assert "rank is 65, at most 64 is allowed" in result["reason"]
    refused = [rule["rule"] for rule in result["rules"] if not rule["is_allowed"]]
    assert refused == ["adapter.max_rank", "privacy.one_factor_only"]
    assert run(monkeypatch, *arguments) == 1
    assert capsys.readouterr().out.count("refuse ") == 2


def test_explain_ends_2_when_it_has_nothing_to_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy, request = write_policy(tmp_path), write_request(tmp_path)
    explain = ("policy", "explain")
    assert run(monkeypatch, *explain, tmp_path / "no.json", "--policy", policy) == 2
    assert run(monkeypatch, *explain, request, "--policy", tmp_path / "no.toml") == 2
    assert run(monkeypatch, *explain, request, "--policy", policy, "--at", "noon") == 2
    request.write_text('{"run": NaN}')
    assert run(monkeypatch, *explain, request, "--policy", policy) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert all(error.startswith("error: ") for error in errors)


def test_explain_judges_by_the_clock_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = write_policy(tmp_path)
    text = policy.read_text().replace("windows = []\n", "").replace("# windows =", "windows =")
    policy.write_text(text)
    arguments = (
        *("policy", "explain", write_request(tmp_path), "--policy", policy),
        *("--num-records", 1000, "--json", "--at"),
    )
    assert run(monkeypatch, *arguments, NOON) == 0
    capsys.readouterr()
    assert run(monkeypatch, *arguments, "2026-11-24T23:00+00:00") == 1
    assert json.loads(capsys.readouterr().out)["rule"] == "quiet_hours"


def test_explain_knows_what_a_ledger_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, private = tmp_path / "ledger.db", PrivacyEvent(2.0, 0.1, 8)
    hers, ours, apart = data_set(*range(50)), data_set(*range(49, 100)), data_set(*range(200, 260))
    rounds = [(1, hers, RUN), (2, ours, RUN), (3, apart, "ff" * 16)]
    with Ledger.open(path, epsilon_of=epsilon_of) as ledger:
        for number, each, of_run in rounds:
            ledger.append(entry(number, run=of_run, data_set=each, event=private))
    arguments = (
        *("policy", "explain", write_request(tmp_path), "--policy", write_policy(tmp_path)),
        *("--ledger", path, "--at", NOON, "--json"),
    )
    assert run(monkeypatch, *arguments, "--data-set", ours.digest[:12]) == 0
    rules = {rule["rule"]: rule for rule in json.loads(capsys.readouterr().out)["rules"]}
    asked = PrivacyEvent(4.0, 32 / 51, 8)
    expected = epsilon_of([private, private, asked], 1e-6)  # hers shares a record with ours
    assert float(rules["privacy.epsilon"]["value"].split()[0]) == pytest.approx(expected, rel=1e-3)
    assert rules["privacy.sampling_rate"]["limit"] == "of 51 records"
    assert rules["replay"]["limit"] == "after round 2, or the same again"
    assert rules["traffic.max_run_bytes"]["value"] == str(1000 + 2 * 4096)
    assert run(monkeypatch, *arguments) == 2
    assert "--data-set '' fits 3 of the 3 data sets in ledger.db" in capsys.readouterr().err


def test_check_says_in_sentences_what_a_policy_allows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policy = write_policy(tmp_path)
    assert run(monkeypatch, "policy", "check", policy) == 0
    printed = capsys.readouterr().out
    assert f"Base models: {BASE}." in printed
    assert "A secure sum is required, of at least 3 sites." in printed
    assert "Nothing is allowed" not in printed
    policy.write_text(policy_template())
    assert run(monkeypatch, "policy", "check", policy, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["allows"][0].startswith("Nothing is allowed")
    assert result["policy"]["privacy"]["epsilon"] == 8.0
    policy.write_text("[models]\nbaze = []\n")
    assert run(monkeypatch, "policy", "check", policy) == 2
    assert "unknown setting 'models.baze'" in capsys.readouterr().err


def test_check_warns_of_what_a_lax_policy_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (
        policy_template()
        .replace("secure_sum_required = true", "secure_sum_required = false")
        .replace("required = true", "required = false")
        .replace("allowed = []\nmax_count", 'allowed = ["seconds", "train_loss"]\nmax_count')
        .replace("one_factor_only = true", "one_factor_only = false")
    )
    path = tmp_path / "policy.toml"
    path.write_text(text)
    assert run(monkeypatch, "policy", "check", path) == 0
    printed = capsys.readouterr().out
    for warning in (
        "server's word",
        "may have no noise",
        "no noise: seconds, train_loss",
        "multiplies",
    ):
        assert warning in printed


@pytest.mark.parametrize("is_private", [True, False])
def test_check_warns_of_a_secure_sum_without_noise(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    is_private: bool,
) -> None:
    text = policy_template()
    assert text.count("\nrequired = true\n") == 1
    path = tmp_path / "policy.toml"
    path.write_text(text.replace("\nrequired = true\n", f"\nrequired = {is_private!s}\n".lower()))
    assert run(monkeypatch, "policy", "check", path) == 0
    printed = capsys.readouterr().out
    assert ("does not hide this site from a server that lies" in printed) != is_private
    assert "A secure sum is required" in printed


def test_the_policy_commands_come_without_torch() -> None:
    code = (
        "import sys; import client.policy_cli, client.verdict, client.request, client.policy; "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seen = subprocess.run(  # what this test's own process has loaded says nothing
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert seen.stdout.split() == ["False", "False"]
