"""Programs as other users of this machine, for tests that root runs.

A Python below a directory that is closed to others (root's home) is shown to them in a mount
namespace of their own; nothing of the machine is changed.
"""

import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path


def as_user(
    user: int, groups: Sequence[int], command: Sequence[str], needed: Collection[Path]
) -> list[str]:
    """Return a command that runs another as a user, who has no name and no rights of root.

    Args:
        user: Its number; the first of ``groups`` is its own.
        groups: Numbers.
        command: To run.
        needed: Directories and files that it must reach, whatever lies above them.
    """
    lines = ["set -e"]
    for closed, paths in _closed(needed).items():
        # Set aside, cover the closed directory, put back.
        for number, path in enumerate(paths):
            lines += [f"mkdir -p /mnt/{number}", f"mount --rbind '{path}' /mnt/{number}"]
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs '{closed}'")
        for number, path in enumerate(paths):
            lines += [f"mkdir -p '{path}'", f"mount --rbind /mnt/{number} '{path}'"]
    if len(lines) > 1:
        lines.insert(1, "mount -t tmpfs -o mode=700 tmpfs /mnt")
    names = ",".join(map(str, groups))
    who = f"--reuid {user} --regid {groups[0]} --groups {names} --inh-caps=-all"
    # A session of its own, as a service has: within one, anybody may send SIGCONT to anybody.
    lines.append(f'exec setsid setpriv {who} -- "$@"')
    namespace = ["unshare", "--mount", "--propagation", "private"]
    return [*namespace, "sh", "-c", "\n".join(lines), "sh", *command]


def why_not() -> str:
    """Return why no program can be started as another user here, or ""."""
    if os.geteuid() != 0:
        return "only root can start programs as other users"
    if not (shutil.which("setpriv") and shutil.which("unshare")):
        return "setpriv and unshare (util-linux) are not installed"
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        return "this container may not make mount namespaces"
    return ""


def _closed(needed: Collection[Path]) -> dict[Path, list[Path]]:
    """Return the topmost directories that others may not enter, and what is needed below each."""
    found: dict[Path, list[Path]] = {}
    for path in sorted({path.absolute() for path in needed}):
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                found.setdefault(parent, []).append(path)
                break
    return found
