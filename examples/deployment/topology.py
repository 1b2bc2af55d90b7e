"""One coordinator and its sites on one machine, put together as on many.

    site: client daemon ──TLS──▶ nginx ──TLS──▶ flower-superlink ◀──TLS── flower-superexec
          (node key)             only /v1/fleet   state in SQLite         starts the ServerApp

Sites are in `daemons.py`; a stock flower-supernode that trains in its own process is here. Sites
see nginx and nothing else. The SuperLink listens on loopback, where the coordinator's own
commands (`flwr run`, `flwr supernode register`) and its SuperExec reach it. The SuperExec is a
program of its own, so a run outlives a SuperLink that is restarted.
"""

import contextlib
import http.client
import os
import shutil
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certificates import (
    issue_server_certificate,
    make_authority,
    make_node_key,
    make_shared_secret,
)
from processes import free_ports
from rich.console import Console
from services import Services

from federation.atomic import refuse_existing, write_atomically
from federation.errors import UserError

CONNECTION = "coordinator"
"""What the coordinator's Flower commands call the SuperLink."""

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment of every Flower program: nothing calls home, nothing is installed during a run."""

SITE_SWITCHES = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05"}
"""Of a site's programs: a message is noticed in 0.05 s, not 1 s. The coordinator's SuperExec starts
one process a run, and asking so often would keep the SuperLink busy."""


@dataclass(frozen=True)
class Site:
    """One institution: a directory that holds its key, and what its SuperNode tells the run."""

    name: str
    node_config: str
    """Words of `flower-supernode --node-config`: `data="…" base_model="…" name="…"`."""


@dataclass(frozen=True)
class Deployment:
    """What runs while the block of `deployment` lasts."""

    home: Path
    services: Services
    superlink: str
    """Address of all the SuperLink's APIs, for the coordinator only."""
    sites_port: int
    """All that a site is told of: nginx's, or the SuperLink's own where there is no proxy."""
    site_switches: Mapping[str, str]

    @property
    def certificates(self) -> Path:
        """Directory of the coordinator's certificates and keys."""
        return self.home / "coordinator" / "certificates"

    def variables(self, owner: str) -> dict[str, str]:
        """Return the variables of one owner's programs: each has its own Flower directory."""
        return {"FLWR_HOME": str(self.home / owner / "flower")}

    def flwr(self, *words: str) -> dict[str, Any]:
        """Run a Flower command as the coordinator, unprinted; return the object it answers with."""
        command = ["flwr", *words, CONNECTION, "--format", "json"]
        return self.services.call(command, self.variables("coordinator"), is_shown=False)

    def start_site(self, site: Site, *, is_registered: bool = True) -> str:
        """Make a site's key, register its public half, start its SuperNode; return its name."""
        key = make_node_key(self.home / "sites" / site.name)
        if is_registered:
            self.register(key.with_suffix(".pub"), site.name)
        (port,) = free_ports(1)
        name = f"supernode-{site.name}"
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.sites_port}"]
        command += ["--root-certificates", str(self.certificates / "ca.crt")]
        command += ["--auth-supernode-private-key", str(key), "--port", str(port)]
        if site.node_config:
            command += ["--node-config", site.node_config]
        self.services.start(
            name, command, {**self.variables(f"sites/{site.name}"), **self.site_switches}
        )
        return name

    def register(self, public_key: Path, name: str) -> None:
        """Admit the site that has the other half of a key."""
        command = ["flwr", "supernode", "register", str(public_key), CONNECTION]
        self.services.call(
            [*command, "--name", name, "--format", "json"], self.variables("coordinator")
        )

    def num_online(self) -> int:
        """Return how many SuperNodes the SuperLink counts as connected."""
        return sum(node["status"] == "online" for node in self.flwr("supernode", "ls")["nodes"])

    def status_of(self, method: str, path: str) -> int:
        """Return the HTTP status of a request without a body through the sites' port."""
        return _status_of(self.sites_port, self.certificates / "ca.crt", method, path)


