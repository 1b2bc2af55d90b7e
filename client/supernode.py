"""A stock SuperNode beside the trainer: what it is started with, and as whom it must not run.

It runs the code that a run brings, with the rights of its own user. So the trainer, which owns the
records, has to be another user's process, started apart; between them is the trainer's socket.
Two things stay in that code's reach, whatever is done here: the node's private key, which the
SuperNode reads, and the daemon's life, which ends with a signal of its own user.
"""

from __future__ import annotations

import os
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


def refuse_shared_user(settings: SiteSettings) -> None:
    """Make sure that code with this user's rights reaches neither the records nor the policy.

    The owner of the socket's file is the trainer's user. Nothing is said while there is no socket.

    Raises:
        UserError: It would; the sentence says by which setting.
    """
    if settings.allow_same_user:
        return
    try:
        owner = settings.socket.stat().st_uid
    except FileNotFoundError:
        return
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
    for what, path, mode in (
        (f"read data ({settings.data.name})", settings.data, os.R_OK),
        (f"enter state ({settings.state.name})", settings.state, os.X_OK),
        (f"read identity_key ({settings.identity.name})", settings.identity, os.R_OK),
        (f"change policy ({settings.policy.name})", settings.policy, os.W_OK),
        (f"replace policy ({settings.policy.name})", settings.policy.parent, os.W_OK),
    ):
        if os.access(path, mode):
            raise UserError(
                f'node is "supernode" and the daemon\'s user may {what}, and '
                "so may the code that a run brings: take that right away (chmod, chown), or set "
                "allow_same_user = true if that is meant"
            )
