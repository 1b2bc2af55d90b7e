"""docker/ without an engine: what the files promise, and what the containers' commands do.

The promises are read from compose.yaml, Dockerfile and .dockerignore. Then the very commands run,
as their users, in namespaces (tests.docker.containers).
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import translate
from pathlib import Path
from typing import Any

import pytest

from client.site_settings import load_site
from client.site_template import TWO_CONTAINERS
from tests.client.test_coordinator import issue_server_certificate, make_authority
from tests.conftest import write_records, write_tiny_model
from tests.docker.containers import DOCKER, ROOT, Engine, can_contain, read_compose, stages
from tests.policies import UNPROTECTED, policy_text

SITES = ("clinic", "bank", "lab")
COMPOSE = read_compose()
SERVICES: dict[str, Any] = COMPOSE["services"]
TRAINERS, NODES = (tuple(f"{site}-{part}" for site in SITES) for part in ("trainer", "node"))


def mounts_of(name: str) -> dict[str, tuple[str, bool]]:
    """Return (source, whether it is read-only) of each target of a service."""
    found = {}
    for volume in SERVICES[name]["volumes"]:
        # A variable's own colon is no separator.
        source, target, *options = re.sub(r"\$\{(\w+)[^}]*\}", r"$\1", volume).split(":")
        assert options in ([], ["ro"])
        found[target] = (source, bool(options))
    return found


# What the files promise


def test_there_is_no_package_that_would_hide_dockers_own() -> None:
    assert not list(DOCKER.glob("**/*.py"))


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_is_root_or_can_become_it(name: str) -> None:
    service = SERVICES[name]
    uid, gid = map(int, service["user"].split(":"))
    assert uid > 0
    assert gid > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & service.keys()
    for source, is_read_only in mounts_of(name).values():
        assert is_read_only or not source.startswith((".", "/", "$")), source
        assert "docker.sock" not in source


@pytest.mark.parametrize("name", set(SERVICES) - {"operator"})
def test_every_service_says_whether_it_is_well(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("site", SITES)
def test_a_trainer_has_the_records_and_no_network(site: str) -> None:
    trainer, node = SERVICES[f"{site}-trainer"], SERVICES[f"{site}-node"]
    assert trainer["network_mode"] == "none"
    assert "networks" not in trainer
    assert not {"ports", "expose"} & (trainer.keys() | node.keys())
    assert trainer["user"] != node["user"]
    shared = mounts_of(f"{site}-trainer").keys() & mounts_of(f"{site}-node").keys()
    assert shared == {"/run/fedge", "/etc/fedge/site.toml"}
    assert mounts_of(f"{site}-node")["/run/fedge"] == (f"{site}-socket", True)


def test_records_policy_ledger_and_model_are_mounted_where_they_are_needed_only() -> None:
    places = {name: {source for source, _ in mounts_of(name).values()} for name in SERVICES}
    for site in SITES:
        own = {f"./sites/{site}/{name}" for name in ("records.jsonl", "policy.toml", "identity")}
        for source in own | {f"{site}-trainer"}:
            assert [n for n in places if source in places[n]] == [f"{site}-trainer"], source
        key = f"./sites/{site}/node"
        assert [n for n in places if key in places[n]] == [f"{site}-node"]
    holders = [name for name in places if "$FEDGE_BASE_MODEL" in places[name]]
    assert set(holders) == {*TRAINERS, "superexec"}
    for secret in ("superlink.key", "proxy.key", "superexec.secret"):
        users = {name for name in places if f"./coordinator/{secret}" in places[name]}
        assert users == {secret.partition(".")[0]} | (
            {"superlink"} if secret == "superexec.secret" else set()
        )
    assert not any("ca.key" in source for sources in places.values() for source in sources)


def test_sites_see_the_proxy_and_nothing_else() -> None:
    networks = {name: set(service.get("networks", ())) for name, service in SERVICES.items()}
    assert {name for name in networks if "control" in networks[name]} == {
        *("superlink", "superexec", "proxy", "operator")
    }
    for node in NODES:
        assert networks[node] == {"fleet"}
    assert {name for name in networks if "fleet" in networks[name]} == {"proxy", *NODES}
    assert COMPOSE["networks"]["control"]["internal"] is True
    assert COMPOSE["networks"]["fleet"]["internal"] is True
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]


def test_the_three_sites_differ_in_their_names_only() -> None:
    for part in ("trainer", "node"):
        plain = [json.dumps(SERVICES[f"{site}-{part}"]).replace(site, "SITE") for site in SITES]
        assert len(set(plain)) == 1
    named = {source for name in SERVICES for source, _ in mounts_of(name).values()}
    assert {source for source in named if source[0] not in "./$"} == set(COMPOSE["volumes"])


def test_what_init_writes_for_docker_is_what_compose_mounts() -> None:
    for site in SITES:
        trainer, node = mounts_of(f"{site}-trainer"), mounts_of(f"{site}-node")
        assert str(Path(TWO_CONTAINERS["trainer"]).parent) in trainer.keys() & node.keys()
        assert trainer[TWO_CONTAINERS["state"]] == (f"{site}-trainer", False)
        assert node[TWO_CONTAINERS["node_state"]] == (f"{site}-node", False)
        probe = SERVICES[f"{site}-node"]["healthcheck"]["test"][-1]
        assert f"http://{TWO_CONTAINERS['health']}/healthz" in probe
        words = SERVICES[f"{site}-trainer"]["healthcheck"]["test"]
        assert words[1:4] + words[5:] == ["client", "status", "--config", "--part", "trainer"]
        assert words[4] == SERVICES[f"{site}-trainer"]["command"][-1]  # which says the socket
    made = [line for line in stages()["site"] if "groupadd" in line]
    assert f"--gid 10000 {TWO_CONTAINERS['socket_group']}" in made[0]


def test_images_end_as_another_user_and_bases_have_versions() -> None:
    for name in ("site", "coordinator", "proxy"):
        instructions = stages()[name]
        assert instructions[-2 if name != "proxy" else -3].startswith("USER 1")
        assert re.search(r"FROM \S+:\d+\.\d+\S* AS", instructions[0])
    assert "FLWR_TELEMETRY_ENABLED=0" in " ".join(stages()["base"])


def ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a file out: the last pattern that fits decides."""
    is_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        # Docker's * stops at a slash, its ** does not; "*" alone is everything below it too.
        regex = translate(pattern.replace("**/", "\0")).replace(".*", "[^/]*")
        regex = regex.replace("\0", "(?:.*/)?").replace("\\\0", "(?:.*/)?")
        fits = re.match(regex, path) is not None
        if fits or (pattern == "*" and path):
            is_out = not line.startswith("!")
    return is_out


