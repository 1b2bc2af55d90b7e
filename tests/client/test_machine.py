"""What a machine is to a site: each check over facts, and the facts over files."""

import re
import tomllib
from pathlib import Path

import pytest

from client import machine
from client.machine import SWITCHES, TESTED, Gpus
from tests.client.checks import level

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def test_the_tested_set_is_the_one_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins | TESTED == pins
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = extras["dependencies"] + extras["optional-dependencies"]["server"]
    needs += extras["optional-dependencies"]["client"]
    names = {re.split(r"[^a-z0-9-]", need)[0] for need in needs} - {"fedge"}
    assert set(TESTED) == names


def test_this_environment_is_the_tested_one() -> None:
    assert level(machine.check_packages(machine.installed_versions(TESTED))) == "ok"
    assert level(machine.check_python()) == "ok"


def test_another_version_is_a_warning_and_a_missing_one_an_error() -> None:
    other = machine.check_packages({**TESTED, "torch": "2.12.0"})
    assert (level(other), "torch 2.12.0 (tested: 2.13.0)" in other.found) == ("warn", True)
    assert level(machine.check_packages({**TESTED, "torch": "2.13.0+cpu"})) == "ok"
    gone = machine.check_packages({**TESTED, "torch": None, "flwr": None})
    assert (level(gone), gone.found) == ("fail", "missing: flwr, torch")
    assert machine.installed_versions(["no-such-package"]) == {"no-such-package": None}
    assert level(machine.check_python((3, 10))) == level(machine.check_python((3, 14))) == "fail"


def test_root_is_a_warning() -> None:
    assert (level(machine.check_user(0)), level(machine.check_user(1000))) == ("warn", "ok")


def test_the_switches_are_named_as_they_would_be_typed() -> None:
    assert level(machine.check_environment(SWITCHES)) == "ok"
    check = machine.check_environment({**SWITCHES, "FLWR_TELEMETRY_ENABLED": "1"})
    assert (level(check), check.fix) == ("warn", "export FLWR_TELEMETRY_ENABLED=0")


def test_free_memory_is_what_a_containers_limit_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:  800 kB\n")
    assert machine.available_memory(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.available_memory(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.available_memory(meminfo, tmp_path) == 4000
    assert machine.available_memory(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [
        (8 * GIB, None, "ok"),
        (8 * GIB, 4 * GIB, "ok"),
        (7 * GIB, 4 * GIB, "warn"),
        (3 * GIB, 4 * GIB, "fail"),
        (None, 4 * GIB, "skip"),
    ],
)
def test_the_weights_have_to_fit_into_memory(
    available: int | None, weights: int | None, expected: str
) -> None:
    assert level(machine.check_memory(available, weights)) == expected


def test_a_gpu_is_named_with_its_memory_and_driver(tmp_path: Path) -> None:
    assert machine.find_gpus(tmp_path / "none") == Gpus()
    assert level(machine.check_gpu(Gpus(), None)) == "ok"
    seen = Gpus("580.1", "13.0", ("NVIDIA H100",), (80 * GIB,))
    check = machine.check_gpu(seen, 14 * GIB)
    assert level(check) == "ok"
    assert check.found.startswith("NVIDIA H100, 80.0 GiB, driver 580.1, CUDA 13.0")
    assert level(machine.check_gpu(seen, 90 * GIB)) == "fail"
    without = machine.check_gpu(Gpus("580.1"), None)
    assert (level(without), "without CUDA" in without.fix) == ("fail", True)
    assert "/dev/nvidia" in machine.check_gpu(Gpus("580.1", "13.0"), None).fix


def test_a_driver_without_a_device_is_found_as_such(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\nGCC: 12\n")
    gpus = machine.find_gpus(driver)
    if not gpus.names:  # a machine with a GPU says more
        assert (gpus.driver, level(machine.check_gpu(gpus, None))) == ("580.95.05", "fail")
