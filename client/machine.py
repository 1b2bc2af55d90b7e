"""What a machine is to a site: versions, user, memory, GPU, environment. Facts, then checks.

The checks are pure; what reads the machine stands apart and takes the places it reads from.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.check import Check, gib, ok, skipped

PYTHONS = ((3, 11), (3, 13))
"""Oldest and newest."""
TESTED = {
    "accelerate": "1.15.0",
    "cryptography": "50.0.2",
    "flwr": "1.41.0",
    "grpcio": "1.85.1",
    "httpx": "0.28.1",
    "numpy": "2.4.6",
    "opacus": "1.6.0",
    "peft": "0.21.2",
    "protobuf": "6.33.6",
    "pydantic": "2.14.3",
    "rich": "14.3.4",
    "safetensors": "0.8.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "typer": "0.20.1",
}
"""What a site runs on, as constraints.txt pins it; a test holds the two together."""
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Without them Flower's own programs report to their maker, and install what a run names."""
INSTALL = "pip install -c constraints.txt -e '.[client]'"


@dataclass(frozen=True)
class Gpus:
    """What torch sees of NVIDIA's devices."""

    driver: str = ""
    """Version; "" = no driver."""
    cuda: str = ""
    """Version that torch was built for; "" = a build without CUDA."""
    names: tuple[str, ...] = ()
    num_bytes: tuple[int, ...] = ()
    error: str = ""


def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package, None where it is missing. Nothing is imported."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def find_gpus(driver: Path = Path("/proc/driver/nvidia/version")) -> Gpus:
    """Return the GPUs; torch is imported only where there is a driver."""
    try:
        words = driver.read_text(encoding="utf-8").split()
    except OSError:
        return Gpus()
    version = next((word for word in words if word[0].isdigit() and "." in word), "unknown")
    try:
        import torch

        devices = [
            torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
        ]
    except (ImportError, RuntimeError) as error:
        return Gpus(version, error=f"{type(error).__name__}: {error}")
    return Gpus(
        version,
        torch.version.cuda or "",
        tuple(str(device.name) for device in devices),
        tuple(int(device.total_memory) for device in devices),
    )


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes that a new process may have, the limit of a container included; or None."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no limit is "max"
        return available
    return min(available, max(0, limit - used))


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Say whether this Python is one that the project runs on."""
    found = f"Python {version[0]}.{version[1]}"
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return ok("python", found)
    return Check("python", "fail", found, "make the environment with Python 3.11, 3.12 or 3.13")


def check_packages(found: Mapping[str, str | None]) -> Check:
    """Compare versions with those that were tested together.

    Args:
        found: Of each package of ``TESTED``; None = missing.
    """
    if missing := sorted(name for name, version in found.items() if version is None):
        return Check("packages", "fail", f"missing: {', '.join(missing)}", INSTALL)
    others = [
        f"{name} {version} (tested: {TESTED[name]})"
        for name, version in found.items()
        if version is not None and version.partition("+")[0] != TESTED[name]
    ]
    if others:
        return Check("packages", "warn", f"not the tested set: {', '.join(others)}", INSTALL)
    return ok("packages", f"{len(found)} as tested, flwr {found['flwr']}, torch {found['torch']}")


def check_user(uid: int) -> Check:
    """Say whether the site runs as root."""
    if uid:
        return ok("user", f"user id {uid}")
    fix = "give daemon and trainer users of their own: client init --systemd, or docker/"
    return Check("user", "warn", "root: a mistake in this process has the whole machine", fix)


def check_environment(variables: Mapping[str, str]) -> Check:
    """Say whether Flower's own programs would call home from here."""
    wrong = [f"{key}={value}" for key, value in SWITCHES.items() if variables.get(key) != value]
    if not wrong:
        return ok("environment", "telemetry, update check and installation of a run's wishes: off")
    return Check(
        "environment",
        "warn",
        "the daemon switches them off for what it starts, not for `flwr` typed here",
        f"export {' '.join(wrong)}",
    )


def check_gpu(gpus: Gpus, weights: int | None) -> Check:
    """Say what GPU a site trains on, and whether the base model's weights fit into it.

    Args:
        gpus: From ``find_gpus``.
        weights: Bytes of the weights in bfloat16; None = unknown.
    """
    if not gpus.driver:
        return ok("gpu", "none: trains on the processor")
    if gpus.error or not gpus.names:
        found = gpus.error or f"driver {gpus.driver}, and torch sees no device"
        fix = "let the trainer's user read /dev/nvidia*; update the driver"
        if not gpus.error and not gpus.cuda:
            fix = "this torch is a build without CUDA: install the one from PyPI"
        return Check("gpu", "fail", found, fix)
    # The trainer uses torch's first device.
    found = f"{gpus.names[0]}, {gib(gpus.num_bytes[0])}, driver {gpus.driver}, CUDA {gpus.cuda}"
    return _holds("gpu", found, gpus.num_bytes[0], weights)


def check_memory(available: int | None, weights: int | None) -> Check:
    """Say whether the base model's weights fit into the memory that is free."""
    if available is None:
        return skipped("memory", "this system does not say how much is free")
    return _holds("memory", f"{gib(available)} free", available, weights)


def _holds(name: str, found: str, num_bytes: int, weights: int | None) -> Check:
    """Compare memory with weights: once is the least, twice is float32, or room to train."""
    if weights is None:
        return ok(name, found)
    found = f"{found}; the weights are {gib(weights)} in bfloat16"
    if num_bytes < weights:
        return Check(name, "fail", found, "free memory, or agree on a smaller base model")
    if num_bytes < 2 * weights:
        fix = "expect no float32 run to fit, nor long records: set max_tokens low in the policy"
        return Check(name, "warn", found, fix)
    return ok(name, found)
