"""A run of one site alone that is killed, at the places where a kill hurts."""

import shutil
from pathlib import Path

import pytest
import torch

from client import alone
from client.settings import TrainingSettings
from client.work import Work
from federation.adapter import read_adapter
from federation.errors import UserError
from federation.settings import AdapterSettings
from tests.conftest import write_records

SETTINGS = TrainingSettings(
    num_steps=4,
    batch_size=2,
    learning_rate=1e-2,
    max_tokens=64,
    dtype="float32",
    checkpoint_every=2,
)
ADAPTER = AdapterSettings(rank=4, alpha=8.0)


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "data.jsonl", 20)


def train(data: Path, base: Path, out: Path, settings: TrainingSettings = SETTINGS) -> dict:
    return alone.train_alone([data], base, out, ADAPTER, settings)


def kill_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(alone, name, killed)


def same(one: Path, other: Path) -> bool:
    first, second = read_adapter(one).modules, read_adapter(other).modules
    return all(
        torch.equal(f.b_OR, second[n].b_OR) and torch.equal(f.a_RI, second[n].a_RI)
        for n, f in first.items()
    )


def test_killed_after_the_last_checkpoint(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(data, tiny_model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_in(patch, "write_adapter")
        with pytest.raises(Killed):
            train(data, tiny_model, tmp_path / "out")
    resumed = train(data, tiny_model, tmp_path / "out")
    assert same(tmp_path / "out", tmp_path / "whole")
    assert [s["loss"] for s in resumed["steps"]] == [s["loss"] for s in whole["steps"]]
    assert resumed["num_tokens"] == whole["num_tokens"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "out", "whole"]


def test_killed_while_a_checkpoint_was_written(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tiny_model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_in(patch, "write_adapter")
        with pytest.raises(Killed):
            train(data, tiny_model, tmp_path / "out")
    (tmp_path / ".out.work" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    train(data, tiny_model, tmp_path / "out")
    assert same(tmp_path / "out", tmp_path / "whole")


def test_an_interrupted_run_with_other_settings_is_not_continued_silently(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_in(patch, "write_adapter")
        with pytest.raises(Killed):
            train(data, tiny_model, tmp_path / "out")
    other = SETTINGS.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(UserError, match="interrupted run with another learning_rate"):
        train(data, tiny_model, tmp_path / "out", other)
    write_records(data, 21)
    with pytest.raises(UserError, match="interrupted run with another data"):
        train(data, tiny_model, tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.work")
    train(data, tiny_model, tmp_path / "out", other)


def test_training_leaves_nothing_in_the_current_directory(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    train(data, tiny_model, tmp_path / "out")
    assert not list(here.iterdir())


def test_two_processes_do_not_share_an_output(tmp_path: Path) -> None:
    second = Work(tmp_path / "out", {"a": 1})
    with Work(tmp_path / "out", {"a": 1}), pytest.raises(UserError, match="another process works"):
        second.__enter__()


def test_a_run_alone_that_is_to_be_private_is_refused_before_anything_is_written(
    data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    private = SETTINGS.model_copy(update={"noise_multiplier": 1.0, "checkpoint_every": 0})
    with pytest.raises(UserError, match="noise_multiplier is 1 where records are taken in a given"):
        train(data, tiny_model, tmp_path / "out", private)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
