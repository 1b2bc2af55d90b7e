"""systemd units of a site: the trainer has the records and no network, the node has the network.

Two users that share a group and one socket. Neither may gain a privilege, write outside its own
state, or see what is the other's. `client init --systemd` writes them with the paths of the site.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from client.site_settings import SiteSettings

DIRECTORY = "systemd"
"""Below the site's directory."""
GROUP, TRAINER, NODE = "fedge", "fedge-trainer", "fedge-node"
"""A group that may use the socket, and two users in it; their units are called like them."""
TWO_USERS = {
    "trainer": f"/run/{TRAINER}/trainer",
    "socket_group": GROUP,
    "state": f"/var/lib/{TRAINER}",
    "node_state": f"/var/lib/{NODE}",
}
"""Of site.toml: systemd makes these directories, each for its own user."""

_USERS = f"""\
# Two users for a site, and the group of the socket between them: systemd-sysusers makes them.
g {GROUP} -
u {TRAINER} - "Fedge trainer" /var/lib/{TRAINER}
u {NODE} - "Fedge node" /var/lib/{NODE}
m {TRAINER} {GROUP}
m {NODE} {GROUP}
"""

_SANDBOX = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
UMask=0077
ProtectSystem=strict
ProtectHome=@home@
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""

_TRAINER = """\
# The trainer: this site's records, model, policy and ledger. It has no network: all that comes to
# it or leaves it goes through its socket, which the node's user may use and nobody else.
[Unit]
Description=Fedge trainer

[Service]
User=@trainer@
Group=@trainer@
SupplementaryGroups=@group@
ExecStart=@client@ trainer --config @config@
StateDirectory=@trainer@
StateDirectoryMode=0700
RuntimeDirectory=@trainer@
RuntimeDirectoryMode=0710
Environment=HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
Restart=on-failure
RestartSec=5
# 2: somebody has to change something, and its last line says what.
RestartPreventExitStatus=2
# SIGTERM lets the round in hand go on for drain_s.
TimeoutStopSec=@drain@

PrivateNetwork=yes
IPAddressDeny=any
RestrictAddressFamilies=AF_UNIX
# A GPU's devices and no others. nvidia-persistenced makes them before this starts.
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
# The node's key is the node's.
InaccessiblePaths=@key@
@sandbox@
[Install]
WantedBy=multi-user.target
"""

_NODE = """\
# The node: takes a run's messages from the coordinator to the trainer, and answers back. It sees
# neither the records nor the model nor the ledger.
[Unit]
Description=Fedge node
Wants=network-online.target @trainer@.service
After=network-online.target @trainer@.service

[Service]
User=@node@
Group=@node@
SupplementaryGroups=@group@
ExecStart=@client@ daemon --config @config@
StateDirectory=@node@
StateDirectoryMode=0700
Environment=FLWR_HOME=%S/@node@/flower FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
Environment=FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2
TimeoutStopSec=@drain@
# The daemon alone is told to end, and ends the others: a SuperNode that is told twice does not sign
# off. What is left then, an app of a run among it, is killed.
KillMode=mixed

RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
PrivateDevices=yes
InaccessiblePaths=@data@ @model@ @policy@ @identity@ -/var/lib/@trainer@
@sandbox@
[Install]
WantedBy=multi-user.target
"""


def service_units(settings: SiteSettings, config: Path, client: Path) -> dict[str, str]:
    """Return the text of each file by its name: two units, and the users of systemd-sysusers.

    Args:
        settings: Of the site, with ``TWO_USERS`` in them.
        config: Its site.toml.
        client: The command of this installation.
    """
    paths = [config, client, settings.data, settings.base_model, settings.root_certificate]
    words = {
        "sandbox": _SANDBOX,
        "home": _protected_home(paths),
        "group": GROUP,
        "trainer": TRAINER,
        "node": NODE,
        "client": _word(str(client).replace("$", "$$")),
        "config": _word(str(config).replace("$", "$$")),
        # With the sign that the path may be missing.
        "key": _word(f"-{settings.node_key}"),
        "identity": _word(f"-{settings.identity}"),
        "data": _word(f"-{settings.data}"),
        "model": _word(f"-{settings.base_model}"),
        "policy": _word(f"-{settings.policy}"),
        "drain": str(int(settings.drain_s) + 60),
    }
    units = {f"{TRAINER}.service": _TRAINER, f"{NODE}.service": _NODE}
    return {name: _filled(text, words) for name, text in units.items()} | {"fedge.conf": _USERS}


def install_steps(directory: Path, settings: SiteSettings) -> list[str]:
    """Return what root types to let systemd run a site.

    Args:
        directory: Where the units were written.
        settings: Of the site.
    """
    key, identity, data, place = (
        shlex.quote(str(p))
        for p in (settings.node_key, settings.identity, settings.data, directory)
    )
    users = f"install -D -m 644 {place}/fedge.conf /etc/sysusers.d/fedge.conf && systemd-sysusers"
    owners = f"chown {NODE} {key} && chown {TRAINER} {identity} {data} && chmod 600 {data}"
    units = f"install -m 644 {place}/*.service /etc/systemd/system/ && systemctl daemon-reload"
    return [
        f"As root, make the users: {users}",
        f"Give each its own: {owners}",
        f"Start the site: {units} && systemctl enable --now {TRAINER} {NODE}",
    ]


def _filled(text: str, words: dict[str, str]) -> str:
    for name, word in words.items():
        text = text.replace(f"@{name}@", word)
    return text


def _protected_home(paths: Sequence[Path]) -> str:
    """Return "yes", or "read-only" where something that is needed lies in a home directory."""
    homes = (Path("/home"), Path("/root"), Path("/run/user"))
    needed = any(path.is_relative_to(home) for path in paths for home in homes)
    return "read-only" if needed else "yes"


def _word(text: str) -> str:
    """Return a text as one word of a unit, in which % would be expanded."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    is_plain = not any(letter.isspace() or letter in "\\\"';#" for letter in text)
    return escaped if is_plain else f'"{escaped}"'
