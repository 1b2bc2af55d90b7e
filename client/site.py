"""Who a site is: its model, data and state on its own disk, and how much of an adapter it trains.

A real site says all of it itself, in the node config of its SuperNode; nothing that a run says may
name a file there. In simulation the run names a directory with one folder a site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.base_model import ModelError
from federation.settings import SettingsError


@dataclass(frozen=True)
class Site:
    """One site, resolved."""

    base_model: Path
    data: Path
    name: str
    """What it calls itself, or ""."""
    state: Path
    """Directory for what must survive a restart; it is made when there is something to keep."""
    rank: int | None
    """Slices of the adapter that it trains; None = all."""


def find_site(
    node_config: Mapping[str, Any],
    simulation: Mapping[str, Any],
    *,
    node_id: int,
    environment: Mapping[str, str],
) -> Site:
    """Return what a site says of itself, or in simulation what the run says of it.

    Args:
        node_config: `data`, `base_model`, and if it wants `name`, `rank` and `state`; or
            `partition-id`, as a simulation sets it; beside `data` it says nothing.
        simulation: `simulated_sites` and `base_model`. Not looked at on a real site.
        node_id: Flower's number of the site.
        environment: For XDG_STATE_HOME and HOME.

    Raises:
        ModelError: Model or data are not said, or the simulation has more sites than folders.
        SettingsError: ``rank`` is no positive whole number.
    """
    rank = node_config.get("rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise SettingsError(
            f"rank in this site's node config is {rank!r}: expected a whole number from 1 on, "
            "such as --node-config 'rank=4'"
        )
    if "partition-id" in node_config and not node_config.get("data"):
        folder = _simulated_folder(int(node_config["partition-id"]), simulation)
        base_model, data, name = str(simulation["base_model"]), folder / "train.jsonl", folder.name
        state = folder.parent.absolute().parent / "site-state" / name
    else:
        if missing := [key for key in ("data", "base_model") if not node_config.get(key)]:
            raise ModelError(
                f"this site does not say its {missing[0]}: start its SuperNode with --node-config "
                '\'data="FILE.jsonl" base_model="DIRECTORY"\''
            )
        base_model, data = str(node_config["base_model"]), Path(str(node_config["data"]))
        name = str(node_config.get("name", ""))
        state = _state_home(environment) / "fedge" / str(node_id)
    if node_config.get("state"):
        state = Path(str(node_config["state"]))
    return Site(Path(base_model), data, name, state, rank)


def _simulated_folder(index: int, simulation: Mapping[str, Any]) -> Path:
    """Return the folder of a simulated site: they are taken in the order of their names."""
    value = str(simulation.get("simulated_sites", ""))
    root = Path(value)
    if not value or not root.is_dir():
        raise ModelError(
            f"simulated_sites is {value!r}: a simulation needs a directory with one folder a "
            "site, each with train.jsonl"
        )
    folders = sorted(path for path in root.iterdir() if (path / "train.jsonl").is_file())
    if index >= len(folders):
        raise ModelError(
            f"{root} holds {len(folders)} sites, the simulation has one more: pass "
            f"--federation-config 'num-supernodes={len(folders)}'"
        )
    return folders[index]


def _state_home(environment: Mapping[str, str]) -> Path:
    if environment.get("XDG_STATE_HOME"):
        return Path(environment["XDG_STATE_HOME"])
    return Path(environment.get("HOME") or Path.home()) / ".local" / "state"
