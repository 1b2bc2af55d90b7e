"""Institutions as they run: a daemon and its trainer each, on a real SuperLink behind nginx, TLS.

With `--moves` a site's trainer trains nothing: it moves every number of the adapter a little, as
the sites of `peers/nvflare_client.py` do, so that the round costs what the transport and the wire
format cost. Everything else is the product's: the daemon, the socket, the policy, the ledger, the
decoding and the encoding with error feedback, what is put on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.processes import ROOT

if TYPE_CHECKING:
    from topology import Deployment

    from client.round import Answer, Begun, RoundRequest
    from client.settings import TrainingSettings
    from client.site import Site
    from federation.wire import Update

POLICY = """
[models]
base = ["any"]
[runs]
allowed = ["any"]
bundles = ["any"]
[adapter]
modules = ["*"]
max_rank = 64
max_alpha = 128
[training]
max_steps = 8
max_batch = 64
max_tokens = 1024
max_learning_rate = 0.01
max_rounds = 1000
[traffic]
uplink = ["float32", "bfloat16", "int8", "int4"]
max_round_bytes = 1_000_000_000
max_run_bytes = 100_000_000_000
[aggregation]
kinds = ["any"]
secure_sum_required = false
min_cohort = 1
[privacy]
required = false
one_factor_only = false
max_record_clip_norm = 1.0
epsilon = 1e9
delta = 1e-9
[metrics]
allowed = ["num-examples", "train_loss", "seconds"]
digits = 15
"""
"""Lets every round of a benchmark in."""


@dataclass(frozen=True)
class ResidentSite:
    """One institution: its directory, with site.toml, policy.toml and its log."""

    name: str
    directory: Path

    def events(self) -> list[dict[str, Any]]:
        """Return what its daemon and its trainer said."""
        log = self.directory / "site.log"
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@contextmanager
def resident_sites(
    made: Deployment, root: Path, names: Sequence[str], *, base: Path, moves: bool
) -> Iterator[list[ResidentSite]]:
    """Register sites and run their daemons for the time of a block.

    Args:
        made: Where they connect to.
        root: Their directories go below it; short, for the path of a socket.
        names: One a site.
        base: The base model.
        moves: Nothing is trained.
    """
    sites = [ResidentSite(name, root / name) for name in names]
    for site in sites:
        _write_site(made, site, base)
        config = ("--config", str(site.directory / "site.toml"))
        module = ("benchmarks.resident_sites",) if moves else ("client.cli", "daemon")
        made.services.start(
            f"daemon-{site.name}",
            [sys.executable, "-m", *module, *config],
            {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    made.services.wait_until(
        lambda: made.num_online() == len(sites), "the connection of every site", 120
    )
    yield sites
    made.services.end([f"daemon-{site.name}" for site in sites])


def write_settings(directory: Path, base: Path, **more: object) -> Path:
    """Write site.toml and a policy that lets everything in; return the path of the former."""
    values = {
        "superlink": "127.0.0.1:1",
        "root_certificate": "ca.crt",
        "node_key": "node",
        "base_model": str(base),
        "data": "data.jsonl",
        "policy": "policy.toml",
        "state": "state",
        "log": "site.log",
        "drain_s": 60.0,
        **more,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (directory / "site.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "policy.toml").write_text(POLICY, encoding="utf-8")
    return directory / "site.toml"


def _write_site(made: Deployment, site: ResidentSite, base: Path) -> None:
    from certificates import make_node_key

    key = make_node_key(site.directory)
    made.flwr("supernode", "register", str(key.with_suffix(".pub")))
    write_settings(
        site.directory,
        base,
        superlink=f"127.0.0.1:{made.sites_port}",
        root_certificate=str(made.certificates / "ca.crt"),
        name=site.name,
    )
    records = [{"prompt": f"Number {n}?", "response": f"{site.name} {n}."} for n in range(8)]
    text = "\n".join(json.dumps(record) for record in records)
    (site.directory / "data.jsonl").write_text(text + "\n", encoding="utf-8")


def moved(
    received: Update,
    site: Site,
    _: TrainingSettings,
    request: RoundRequest,
    *,
    key: bytes | None,  # noqa: ARG001 - the signature of what it stands in for
    begun: Begun,  # noqa: ARG001
) -> Answer:
    """Return an answer as `client.round.answer_received` does, without a model and its training."""
    from client.round import Answer, _encode_reply, site_records

    adapter = received.adapter()
    for factors in adapter.modules.values():
        factors.b_OR.add_(0.001)
        factors.a_RI.add_(0.001)
    update = _encode_reply(adapter, received, site, request)
    return Answer(update, len(site_records(site.data)), 0.0)


def main() -> None:
    """Be the daemon of a site that only moves numbers, or its trainer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--parent", type=int)
    asked = parser.parse_args()
    from client.site_settings import load_site

    settings = load_site(asked.config)
    if not asked.trainer:
        from client.daemon import run_daemon

        own = [sys.executable, "-m", "benchmarks.resident_sites", "--config", str(asked.config)]
        run_daemon(settings, [*own, "--trainer"])
        return
    import client.trainer
    from client.gate import SiteGate
    from client.trainer_service import run_trainer

    vars(client.trainer)["answer_received"] = moved
    run_trainer(settings, SiteGate.open, parent=asked.parent)


if __name__ == "__main__":
    main()
