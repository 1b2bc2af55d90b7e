"""The containers of docker/compose.yaml without an engine: namespaces, chroot, users, mounts.

Root of this machine starts what compose would start: the service's command, as its user and groups,
without capabilities, in a mount namespace whose root is read-only and holds nothing but this
machine's /usr, this Python, the source, what the Dockerfile's `install -d` makes, and the service's
own mounts; with `network_mode: none` in a network namespace of its own, else in one that all share.
What it does not show: that the images build, and Docker's own networks.

As a program it is `docker run` for docker/new_site.sh: see ``docker_run``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
HOSTS = "127.0.0.1 localhost superlink proxy\n"


def can_contain() -> bool:
    """Tell whether this user may make namespaces and mounts here."""
    if os.getuid() != 0 or shutil.which("setpriv") is None or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--mount", "--net", "sh", "-c", "mount -t tmpfs none /mnt && ip link"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def read_compose(path: Path = DOCKER / "compose.yaml") -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def stages(dockerfile: Path = DOCKER / "Dockerfile") -> dict[str, list[str]]:
    """Return the instructions of each stage, those of the stage that it builds on first."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    found: dict[str, list[str]] = {}
    name = ""
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            found[name] = list(found.get(match[1], []))
        found[name].append(line)
    return found


def variables_of(instructions: Sequence[str]) -> dict[str, str]:
    """Return what ENV says, the last word of each variable."""
    words = [word for line in instructions if line.startswith("ENV ") for word in line.split()[1:]]
    return dict(word.split("=", 1) for word in words)


@dataclass(frozen=True)
class Image:
    """What a stage of the Dockerfile leaves in the file system."""

    stage: str

    @property
    def instructions(self) -> list[str]:
        return stages()[self.stage]

    def commands(self, root: str) -> list[str]:
        """Return shell lines that make users and directories below a root."""
        lines = []
        for line in self.instructions:
            for step in re.split(r"\s*&&\s*", line.removeprefix("RUN ")):
                words = shlex.split(step)
                if words[:2] == ["install", "-d"]:
                    split = next(i for i, word in enumerate(words) if word.startswith("/"))
                    lines.append(
                        " ".join([*words[:split], *(root + word for word in words[split:])])
                    )
                elif words[0] == "groupadd":
                    gid, name = words[words.index("--gid") + 1], words[-1]
                    lines.append(f"echo {name}:x:{gid}: >> {root}/etc/group")
                elif words[0] == "useradd":
                    uid, gid = (words[words.index(key) + 1] for key in ("--uid", "--gid"))
                    row = f"{words[-1]}:x:{uid}:{gid}::/tmp:/usr/sbin/nologin"
                    lines.append(f"echo {row} >> {root}/etc/passwd")
        return lines


