"""`client doctor`: every check of a site in one order. Facts come from the machine, here alone.

Where daemon and trainer are two users, or two containers, each sees only its half: ``parts`` says
whose is looked at. The doctor changes nothing, makes no file, and takes no lock.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from client import coordinator, machine, site_files
from client.check import Check, first_problem, ok, skipped
from client.health import ClosedError
from client.identity import check_identity, public_identity, read_identity
from client.peer import Peer, peer_at
from client.site_files import attempt, look
from client.site_settings import SiteSettings, load_site
from client.site_template import PLACEHOLDERS
from client.status import describe_connection, site_status
from client.supernode import refuse_shared_user
from client.trainer_link import LONGEST_PATH
from federation.errors import UserError

Part = Literal["node", "trainer"]
PARTS: tuple[Part, ...] = ("node", "trainer")


def examine(
    config: Path | None,
    *,
    parts: Collection[Part] = PARTS,
    is_quick: bool = False,
    variables: Mapping[str, str],
) -> Iterator[Check]:
    """Yield what each check finds, as soon as it is found.

    Args:
        config: site.toml; None = the machine only.
        parts: Whose half of the site is looked at.
        is_quick: Do not read all of the base model, nor ask the coordinator.
        variables: Of the environment.
    """
    yield machine.check_python()
    yield machine.check_packages(machine.installed_versions(machine.TESTED))
    yield machine.check_user(os.geteuid())
    yield machine.check_environment(variables)
    settings = attempt(lambda: load_site(config)) if config else None
    if config is not None:
        yield check_settings(settings, config, parts)
    read = settings if isinstance(settings, SiteSettings) else None
    if "trainer" in parts:
        yield from _trainer_checks(read, is_quick=is_quick)
    if config is not None and read is not None and "node" in parts:
        yield from _node_checks(read, is_quick=is_quick)
        yield check_supernode(read, config)
    if read is not None:
        yield check_socket(read, peer_at(read.socket), parts)


def check_settings(
    settings: SiteSettings | str | None, config: Path, parts: Collection[Part] = PARTS
) -> Check:
    """Say whether site.toml can be read, and is more than a template."""
    if not isinstance(settings, SiteSettings):
        return Check("settings", "fail", str(settings), f"mend {config.name}, or client init")
    here = config.absolute().parent
    places: dict[Part, dict[str, Path]] = {
        "node": {"root_certificate": settings.root_certificate},
        "trainer": {"base_model": settings.base_model, "data": settings.data},
    }
    left = [
        key
        for part in parts
        for key, place in places[part].items()
        if place == here / PLACEHOLDERS[key] and not look(place).is_there
    ]
    if "node" in parts and settings.superlink == PLACEHOLDERS["superlink"]:
        left.insert(0, "superlink")
    if left:
        return Check("settings", "fail", f"not filled in: {', '.join(left)}", f"edit {config}")
    return ok("settings", f"{config}, {settings.node} node")


def check_socket(settings: SiteSettings, peer: Peer, parts: Collection[Part]) -> Check:
    """Say whether daemon and trainer can meet.

    Args:
        settings: Of the site.
        peer: What is at the socket.
        parts: Who asks.
    """
    name, path = "socket", settings.socket
    said = f"{len(str(path).encode())} of {LONGEST_PATH} bytes"
    if settings.is_child:
        return ok(name, f"{said}; the daemon starts the trainer")
    if settings.socket_group and not _group_is_known(settings.socket_group):
        said = f"socket_group {settings.socket_group!r} is no group of this machine"
        return Check(name, "fail", said, f"groupadd --system {settings.socket_group}")
    return first_problem(
        name,
        [
            (
                peer == "forbidden",
                "fail",
                f"{path} is not for this user",
                f"add this user to group {settings.socket_group or '… (socket_group is empty)'}",
            ),
            (
                peer == "silent",
                "fail",
                f"a trainer holds {path} and takes no connection",
                "look at its log, end it and start it again",
            ),
            (
                peer == "absent" and "node" in parts,
                "warn",
                f"no trainer listens at {path}",
                "start the trainer first",
            ),
        ],
        f"{said}; a trainer takes connections" if peer == "answers" else said,
    )


def check_supernode(settings: SiteSettings, config: Path) -> Check:
    """Say whether the code that runs bring could reach what is the trainer's.

    Args:
        settings: Of the site.
        config: Its site.toml.
    """
    name = "supernode"
    if settings.node == "resident":
        return ok(name, "none: a resident node runs no code of a run")
    if settings.allow_same_user:
        fix = "allow_same_user = false, and a trainer of another user's; see site.toml"
        return Check(name, "warn", "the code that runs bring may read the records", fix)
    if os.geteuid() == 0:
        return skipped(name, "root may all: run this as the daemon's user")
    refusal = attempt(lambda: refuse_shared_user(settings, config))
    if refusal is not None:
        return Check(name, "fail", refusal, 'or keep node at "resident"')
    return ok(name, "the code that runs bring reaches neither records, policy nor ledger")


def check_daemon(status: Mapping[str, object], health: str, *, is_port_free: bool) -> Check:
    """Say whether a daemon works in this state directory, and whether one could start.

    Args:
        status: From `client.status.site_status`.
        health: HOST:PORT of its health endpoint, or "".
        is_port_free: Whether that can be had.
    """
    if status["is_running"]:
        state = describe_connection(status)
        return ok("daemon", f"process {status['pid']} runs, {state}: another one is refused")
    if health and not is_port_free:
        fix = "choose another port for health in site.toml"
        return Check("daemon", "fail", f"health {health} is taken by another program", fix)
    return ok("daemon", "none runs")


def _trainer_checks(settings: SiteSettings | None, *, is_quick: bool) -> Iterator[Check]:
    model = _model_of(settings, is_quick=is_quick)
    weights = model.weights if isinstance(model, site_files.Model) else None
    yield machine.check_gpu(machine.find_gpus(), weights)
    yield machine.check_memory(machine.available_memory(), weights)
    if settings is None:
        return
    records = attempt(lambda: site_files.count_records(settings.data))
    policy = attempt(lambda: site_files.read_site_policy(settings.policy))
    yield site_files.check_model(model)
    yield site_files.check_data(records, look(settings.data))
    yield site_files.check_policy(policy, look(settings.policy), records)
    yield site_files.check_digest(model, policy)
    public = attempt(lambda: public_identity(read_identity(settings.identity)))
    is_named = settings.identity_key is not None
    yield check_identity(look(settings.identity), public, policy, is_named=is_named)
    yield site_files.check_state(look(settings.state), os.geteuid(), policy)
    yield _ledger_of(settings.state)


def _model_of(settings: SiteSettings | None, *, is_quick: bool) -> site_files.Model | str:
    if settings is None:
        return "there are no settings"
    return attempt(lambda: site_files.read_model(settings.base_model, is_quick=is_quick))


def _ledger_of(state: Path) -> Check:
    from client.fingerprint import SECRET
    from client.ledger import LEDGER, read_ledger

    secret = look(state / SECRET)
    directory = look(state)
    if directory.is_hidden or (directory.is_there and not directory.is_readable):
        said = "this user may not look into the state directory"
        return Check("ledger", "fail", said, "run this as the trainer's user, or as root")
    if not look(state / LEDGER).is_there:
        return site_files.check_ledger(None, secret)
    contents = attempt(lambda: read_ledger(state / LEDGER))
    if isinstance(contents, str):
        return site_files.check_ledger(contents, secret)
    head = (contents.head.count, contents.head.hash)
    return site_files.check_ledger(head, secret, num_charged=len(contents.data_sets))


def _node_checks(settings: SiteSettings, *, is_quick: bool) -> Iterator[Check]:
    key, now = settings.node_key, datetime.now(UTC)
    public = attempt(lambda: site_files.read_node_key(key))
    public_path = key.with_name(f"{key.name}.pub")
    beside = attempt(lambda: public_path.read_text(encoding="ascii"))
    is_beside = look(public_path).is_there
    yield site_files.check_node_key(look(key), public, beside if is_beside else None)
    root = settings.root_certificate
    yield coordinator.check_certificate(attempt(lambda: coordinator.read_certificates(root)), now)
    if is_quick:
        yield skipped("superlink", "not asked")
        yield coordinator.check_clock(None)
    else:
        answer = coordinator.ask_superlink(settings.superlink, root)
        yield coordinator.check_superlink(settings.superlink, answer, now)
        yield coordinator.check_clock(answer.ahead_s)
    if settings.node_state is not None:
        place = look(settings.node_state)
        yield site_files.check_state(place, os.geteuid(), "", name="node_state")
    is_free = _is_free(settings.health) if settings.health else True
    try:
        status = site_status(settings)
    except ClosedError as error:
        yield Check("daemon", "fail", str(error), "run this as the daemon's user, or as root")
    except UserError as error:
        yield Check("daemon", "fail", str(error), "end the daemon and start it again")
    else:
        yield check_daemon(status, settings.health, is_port_free=is_free)


def _group_is_known(name: str) -> bool:
    import grp

    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError:
            return False
    return True
