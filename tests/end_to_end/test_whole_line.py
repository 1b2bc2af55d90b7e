"""From private text to a device, on tiny models; then one byte changes anywhere on the way."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import distill.cli
import edge.cli
from edge.errors import run_command as run_edge
from federation import server_app
from federation.command import run_command
from federation.events import UpdateReceived, read_events
from tests.conftest import write_records, write_tiny_model
from tests.simulated import LocalGrid


def command(main: Callable[[], None], *arguments: object) -> int:
    """Run a console script's body with arguments; return its exit code."""
    saved, sys.argv = sys.argv, ["command", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = saved
    return 0


def run_distill(*arguments: object) -> int:
    return command(lambda: run_command(distill.cli.app), *arguments)


def run_edge_command(*arguments: object) -> int:
    return command(lambda: run_edge(edge.cli.app), *arguments)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories of a whole line: base, run, student, builds, registry, device."""
    root = tmp_path_factory.mktemp("line")
    base = write_tiny_model(root / "base", num_layers=4)
    for name in ("bank", "clinic"):
        write_records(root / "sites" / name / "train.jsonl", 30, topic=name)
    public = write_records(root / "public.jsonl", 60, topic="public")
    run_config = {
        "base_model": str(base),
        "out": str(root / "run"),
        "simulated_sites": str(root / "sites"),
        "num_rounds": 2,
        "num_sites": 2,
        "adapter.rank": 4,
        "training.num_steps": 2,
        "training.batch_size": 2,
        "training.max_tokens": 64,
        "training.dtype": "float32",
    }
    grid = LocalGrid([{"partition-id": 0}, {"partition-id": 1}], run_config)
    server_app.main(grid, grid.server_context)
    assert not run_distill(
        *("--teacher", base, "--adapter", root / "run" / "adapter", "--student", "0.7x"),
        *("--data", public, "--out", root / "student", "--steps", 2, "--batch-size", 2),
        *("--max-tokens", 64),
    )
    builds = ("build", root / "student", "--to", "gguf:f16", "--out", root / "builds")
    assert not run_edge_command(*builds)
    assert not run_edge_command("keygen", "--out", root / "keys")
    assert not run_edge_command(
        *("push", root / "builds" / "gguf-f16", f"{root / 'registry'}:stable"),
        *("--key", root / "keys" / "private.pem"),
    )
    (root / "device.toml").write_text(
        'device_dir = "device"\nregistry = "registry"\npublic_keys = ["keys/public.pem"]\n'
    )
    assert not run_edge_command("agent", "--config", root / "device.toml", "--once")
    return root


def verify(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = run_edge_command("verify", root / "device" / "current", "--source", root)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_device_names_the_way_back_to_every_update(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = verify(line, capsys)
    assert code == 0, printed
    updates = [
        e.sha256
        for _, e in read_events(line / "run" / "events.jsonl")
        if isinstance(e, UpdateReceived)
    ]
    assert len(updates) == 4
    for digest in updates:
        assert digest in printed
    for stage in ("build", "distill", "federate", "external"):
        assert stage in printed


@pytest.mark.parametrize(
    "place",
    [
        "device/current/model.gguf",
        "student/model.safetensors",
        "student/config.json",
        "run/round-0001/adapter_model.safetensors",
        "run/round-0002/adapter_model.safetensors",
        "base/model.safetensors",
        "base/tokenizer.json",
    ],
)
def test_one_changed_byte_anywhere_on_the_way_is_named(
    line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    copy = tmp_path / "line"
    shutil.copytree(line, copy, symlinks=True)
    path = (copy / place).resolve()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    code, printed = verify(copy, capsys)
    assert code == 1
    assert path.name in printed


def test_a_changed_statement_of_any_ancestor_is_named(
    line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [p.name for p in (line / "device" / "current" / "lineage").iterdir()]
    assert len(names) >= 4
    for name in names:
        copy = tmp_path / name
        shutil.copytree(line, copy, symlinks=True)
        path = copy / "device" / "current" / "lineage" / name
        statement = json.loads(path.read_text())
        statement["predicate"]["parameters"]["rank"] = 99
        path.write_text(json.dumps(statement))
        code, printed = verify(copy, capsys)
        assert code == 1
        assert name.removesuffix(".json") in printed
