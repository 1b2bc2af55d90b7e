"""The demo's directory: one demo at a time, and nothing in it that other code has made."""

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from client.claim import claim
from client.trainer_link import LONGEST_PATH
from federation.atomic import write_atomically
from federation.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share
from processes import end_left_behind

MADE = (
    *("run", "adapters", "student", ".student.work", "builds", "keys", "registry", "device"),
    *("device.toml", "commands.jsonl", "summary.json", "report.html", "flower", "sites"),
)
"""What the demo makes below its directory, besides what fetch.py makes."""


@contextlib.contextmanager
def working_in(out: Path, console: Console, longest_site: str) -> Iterator[None]:
    """Have a directory for this process alone; what a killed demo left running in it is ended.

    Args:
        out: It is made.
        console: For the reader.
        longest_site: Name of a site; its trainer's socket must fit below ``out``.

    Raises:
        UserError: The path is too long, or another demo works there.
    """
    socket = out.resolve() / "sites" / longest_site / "state" / "socket" / "trainer"
    excess = len(str(socket).encode()) - LONGEST_PATH
    if excess > 0:
        raise UserError(
            f"--out {out}: below {out.resolve()} the path of a site's socket would be {excess} "
            "bytes too long for the system: choose a shorter one, such as --out /tmp/demo"
        )
    out.mkdir(parents=True, exist_ok=True)
    with claim(out, "demo"):
        if count := end_left_behind(out):
            console.print(f"[dim]ended {count} processes of a demo that was killed[/dim]")
        yield


def start_over_after_a_change(out: Path) -> bool:
    """Remove what other code made, so that every figure of a report is of one piece of code.

    Downloads, data and the base model stay: `fetch.py` checks those by itself.
    """
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for room in ("federation", "client", "distill", "edge", "examples"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    mark = out / "code.sha256"
    if mark.is_file() and mark.read_text() == digest.hexdigest():
        return False
    for name in MADE:
        for path in out.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(mark, digest.hexdigest())
    return True
