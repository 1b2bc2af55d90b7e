"""The demo's federation with a tiny model: four daemons over TLS, a kill, and the same bytes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from federation.adapter import read_adapter
from federation.status import summarise
from tests.conftest import write_records, write_tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(EXAMPLES / "four_institutions"))

SITES = ("bank", "billing", "hospital", "security")
PROGRAM = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES / "four_institutions")!r})
from demo import Demo
from rich.console import Console
from work_directory import working_in
out, console = Path(sys.argv[1]), Console(stderr=True)
with working_in(out, console, "hospital"):
    demo = Demo(out, console)
    demo.federate()
    print(json.dumps(demo.daemons()))
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a path that is short enough for sockets below it."""
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    yield directory
    shutil.rmtree(directory)


def prepare(out: Path) -> Path:
    """Write what the demo would have fetched."""
    write_tiny_model(out / "models" / "base")
    for site in SITES:
        write_records(out / "data" / site / "train.jsonl", 30, topic=site)
    return out


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def run(out: Path) -> tuple[dict[str, Any], str]:
    """Run to the end; return what the sites say, and what was shown."""
    process = start(out)
    printed, shown = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    said: dict[str, Any] = json.loads(printed)
    return said, shown


def rounds_done(out: Path) -> int:
    events = out / "run" / "events.jsonl"
    return int(summarise(events)["rounds_done"]) if events.is_file() else 0


@pytest.mark.slow
def test_a_killed_demo_goes_on_with_its_sites_and_gives_the_same_bytes(short_path: Path) -> None:
    import torch
    from processes import end_left_behind

    out = prepare(short_path / "killed")
    first = start(out)
    while rounds_done(out) < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.kill()
    first.communicate()
    said, shown = run(out)
    assert "resumed at round 3" in shown or rounds_done(out) == 5
    assert end_left_behind(out) == 0
    summary = summarise(out / "run" / "events.jsonl")
    assert (summary["state"], summary["failures"]) == ("finished", [])
    for site in SITES:
        assert said[site]["rounds"] == said[site]["ledger_rows"] == 5
        assert said[site]["metrics"] == ["num-examples", "seconds", "train_loss"]
        assert set(said[site]["verdicts"]) == {"allowed"}

    undisturbed, _ = run(prepare(short_path / "whole"))
    assert all(said[site]["bytes"] == undisturbed[site]["bytes"] for site in SITES)
    assert undisturbed["bank"]["verdicts"] == {"allowed": 5}
    one, other = (
        read_adapter(short_path / name / "run" / "adapter") for name in ("killed", "whole")
    )
    for name, factors in one.modules.items():
        assert torch.equal(factors.b_OR, other.modules[name].b_OR), name
        assert torch.equal(factors.a_RI, other.modules[name].a_RI), name


def test_a_directory_too_deep_for_a_sites_socket_is_refused_before_the_work(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 60)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "four_institutions" / "demo.py", "--out", deep],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --out {deep}: below")
    assert done.stderr.count("\n") == 1
    assert not deep.exists()