@dataclass
class Engine:
    """A directory with compose.yaml and what belongs to it, and the containers that run from it."""

    home: Path
    """Copy of docker/."""
    base_model: Path
    scratch: Path
    network: subprocess.Popen[bytes] = field(init=False)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> "Engine":
        self.scratch.mkdir(exist_ok=True)
        hold = "ip link set lo up && echo up && exec sleep infinity"
        self.network = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", hold], stdout=subprocess.PIPE
        )
        assert self.network.stdout is not None
        assert self.network.stdout.readline() == b"up\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self.network.stdout is not None
        processes = [*self.running.values(), self.network]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.network.stdout.close()

    def service(self, name: str) -> dict[str, Any]:
        text = (self.home / "compose.yaml").read_text()
        text = re.sub(r"\$\{FEDGE_BASE_MODEL:\?[^}]*\}", str(self.base_model), text)
        return dict(yaml.safe_load(text)["services"][name])

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service with its own command."""
        with self.log(name).open("ab") as log:
            os.fchmod(log.fileno(), 0o666)  # Docker gives a container its own standard output
            process = subprocess.Popen(
                self.command(name), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.running[name] = process
        return process

    def call(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`docker compose run --rm NAME WORDS…`."""
        return subprocess.run(
            self.command(name, words), capture_output=True, text=True, check=False, timeout=300
        )

    def execute(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`docker compose exec NAME WORDS…`."""
        service, pid = self.service(name), self.running[name].pid
        inside = ["nsenter", f"--target={pid}", "--mount", "--net", "--root", "--wd"]
        words = (*inside, *self._as_user(service), *self._environment(service), *words)
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    def is_healthy(self, name: str) -> bool:
        kind, *words = self.service(name)["healthcheck"]["test"]
        assert kind == "CMD"
        return self.execute(name, *words).returncode == 0

    def wait_until(self, is_true: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended: {self.log(name).read_text()[-2000:]}"
            if time.monotonic() > deadline:
                logs = {name: self.log(name).read_text()[-1500:] for name in self.running}
                raise AssertionError(f"{what} did not happen: {json.dumps(logs, indent=1)}")
            time.sleep(0.3)

    def log(self, name: str) -> Path:
        return self.scratch / f"{name}.log"

    def command(self, name: str, words: Sequence[str] = ()) -> list[str]:
        """Return the words that start a service here."""
        service = self.service(name)
        image = Image(service["build"]["target"])
        script = [*root_file_system(image), *self._mounts(service)]
        for place in service["tmpfs"]:
            path, _, options = place.partition(":")
            options = f"noexec,nosuid,nodev,{options}"  # as Docker mounts one
            script += [f"mkdir -p $R{path}", f"mount -t tmpfs -o {options} none $R{path}"]
        if service["read_only"]:
            script += ["mount -o remount,ro $R"]
        command = list(words or service.get("command") or ())
        entry = [line.split(" ", 1)[1] for line in image.instructions if "ENTRYPOINT" in line]
        command = [*(json.loads(entry[-1]) if entry else ()), *command]
        inside = [*self._as_user(service), *self._environment(service), *command]
        script += [f"exec chroot $R {shlex.join(inside)}"]
        enter = ["unshare", "--net"]
        if service.get("network_mode") != "none":
            enter = ["nsenter", f"--target={self.network.pid}", "--net"]
        return [*enter, "unshare", "--mount", "sh", "-ec", "\n".join(script)]

    def _mounts(self, service: Mapping[str, Any]) -> list[str]:
        lines = []
        for volume in service["volumes"]:
            source, target, *options = volume.split(":")
            place = f"$R{target}"
            if source.startswith((".", "/")):
                path = (self.home / source).resolve()
                assert path.exists(), path
                make = f"mkdir -p {place}" if path.is_dir() else f"touch {place}"
                lines += [f"mkdir -p {Path(place).parent}", make]
            else:
                path = self.scratch / "volumes" / source
                # As Docker does: a new volume begins as a copy of the directory below it.
                copy = f"mkdir -p {path.parent} {place}; cp -a {place} {path}"
                lines += [f"test -d {path} || {{ {copy}; }}"]
            lines += [f"mount --bind {path} {place}"]
            if options == ["ro"]:
                lines += [f"mount -o remount,bind,ro {place}"]
        return lines

    @staticmethod
    def _as_user(service: Mapping[str, Any]) -> list[str]:
        uid, gid = service["user"].split(":")
        groups = service.get("group_add")
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        return [
            *("setpriv", f"--reuid={uid}", f"--regid={gid}"),
            f"--groups={','.join(groups)}" if groups else "--clear-groups",
            *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
        ]

    @staticmethod
    def _environment(service: Mapping[str, Any]) -> list[str]:
        image = Image(service["build"]["target"])
        variables = variables_of(image.instructions) | dict(service.get("environment", {}))
        variables.setdefault("PATH", "/usr/sbin:/usr/bin")
        # Of this machine, not of the image: the source is mounted instead of installed.
        variables |= {"PYTHONPATH": "/opt/src", "OMP_NUM_THREADS": "1"}
        return ["env", "-i", *(f"{key}={value}" for key, value in variables.items())]


def root_file_system(image: Image) -> list[str]:
    """Return shell lines that make the root of a container; $R is its path afterwards."""
    own = [sys.prefix, sys.base_prefix]
    lines = [
        "R=/mnt && mount -t tmpfs -o mode=755 none $R",
        "mkdir -p $R/usr $R/proc $R/dev $R/etc/nginx $R/tmp $R/opt/src $R/opt/app",
        "for name in bin sbin lib lib64; do ln -s usr/$name $R/$name; done",
        "mount --bind -o ro /usr $R/usr",
        "mount --rbind /proc $R/proc && mount --rbind /dev $R/dev",
        *(f"mkdir -p $R{path} && mount --bind -o ro {path} $R{path}" for path in own),
        f"ln -s {sys.prefix} $R/opt/fedge",
        f"mount --bind -o ro {ROOT} $R/opt/src",
        "cp /etc/ld.so.cache $R/etc/ && touch $R/etc/group $R/etc/passwd",
        f"printf '{HOSTS.strip()}\\n' > $R/etc/hosts",
        *image.commands("$R"),
    ]
    if image.stage == "coordinator":
        lines += [
            f"cp {DOCKER}/flower.toml $R/var/lib/fedge/flower/config.toml",
            "chown 10003:10003 $R/var/lib/fedge/flower/config.toml",
            f"cd {ROOT} && cp -r pyproject.toml README.md LICENSE federation client $R/opt/app/",
        ]
    if image.stage == "proxy":
        template = ROOT / "examples" / "deployment" / "nginx.conf"
        lines += [f"sed -f {DOCKER}/nginx.sed {template} > $R/etc/nginx/nginx.conf"]
    return lines


def docker_run(words: Sequence[str]) -> None:
    """Be `docker run`, for the options that new_site.sh has."""
    rest = list(words)
    mounts, options = [], {}
    while rest[0].startswith("-"):
        name = rest.pop(0)
        if name == "-v":
            mounts.append(rest.pop(0))
        elif name != "--rm":
            options[name] = rest.pop(0)
    assert rest.pop(0) == "fedge-site"
    assert options == {"--network": "none", "--user": "0:0", "--cap-drop": "ALL"}
    service = {
        "build": {"target": "site"},
        "user": options["--user"],
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": [],
        "read_only": False,
        "volumes": mounts,
        "command": rest,
    }
    engine = Engine(Path("/"), Path("/"), Path("/"))
    engine.service = lambda _: service  # type: ignore[method-assign]
    os.execvp("unshare", engine.command("the site"))  # noqa: S606


if __name__ == "__main__":
    assert sys.argv[1] == "run"
    docker_run(sys.argv[2:])
