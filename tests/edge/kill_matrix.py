"""Kill the agent, or fail the disk under it, at every single change it makes to the file system.

Runs as a process of its own, because an audit hook cannot be taken away again and a fork wants a
process without threads. Each case forks; the child counts its own file system changes (the audit
events of CPython) and dies, or gets ENOSPC, at the n-th; the parent then looks at what is left.

    python kill_matrix.py PREPARED_DIR WORK_DIR kill|enospc
"""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

from edge.agent import Agent, ProbeResult
from edge.errors import EdgeError
from edge.keys import read_public_key
from edge.registry import Layout
from edge.release import Release
from edge.verification import verify

CHANGES = {
    *("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod"),
    *("shutil.rmtree", "os.truncate"),
}


def generates(build: Path, _: Release) -> ProbeResult:
    return ProbeResult(len((build / "model.gguf").read_bytes()[:5]), 1.0, 1.0)


def is_change(event: str, arguments: tuple[object, ...]) -> bool:
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def run_child(agent: Agent, action: str, last: int, fault: str) -> None:
    """Let the agent make ``last`` - 1 changes; the next one is the fault."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if not is_change(event, arguments):
            return
        count += 1
        if count == last and fault == "kill":
            os._exit(9)
        if count >= last:
            raise OSError(errno.ENOSPC, "no space left on device")

    sys.addaudithook(hook)
    try:
        getattr(agent, action)()
    except EdgeError:
        os._exit(1)
    except BaseException:  # a traceback: the parent counts it as a failed case
        os._exit(70)
    os._exit(0)


def running(device: Path) -> str:
    """Return the digest of the release that `current` names, after hashing all of it."""
    build = (device / "current").resolve(strict=True)
    assert verify(build).problems == [], "current is not whole"
    return build.parent.name


def main(prepared: Path, work: Path, fault: str) -> None:
    results: dict[str, int] = {}
    for action in ("check", "roll_back"):
        before, after = json.loads((prepared / "expected.json").read_text())[action]
        codes = []
        while not codes or codes[-1] != 0:
            device = work / "device"
            shutil.rmtree(device, ignore_errors=True)
            shutil.copytree(prepared / f"{action}_device", device, symlinks=True)
            agent = Agent(
                device_dir=device,
                source=Layout(prepared / f"{action}_registry"),
                tag="stable",
                channel="stable",
                public_keys=(read_public_key(prepared / "keys" / "public.pem"),),
                probe=generates,
            )
            child = os.fork()
            if child == 0:
                run_child(agent, action, len(codes) + 1, fault)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            assert codes[-1] in {0, 1, 9}, f"{action} {len(codes)}: exit code {codes[-1]}"
            assert running(device) in {before, after}, f"{action} {len(codes)}: another release"
            if action == "check":
                agent.check()
                assert running(device) == after, f"{action} {len(codes)}: did not finish"
            else:
                held = agent.check()
                finished = json.loads((device / "state.json").read_text())["bad"] is not None
                assert held.action == ("held" if finished else "kept"), f"{action} {len(codes)}"
                assert running(device) == (after if finished else before)
            left = sorted(path.name for path in (device / "releases").iterdir())
            assert len(left) <= 2, f"{action} {len(codes)}: {left}"
            assert not any(name.startswith(".") for name in left), f"{action} {len(codes)}: {left}"
        results[action] = len(codes) - 1
    print(json.dumps(results))


if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process loses nothing that it had written
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
