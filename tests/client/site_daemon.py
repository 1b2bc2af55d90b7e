"""A daemon whose trainer is `site_trainer.py`, as a process of its own.

python site_daemon.py site.toml
"""

import sys
from pathlib import Path

from client.daemon import run_daemon
from client.site_settings import load_site
from federation.command import run_command


def main() -> None:
    config = Path(sys.argv[1]).absolute()
    trainer = str(Path(__file__).with_name("site_trainer.py"))
    run_daemon(load_site(config), [sys.executable, trainer, "--config", str(config)])


if __name__ == "__main__":
    run_command(main)
