"""What a process of a site asks of Linux."""

import subprocess
import sys

import psutil
import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="these are calls of Linux")
PARENT = """
import subprocess, sys, time
from client.process import end_with_parent
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=end_with_parent
)
print(child.pid, flush=True)
time.sleep(600)
"""
GET_DUMPABLE = 3


@linux
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.communicate()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


@linux
def test_a_process_that_keeps_to_itself_can_be_read_by_root_only_and_leaves_no_core() -> None:
    code = (
        "import ctypes, os; from client.process import keep_to_itself; keep_to_itself();"
        f"print(ctypes.CDLL(None).prctl({GET_DUMPABLE}, 0, 0, 0, 0),"
        " os.stat('/proc/self/environ').st_uid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["0", "0"]
