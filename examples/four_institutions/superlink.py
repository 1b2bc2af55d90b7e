"""A Flower SuperLink in simulation mode for as long as a block lasts."""

import contextlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from commands import CommandError
from processes import end_trees, end_with_parent, environment, free_ports
from rich.console import Console

from federation.atomic import write_atomically


@contextlib.contextmanager
def superlink(home: Path, console: Console) -> Iterator[None]:
    """Run a Flower SuperLink in simulation mode on a free loopback port; end it, by its id.

    `flwr run .` starts one by itself too, but that one stays behind when the run is over.
    """
    home.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    write_atomically(
        home / "config.toml",
        f'[superlink]\ndefault = "demo"\n\n[superlink.demo]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
    )
    command = [
        *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
        *("--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")),
    ]
    console.print(f"[bold cyan]$[/bold cyan] {shlex.join(command)} &", soft_wrap=True)
    with (home / "superlink.log").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            stdout=log,
            stderr=log,
            env=environment({"FLWR_HOME": str(home.resolve())}),
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it makes one system call and no lock
        )
    try:
        _wait_for_port(process, port, home / "superlink.log")
        yield
    finally:
        end_trees([process])


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise CommandError(f"the SuperLink did not start: see {log}")
