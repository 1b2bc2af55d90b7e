import json
import sys
from pathlib import Path

import pytest

from client import cli
from federation.command import run_command
from tests.conftest import write_records


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command as the console script does; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["client", *map(str, arguments)])
    try:
        run_command(cli.app)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_check_data_counts_by_rule_and_shows_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_records(tmp_path / "a.jsonl", 5)
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    assert run(monkeypatch, "check-data", data, "--json") == 0
    printed = capsys.readouterr().out
    (result,) = json.loads(printed)["files"]
    assert (result["kept"], result["dropped"]) == (5, {"duplicate": [6]})
    assert run(monkeypatch, "check-data", data) == 0
    human = capsys.readouterr().out
    assert "duplicate" in human
    assert "fever" not in printed + human


def test_train_then_evaluate(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    train, held_out = (
        write_records(tmp_path / "t.jsonl", 30),
        write_records(tmp_path / "h.jsonl", 12, start=30),
    )
    common = ("--base-model", tiny_model)
    settings = (
        "--set",
        "num_steps=20",
        "--set",
        "learning_rate=0.01",
        "--set",
        "max_tokens=64",
        "--set",
        "dtype=float32",
        "--set",
        "batch_size=4",
    )
    out = tmp_path / "adapter"
    assert (
        run(
            monkeypatch,
            "train",
            "--data",
            train,
            *common,
            "--out",
            out,
            "--rank",
            4,
            *settings,
            "--json",
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["last_loss"] < result["first_loss"]
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["predicate"]["stage"] == "train"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "h.jsonl", "t.jsonl"]

    losses = []
    for adapter in ((), ("--adapter", out)):
        assert (
            run(
                monkeypatch,
                "evaluate",
                "--data",
                held_out,
                *common,
                *adapter,
                "--dtype",
                "float32",
                "--json",
            )
            == 0
        )
        (row,) = json.loads(capsys.readouterr().out)["files"]
        losses.append(row["loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "--data", "{bad}", "--base-model", "{model}"), "bad.jsonl:1: not JSON"),
        (("train", "--data", "{empty}", "--base-model", "{model}"), "holds no record"),
        (("train", "--data", "{good}", "--base-model", "{tmp}/none"), "none does not exist"),
        (("train", "--data", "{good}", "--base-model", "{tmp}"), "config.json is missing"),
        (
            ("train", "--data", "{good}", "--base-model", "{model}", "--set", "epochs=3"),
            "unknown setting 'epochs'; known here: accumulation",
        ),
        (
            ("train", "--data", "{good}", "--base-model", "{model}", "--set", "num_steps=many"),
            "'num_steps' is 'many'",
        ),
        (("train", "--data", "{good}", "--base-model", "{model}", "--targets", "x"), "'targets'"),
        (("evaluate", "--data", "{good}", "--base-model", "{tmp}/none"), "none does not exist"),
        (
            ("evaluate", "--data", "{good}", "--base-model", "{model}", "--adapter", "{tmp}"),
            "adapter_config.json is missing",
        ),
        (("evaluate", "--data", "{good}", "--base-model", "{model}", "--dtype", "int8"), "int8"),
        (("check-data", "{tmp}/none.jsonl"), "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    write_records(tmp_path / "good.jsonl", 8)
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    names = {name: tmp_path / f"{name}.jsonl" for name in ("good", "bad", "empty")}
    filled = [text.format(model=tiny_model, tmp=tmp_path, **names) for text in arguments]
    if filled[0] == "train":
        filled += ["--out", str(tmp_path / "out")]
    before = sorted(tmp_path.iterdir())
    assert run(monkeypatch, *filled) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_out_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    data = write_records(tmp_path / "good.jsonl", 8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    assert (
        run(
            monkeypatch,
            "train",
            "--data",
            data,
            "--base-model",
            tiny_model,
            "--out",
            tmp_path / "out",
        )
        == 2
    )
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").read_text() == "1"
