import json
import sys
from pathlib import Path

import pytest

from federation import cli, events
from federation.command import run_command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command as the console script does; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["federation", *map(str, arguments)])
    try:
        run_command(cli.app)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json alone, under another name, as a person who has no weights holds it."""
    path = tmp_path / "seven-b.json"
    shape = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    path.write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **shape}))
    return path


def test_a_plan_needs_a_config_and_no_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    settings = ("--set", "num_sites=8", "--set", "wire.uplink='int8'", "--set", "num_rounds=3")
    assert run(monkeypatch, "plan", "--model", config, *settings, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_parameters"], result["num_asked"]) == (40_370_176, 8)
    assert result["up"]["run"] == 8 * 3 * result["up"]["site"]["odd"]
    assert "No differential privacy" in result["privacy"]


def test_a_person_sees_the_numbers_of_the_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    arguments = ("plan", "--model", config, "--set", "aggregation=alternating")
    assert run(monkeypatch, *arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, *arguments) == 0
    human = capsys.readouterr().out
    for number in (
        f"{result['num_parameters'] / 1e6:.2f} M",
        f"{result['up']['site']['odd'] / 1e6:.1f} MB",
        f"{result['up']['site']['even'] / 1e6:.1f} MB",
        f"{max(result['memory_bytes'].values()) / 1e6:.1f} MB",
        f"{result['wires'][0]['run_bytes'] / 1e9:.2f} GB",
        "B only",
        "geometric_median",
        "No differential privacy",
    ):
        assert number in human
    assert max(map(len, human.splitlines())) <= 80


def test_the_model_may_be_the_base_model_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    assert run(monkeypatch, "plan", "--set", f"base_model={tiny_model}", "--json") == 0
    by_setting = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, "plan", "--model", tiny_model, "--json") == 0
    assert json.loads(capsys.readouterr().out) == by_setting


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no model is named: pass --model"),
        (("--model", "{tmp}/none"), "none does not exist: pass a model directory"),
        (("--model", "{tmp}"), "config.json is missing"),
        (("--model", "{tmp}/bad.json"), "bad.json is not JSON"),
        (("--model", "{tmp}/list.json"), "list.json holds no JSON object"),
        (("--model", "{tmp}/gpt2.json"), "architectures is ['GPT2LMHeadModel']: expected one of"),
        (("--model", "{config}", "--set", "num_round=3"), "unknown setting 'num_round'"),
        (("--model", "{config}", "--set", "wire.uplink=int3"), "'wire.uplink' is 'int3'"),
        (("--model", "{config}", "--set", "num_sites"), "--set 'num_sites': expected key=value"),
        (("--model", "{config}", "--set", "adapter=3", "--set", "adapter.rank=2"), "is a table"),
    ],
)
def test_a_mistake_in_a_plan_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    config: Path,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "gpt2.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    filled = [text.format(tmp=tmp_path, config=config) for text in arguments]
    assert run(monkeypatch, "plan", *filled) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("watch", [(), ("--watch",)])
def test_status_of_a_finished_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    watch: tuple[str, ...],
) -> None:
    log = events.EventLog(tmp_path / "events.jsonl")
    log.write(events.RunStarted("d" * 64, 1, "products", 16, 1000))
    log.write(events.RoundStarted(1, ["a"], 2_000_000))
    log.write(events.UpdateReceived(1, "a", "clinic", "e" * 64, 1_000_000, 10, 2.25, 1.0))
    log.write(events.RoundFinished(1, 1, 2.25, 0.0, 0.1, 4.0, "round-0001"))
    log.write(events.RunFinished(1, 9.0, "round-0001"))
    assert run(monkeypatch, "status", tmp_path, *watch) == 0
    human = capsys.readouterr().out
    for part in ("finished: round 1 of 1", "2.0 MB down, 1.0 MB up", "clinic", "2.2500"):
        assert part in human
    assert run(monkeypatch, "status", tmp_path, *watch, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["state"], result["bytes_down"]) == ("finished", 2_000_000)
    assert result["site_rows"][0]["name"] == "clinic"


def test_status_of_no_run_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "status", tmp_path) == 2
    assert "events.jsonl does not exist" in capsys.readouterr().err


def test_a_damaged_log_is_one_sentence_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "events.jsonl").write_text("nonsense\n")
    assert run(monkeypatch, "status", tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1
