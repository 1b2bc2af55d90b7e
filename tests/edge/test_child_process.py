import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARK = (
    "import sys; from pathlib import Path; from edge.benchmark import run_benchmark\n"
    "run_benchmark(Path(sys.argv[1]) / 'gguf-q4_k', 40, 8, 1_000_000, 1)"
)
BUILDER = (
    "import sys; from pathlib import Path; from edge.onnx_model import build_onnx\n"
    "build_onnx(Path(sys.argv[2]), 'fp32', Path(sys.argv[3]))"
)


def first_child(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
    raise AssertionError("it started no process")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
@pytest.mark.parametrize("code", [BENCHMARK, BUILDER], ids=["benchmark", "builder"])
def test_a_killed_parent_takes_its_child_along(
    code: str, builds: Path, llama_model: Path, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", code, builds, llama_model, tmp_path]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(arguments, env=environment) as parent:
        child = first_child(parent)
        watched = os.pidfd_open(child)
        parent.kill()
    try:
        ended, _, _ = select.select([watched], [], [], 5)
        assert ended
    finally:
        if not select.select([watched], [], [], 0)[0]:
            signal.pidfd_send_signal(watched, signal.SIGKILL)
        os.close(watched)
