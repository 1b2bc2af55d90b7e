"""A trainer that is killed in every private round, at the first draw of its records.

python dying_trainer.py --config site.toml [--parent PID]
"""

import argparse
import os
import signal
from pathlib import Path

from client.gate import SiteGate
from client.randomness import RandomStream
from client.site_settings import load_site
from client.trainer_service import run_trainer


def die(*_: object) -> list[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed processes go on")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    RandomStream.chosen = die  # type: ignore[method-assign, assignment]
    run_trainer(load_site(options.config), SiteGate.open, parent=options.parent)


if __name__ == "__main__":
    main()
