"""A Python environment with NVFlare, made once, beside ours and never in it.

NVFlare brings a web framework, a container client and more, so it gets an environment of its own in
the user's cache (77 MB). torch and numpy are not installed again: the environment looks into ours
for what it lacks, so both sides multiply with the same kernels.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

NVFLARE = "nvflare==2.9.*"
QUANTIZER = "bitsandbytes==0.50.*"
"""NVFlare's quantiser imports it, whatever the kind. It brings no dependency but torch: ours."""


def nvflare_python(*, with_quantizer: bool = False) -> str:
    """Return the interpreter that imports NVFlare; the first call installs it.

    Args:
        with_quantizer: What NVFlare's filters that narrow tensors need is installed too.

    Raises:
        subprocess.CalledProcessError: pip could not install it; what pip said is on stderr.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "fedge" / f"nvflare-2.9-python{version}"
    python, installed = str(directory / "bin" / "python"), directory / ".installed"
    if not installed.exists():
        print(f"installing {NVFLARE} into {directory}", file=sys.stderr)
        venv.create(directory, with_pip=True, clear=True, symlinks=True)
    # Behind its own packages, so that only what NVFlare did not bring is taken from here. Written
    # each time: the environment may be used from another checkout than the one that made it.
    packages = directory / "lib" / f"python{version}" / "site-packages"
    (packages / "torch_of_fedge.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not installed.exists():
        # stdout is for the benchmark's line alone.
        subprocess.run([*pip, NVFLARE], check=True, stdout=sys.stderr)
        installed.touch()
    quantizes = directory / ".quantizes"
    if with_quantizer and not quantizes.exists():
        subprocess.run([*pip, "--no-deps", QUANTIZER], check=True, stdout=sys.stderr)
        quantizes.touch()
    return python