def test_the_build_context_holds_code_and_nothing_private() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    sent = {path for path in listed if not ignored(path)}
    assert {path for path in sent if path.endswith(".py")} == {
        path
        for path in listed
        if path.startswith(("client/", "federation/")) and path.endswith(".py")
    }
    others = {path for path in sent if not path.endswith(".py")}
    assert others == {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
        *("examples/deployment/nginx.conf", "docker/nginx.sed", "docker/flower.toml"),
    }


@pytest.mark.parametrize(
    "path",
    [
        *("records.jsonl", "client/records.jsonl", "docker/sites/clinic/records.jsonl"),
        *("docker/sites/clinic/node", "docker/coordinator/superlink.key", "demo/models/base/x"),
        *("client/site.toml", ".git/config", ".venv/bin/python", "federation/secret.pem"),
    ],
)
def test_records_and_keys_never_get_into_the_build_context(path: str) -> None:
    assert ignored(path)


def test_the_dockerfile_copies_what_is_there() -> None:
    for name, instructions in stages().items():
        for line in instructions:
            if line.startswith("COPY ") and "--from" not in line:
                words = [word for word in line.split()[1:-1] if not word.startswith("--")]
                for source in words:
                    inside = [source] if (ROOT / source).is_file() else [f"{source}/cli.py"]
                    assert (ROOT / inside[0]).is_file(), (name, source)
                    assert not ignored(inside[0])


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="no nginx")
def test_nothing_of_the_proxys_template_is_left_open() -> None:
    text = subprocess.run(
        ["sed", "-f", "docker/nginx.sed", "examples/deployment/nginx.conf"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert "@" not in code
    assert "listen 8443 ssl;" in code
    assert "server superlink:8000;" in code


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="no nginx")
@pytest.mark.parametrize("mode", ["daemon on; master_process on;", "daemon off;"])
def test_nginx_takes_the_template_as_debians_unit_and_as_a_container_start_it(
    tmp_path: Path, mode: str
) -> None:
    """The first is the word of Debian's nginx.service; the second stands in the Dockerfile."""
    (entry,) = [line for line in stages()["proxy"] if line.startswith("ENTRYPOINT")]
    assert json.loads(entry.removeprefix("ENTRYPOINT "))[-2:] == ["-g", "daemon off;"]
    make_authority(tmp_path)
    issue_server_certificate(tmp_path, "proxy", ["localhost"])
    (tmp_path / "nginx").mkdir()
    text = (ROOT / "examples" / "deployment" / "nginx.conf").read_text()
    words = {"home": tmp_path, "logs": tmp_path, "certificates": tmp_path}
    words |= {"superlink": "127.0.0.1:1", "listen": f"unix:{tmp_path}/s"}
    for word, value in words.items():
        text = text.replace(f"@{word}@", str(value))
    (tmp_path / "nginx.conf").write_text(text)
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    assert nginx is not None
    command = [nginx, "-t", "-q", "-e", "stderr", "-g", mode, "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What the commands do


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """docker/ as README.md says it is prepared: certificates, three sites; nothing runs yet."""
    if not can_contain() or shutil.which("openssl") is None:
        pytest.skip("needs root, namespaces, setpriv and openssl")
    work = tmp_path_factory.mktemp("docker")
    model = write_tiny_model(work / "base")
    for path in model.iterdir():
        path.chmod(0o644)  # of the trainers' and the coordinator's users
    home = work / "docker"
    shutil.copytree(DOCKER, home)
    words = work / "bin"
    words.mkdir()
    shim = words / "docker"
    shim.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.docker.containers "$@"\n'
    )
    shim.chmod(0o755)
    variables = os.environ | {"PATH": f"{words}:{os.environ['PATH']}"}
    variables |= {"FEDGE_BASE_MODEL": model.name}
    run = ["sh", home / "certificates.sh", "fleet.example"]
    subprocess.run(run, check=True, capture_output=True, cwd=ROOT)
    for site in SITES:
        write_records(work / f"{site}.jsonl", 12, topic=site)
        run = ["sh", "docker/new_site.sh", site, f"{site}.jsonl"]
        done = subprocess.run(
            run, env=variables, capture_output=True, text=True, check=False, cwd=work
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with Engine(home, model, work / "scratch") as made:
        yield made


@pytest.mark.slow
def test_the_scripts_give_each_key_to_its_user_and_overwrite_nothing(engine: Engine) -> None:
    owners = {
        "coordinator/superlink.key": 10003,
        "coordinator/superexec.secret": 10003,
        "coordinator/proxy.key": 101,
        "coordinator/ca.key": 0,
        "sites/clinic/node": 10002,
        "sites/clinic/identity": 10001,
        "sites/clinic/records.jsonl": 10001,
    }
    for name, uid in owners.items():
        found = (engine.home / name).stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (uid, 0o600), name
    settings = load_site(engine.home / "sites" / "bank" / "site.toml")
    assert (settings.name, settings.superlink) == ("bank", "proxy:8443")
    again = subprocess.run(
        ["sh", engine.home / "certificates.sh"], capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert "exists" in again.stderr.lower()


POLICY = policy_text(
    traffic__uplink=["float32"],
    aggregation__kinds=["products"],
    aggregation__min_cohort=1,
    **UNPROTECTED,
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="no nginx")
def test_the_containers_commands_carry_a_round_from_a_site_to_the_coordinator(
    engine: Engine,
) -> None:
    """Everything of one site and the coordinator, each as its user; the trainer has no network."""
    (engine.home / "sites" / "clinic" / "policy.toml").write_text(POLICY)
    engine.start("superlink")
    engine.wait_until(lambda: engine.is_healthy("superlink"), "the SuperLink's health")
    engine.start("superexec")
    engine.start("proxy")
    registered = engine.call(
        *("operator", "flwr", "supernode", "register", "/etc/fedge/clinic.pub", "coordinator"),
        *("--name", "clinic", "--format", "json"),
    )
    assert json.loads(registered.stdout)["success"], registered.stdout + registered.stderr
    engine.start("clinic-trainer")
    engine.wait_until(lambda: engine.is_healthy("clinic-trainer"), "the trainer's health")
    engine.start("clinic-node")
    engine.wait_until(lambda: engine.is_healthy("clinic-node"), "the node's health")
    for name in ("superexec", "proxy"):
        if name == "superexec" or shutil.which("nc"):
            engine.wait_until(lambda each=name: engine.is_healthy(each), f"{name}'s health")
    check_doctors(engine)
    check_walls(engine)
    out = "/var/lib/fedge/runs/first"
    config = (
        f'base_model="/srv/base-model" out="{out}" num_sites=1 quorum=1 num_rounds=1 '
        "adapter.rank=4 training.num_steps=1 training.max_tokens=64 training.batch_size=2 "
        'training.dtype="float32"'
    )
    words = ("flwr", "run", "/opt/app", "coordinator", "-c", config, "--format", "json")
    started = engine.call("operator", *words)
    assert json.loads(started.stdout)["success"], started.stdout + started.stderr

    def summary() -> dict[str, Any]:
        done = engine.call("operator", "federation", "status", out, "--json")
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {"state": "?"}

    engine.wait_until(lambda: summary()["state"] in ("finished", "failed"), "the run's end", 300)
    found = summary()
    assert found["state"] == "finished", found
    assert found["failures"] == []
    shown = engine.execute("clinic-trainer", "client", "ledger", "verify", "/etc/fedge/site.toml")
    assert "1 of them releases" in shown.stdout, shown.stdout + shown.stderr


def check_doctors(engine: Engine) -> None:
    """Each container's own doctor has nothing to change."""
    for part in ("trainer", "node"):
        words = ("client", "doctor", "--config", "/etc/fedge/site.toml", "--part", part, "--json")
        done = engine.execute(f"clinic-{part}", *words)
        checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
        assert done.returncode == 0, checks
        if part == "node":
            assert checks["superlink"]["level"] == checks["clock"]["level"] == "ok", checks
            assert "connected" in checks["daemon"]["found"]
        assert checks["socket"]["level"] == "ok", checks


def check_walls(engine: Engine) -> None:
    """What each may not reach is not there for it."""
    node, trainer = "clinic-node", "clinic-trainer"
    for place in (
        "/srv/records.jsonl",
        "/var/lib/fedge-trainer",
        "/etc/fedge/policy.toml",
        "/etc/fedge/identity",
    ):
        assert engine.execute(node, "ls", f"{place}/.").returncode != 0, place
        assert engine.execute(node, "cat", place).returncode != 0, place
    assert engine.execute(trainer, "cat", "/etc/fedge/node").returncode != 0
    connect = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 3)"
    assert engine.execute(node, "python", "-c", connect, "8443").returncode == 0
    assert engine.execute(trainer, "python", "-c", connect, "8443").returncode != 0
    interfaces = engine.execute(
        trainer, "python", "-c", "import socket; print(socket.if_nameindex())"
    )
    assert interfaces.stdout.strip() == "[(1, 'lo')]"
    for name in (node, trainer):
        assert engine.execute(name, "touch", "/etc/fedge/site.toml").returncode != 0
        assert engine.execute(name, "touch", "/opt/new").returncode != 0
        said = engine.execute(name, "cat", "/proc/self/status").stdout
        assert re.search(r"^CapEff:\s+0+$", said, re.MULTILINE)
        assert re.search(r"^CapBnd:\s+0+$", said, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", said, re.MULTILINE)
