"""A Flower SuperLink in simulation mode for as long as a block lasts."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from federation.atomic import write_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deployment"))


@contextlib.contextmanager
def simulation(home: Path) -> Iterator[None]:
    """Run a SuperLink for `flwr run .` with ``home`` as FLWR_HOME; end it, by its id.

    `flwr run .` starts one by itself too, but that one stays behind when the run is over.
    """
    from processes import free_ports
    from services import Services
    from topology import SWITCHES

    (port,) = free_ports(1)
    write_atomically(
        home / "config.toml",
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
    )
    services = Services(home / "logs", Console(stderr=True), SWITCHES)
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")]

    def is_up() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        services.start("superlink", command, {"FLWR_HOME": str(home)})
        services.wait_until(is_up, "the start of the SuperLink", 60)
        yield
    finally:
        services.end()