@contextlib.contextmanager
def deployment(
    home: Path,
    sites: Sequence[Site],
    console: Console,
    *,
    port: int | None = None,
    site_switches: Mapping[str, str] = SITE_SWITCHES,
    has_proxy: bool = True,
    started_for: Path | None = None,
) -> Iterator[Deployment]:
    """Start everything, wait until every site is connected, and end everything after the block.

    Args:
        home: A new directory; all keys, state and logs go below it.
        sites: Stock SuperNodes, each with another name.
        console: Where the commands are printed.
        port: That sites see; None takes a free one.
        site_switches: Environment of the SuperNodes, besides ``SWITCHES``.
        has_proxy: Whether nginx stands before the SuperLink. Without it whoever reaches the port
            may start runs: only where sites and coordinator are one user on one machine.
        started_for: Directory by which `processes.end_left_behind` finds the programs after a kill.

    Raises:
        UserError: ``home`` is not empty, a port is taken, or nginx is not installed.
        ServiceError: A program did not start.
    """
    refuse_existing(home)
    nginx, home = find_nginx() if has_proxy else None, home.resolve()
    sites_port, superlink_port = _ports(port)
    if not has_proxy:
        superlink_port = sites_port
    services = Services(home / "logs", console, SWITCHES, started_for)
    made = Deployment(home, services, f"127.0.0.1:{superlink_port}", sites_port, site_switches)
    _write_secrets(made)
    try:
        start_superlink(made)
        _start_superexec(made)
        if nginx is not None:
            _start_nginx(made, nginx)
        names = [made.start_site(site) for site in sites]
        made.services.wait_until(
            lambda: made.num_online() == len(sites), "the connection of every site", 60
        )
        yield made
        # Sites first, while there is a SuperLink to say goodbye to.
        made.services.end(names)
    finally:
        made.services.end()


def find_nginx() -> str:
    """Return the path of nginx; distributions put it where not every user's PATH looks.

    Raises:
        UserError: It is not installed.
    """
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which("nginx", path=places)
    if found is None:
        raise UserError("nginx is not installed: run `make nginx`, or apt-get install nginx-light")
    return found


def _ports(wanted: int | None) -> tuple[int, int]:
    first, second = free_ports(2)
    if wanted is None:
        return first, second
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            reason = error.strerror
            raise UserError(f"port {wanted} is {reason}: choose another one") from None
    return wanted, first if first != wanted else second


def _write_secrets(made: Deployment) -> None:
    ca = make_authority(made.certificates)
    # In a real deployment the proxy's certificate names the host that sites connect to.
    for server in ("superlink", "proxy"):
        issue_server_certificate(made.certificates, server, ["127.0.0.1", "localhost"])
    make_shared_secret(made.certificates / "superexec.secret")
    write_atomically(
        made.home / "coordinator" / "flower" / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{made.superlink}"\nroot-certificates = "{ca}"\n',
    )


def start_superlink(made: Deployment) -> None:
    """Start the SuperLink, or start it again on the same database, and wait until it answers."""
    port = int(made.superlink.rpartition(":")[2])
    certificates = made.certificates
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ssl-ca-certfile", str(certificates / "ca.crt")]
    command += ["--ssl-certfile", str(certificates / "superlink.crt")]
    command += ["--ssl-keyfile", str(certificates / "superlink.key")]
    command += ["--enable-supernode-auth", "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(certificates / "superexec.secret")]
    command += ["--database", str(made.home / "coordinator" / "state.db")]
    made.services.start("superlink", command, made.variables("coordinator"))

    def is_up() -> bool:
        try:
            return _status_of(port, certificates / "ca.crt", "GET", "/health") == 200
        except OSError:
            return False

    made.services.wait_until(is_up, "the start of the SuperLink", 60)


def _start_superexec(made: Deployment) -> None:
    command = ["flower-superexec", "--runtime-api-address", made.superlink]
    command += ["--root-certificates", str(made.certificates / "ca.crt")]
    command += ["--superexec-auth-secret-file", str(made.certificates / "superexec.secret")]
    made.services.start("superexec", command, made.variables("coordinator"))


def _start_nginx(made: Deployment, nginx: str) -> None:
    directory = made.home / "coordinator"
    (directory / "nginx").mkdir()
    words = {
        "home": str(directory),
        "logs": str(made.services.logs),
        "superlink": made.superlink,
        "listen": f"127.0.0.1:{made.sites_port}",
        "certificates": str(made.certificates),
    }
    text = Path(__file__).with_name("nginx.conf").read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    write_atomically(directory / "nginx.conf", text)
    command = [nginx, "-e", "stderr", "-g", "daemon off;"]
    command += ["-p", str(directory), "-c", str(directory / "nginx.conf")]
    made.services.start("nginx", command, {})

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            return made.status_of("GET", "/") == 403
        return False

    made.services.wait_until(is_up, "the start of nginx", 20)


def _status_of(port: int, ca: Path, method: str, path: str) -> int:
    context = ssl.create_default_context(cafile=str(ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        connection.request(method, path, headers={"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()
