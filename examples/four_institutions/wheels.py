"""The wheels that the demo opens: fetched by pip, pinned by version and sha256, never installed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from federation.errors import FedgeError, UserError
from federation.lineage import sha256_of_file

REQUIREMENTS = Path(__file__).with_name("sources.txt")


class DownloadError(FedgeError):
    """pip could not fetch a package, or fetched another one than was pinned."""


class Wheel(NamedTuple):
    """A wheel on disk whose bytes are those that were pinned."""

    package: str
    version: str
    sha256: str
    path: Path

    @property
    def url(self) -> str:
        """The package URL (https://github.com/package-url/purl-spec) that names it anywhere."""
        return f"pkg:pypi/{self.package}@{self.version}"


class Pin(NamedTuple):
    """One line of a requirements file in pip's hash-checking mode."""

    package: str
    version: str
    sha256: str


def read_pins(requirements: str) -> list[Pin]:
    """Return the pinned packages of a requirements file."""
    pattern = r"^([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$"
    return [Pin(*found) for found in re.findall(pattern, requirements, re.MULTILINE)]


def download(folder: Path, requirements: Path = REQUIREMENTS) -> dict[str, Wheel]:
    """Return every pinned wheel, by package; ask pip only for those not in ``folder`` yet.

    Raises:
        DownloadError: No network, no such package, or its bytes are not the pinned ones.
        UserError: This Python has no pip.
    """
    pins = read_pins(requirements.read_text())
    if not all(_pinned_wheel(folder, pin) for pin in pins):
        folder.mkdir(parents=True, exist_ok=True)
        _run_pip(folder, requirements)
    wheels = {}
    for pin in pins:
        wheel = _pinned_wheel(folder, pin)
        if wheel is None:
            raise DownloadError(
                f"pip left no wheel of {pin.package}=={pin.version} with the sha256 {pin.sha256} "
                f"in {folder}: remove that folder and run again"
            )
        wheels[pin.package] = wheel
    return wheels


def _pinned_wheel(folder: Path, pin: Pin) -> Wheel | None:
    """Return the wheel of that version in ``folder``, when its bytes are the pinned ones."""
    for path in folder.glob(f"{pin.package.replace('-', '_')}-{pin.version}-*.whl"):
        if sha256_of_file(path) == pin.sha256:
            return Wheel(pin.package, pin.version, pin.sha256, path)
    return None


def _run_pip(folder: Path, requirements: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode == 0:
        return
    if "No module named pip" in finished.stderr:
        raise UserError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip` first")
    if "DO NOT MATCH THE HASHES" in finished.stderr:
        raise DownloadError(
            f"a package is not the one that {requirements.name} pins (its sha256 differs), so it "
            "was thrown away: check which package index pip is set to use"
        )
    errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "no reason given"
    raise DownloadError(
        f"pip could not fetch the packages in {requirements.name} ({reason}): "
        "check the network and pip's index settings, then run again"
    )
