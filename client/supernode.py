"""A stock SuperNode beside the trainer: what it is started with, and as whom it must not run.

It runs the code that a run brings, with the rights of its own user. So the trainer, which owns the
records, has to be another user's process, started apart; between them is the trainer's socket.
Two things stay in that code's reach, whatever is done here: the node's private key, which the
SuperNode reads, and the daemon's life, which ends with a signal of its own user.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from client.site_settings import SiteSettings
from federation.errors import UserError

PASSED_ON = (
    *("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
    *("FLWR_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR"),
)
"""Variables of the daemon that the SuperNode gets, if they are set: any other may be a secret, the
address of a proxy included. The app of a run reads them all."""


def supernode_command(settings: SiteSettings, port: int) -> list[str]:
    """Return the command of a stock SuperNode whose app finds the trainer's socket.

    Args:
        settings: Of the site.
        port: On loopback, for the SuperNode's own processes.
    """
    name = settings.name.replace("\\", "").replace('"', "")
    return [
        str(Path(sys.executable).with_name("flower-supernode")),
        *("--superlink", settings.superlink),
        *("--root-certificates", str(settings.root_certificate)),
        *("--auth-supernode-private-key", str(settings.node_key)),
        *("--port", str(port)),
        *("--node-config", f'trainer="{settings.socket}" name="{name}"'),
    ]


def supernode_environment(own: Mapping[str, str], memory: Path) -> dict[str, str]:
    """Return all the variables of a stock SuperNode: nothing calls home, nothing is installed.

    It finds its own programs by PATH, and asks for a message's work every 0.05 s, not every 1 s.

    Args:
        own: The daemon's variables.
        memory: The daemon's own directory: apps are unpacked below it, unless FLWR_HOME is set.
    """
    here = str(Path(sys.executable).parent)
    return {
        "FLWR_HOME": str(memory / "flower"),
        **{name: own[name] for name in PASSED_ON if name in own},
        "PATH": f"{here}{os.pathsep}{own.get('PATH', '')}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    }


def refuse_shared_user(settings: SiteSettings, config: Path | None = None) -> None:
    """Make sure that code with this user's rights reaches neither the records nor the policy.

    The owner of the socket's file is the trainer's user; without one, only rights are looked at.

    Args:
        settings: Of the site.
        config: Its site.toml, which the trainer reads too; None = it is in no file.

    Raises:
        UserError: It would; the sentence says by which setting.
    """
    if settings.allow_same_user:
        return
    try:
        owner = settings.socket.stat().st_uid
    except OSError:
        owner = -1
    me = os.geteuid()
    way_out = (
        "a SuperNode runs the code that a run brings, and it would have the site's records; run "
        "the daemon as a user of its own, or set allow_same_user = true if that is meant"
    )
    if me == 0:
        raise UserError(f'node is "supernode" and the daemon runs as root: {way_out}')
    if owner == me:
        raise UserError(
            f'node is "supernode" and the trainer runs as the same user as the daemon: {way_out}'
        )
    if (deed := _deed_within_reach(settings, config)) is not None:
        raise UserError(
            f'node is "supernode" and the daemon\'s user may {deed}, and '
            "so may the code that a run brings: take that right away (chmod, chown), or set "
            "allow_same_user = true if that is meant"
        )


def _deed_within_reach(settings: SiteSettings, config: Path | None) -> str | None:
    """Return what this user could do to the site, or None."""
    files: list[tuple[str, Path, dict[str, int]]] = [
        ("data", settings.data, {"read": os.R_OK, "change": os.W_OK}),
        # Who may rename it puts an empty one in its place: the records' budget would begin anew.
        ("state", settings.state, {"enter": os.X_OK}),
        ("identity_key", settings.identity, {"read": os.R_OK}),
        ("policy", settings.policy, {"change": os.W_OK}),
    ]
    if config is not None:  # it says which data and policy the trainer takes
        files.append(("the settings", config, {"change": os.W_OK}))
    for what, path, rights in files:
        for verb, right in rights.items():
            if _may(path, right):
                return f"{verb} {what} ({path.name})"
    for what, path, _ in files:
        if (place := _replaceable(path)) is not None:
            inside = "" if place == path else f", by way of {place}"
            return f"replace {what} ({path.name}{inside})"
    return None


def _may(path: Path, right: int) -> bool:
    """Return whether this user has a right, or owns the path and so can give it to itself."""
    try:
        is_own = path.stat().st_uid == os.geteuid()
    except OSError:
        return False
    return is_own or os.access(path, right, effective_ids=True)


def _replaceable(path: Path) -> Path | None:
    """Return what on the way to a path, from the root, this user could rename or make; or None."""
    for whole in dict.fromkeys((path.absolute(), path.resolve())):  # a link, and where it leads
        for place in reversed([whole, *whole.parents][:-1]):
            if _may(place.parent, os.W_OK) and not _is_kept(place):
                return place
    return None


def _is_kept(place: Path) -> bool:
    """Return whether the sticky bit of its directory keeps a name for its owner (as in /tmp)."""
    try:
        above, found = place.parent.stat(), place.lstat()
    except OSError:  # nothing there: whoever may write can make it
        return False
    is_sticky = bool(above.st_mode & stat.S_ISVTX)
    return is_sticky and os.geteuid() not in (above.st_uid, found.st_uid)
