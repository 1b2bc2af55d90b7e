"""A site whose noise is the same every time, as a process of its own: `client`, with keys.

    python seeded_site.py daemon|trainer --config site.toml [--parent PID]

A round's random numbers follow from the site's name and the round's number (`key_of`), so that a
disturbed run can be held to an undisturbed one. Nothing of the product leads here: its trainer has
this hook as an argument only, and no setting, variable or option sets it. The SuperNode that this
daemon starts, where it does, is one whose death is noticed sooner (`quick_supernode.py`).
"""

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from client import daemon
from client.gate import SiteGate
from client.round import RoundRequest
from client.site_settings import load_site
from client.trainer_service import run_trainer


def key_of(name: str) -> Callable[[RoundRequest], bytes]:
    """Return the keys of one site's rounds."""
    return lambda asked: hashlib.sha256(f"{name}/{asked.server_round}".encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=("daemon", "trainer"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    settings = load_site(options.config)
    if options.program == "daemon":
        stock = daemon.supernode_command
        quick = str(Path(__file__).with_name("quick_supernode.py"))
        daemon.supernode_command = lambda *of: [sys.executable, quick, *stock(*of)[1:]]
        command = [sys.executable, __file__, "trainer", "--config", str(options.config)]
        daemon.run_daemon(settings, command)
    else:
        run_trainer(settings, SiteGate.open, parent=options.parent, key_of=key_of(settings.name))


if __name__ == "__main__":
    main()
