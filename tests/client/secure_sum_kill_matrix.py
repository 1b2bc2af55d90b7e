"""Kill a site at every single change that it makes to the file system in a secure sum.

Runs as a process of its own, because an audit hook cannot be taken away again. Each case forks;
the child counts its own file system changes (the audit events of CPython) and dies at the n-th of
a stage, before its answer left. The site is then started anew from its disk and asked the stage
again, twice; both answers must be the same, the attempt must go on with them, and at its end the
sum must be the plain sum.

    python secure_sum_kill_matrix.py WORK_DIR
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from client.secure_sum_state import SecureSumSite
from federation.secure_messages import Stage
from tests.secure_cohort import LENGTH, Cohort

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}


def answer(directory: Path, cohort: Cohort, stage: Stage, request: bytes, seed: int) -> bytes:
    """Answer a stage as a site that was started just now."""
    shadow = cohort.sites["s0"]
    site = SecureSumSite(directory, cohort.terms.run, lambda: shadow.member)
    if stage == Stage.ADVERTISE:
        return site.advertise(cohort.terms)
    if stage == Stage.MASK:
        values = [shadow.values[: LENGTH // 2], shadow.values[LENGTH // 2 :]]
        rng = np.random.default_rng(seed)
        return site.masked_vector(request, values, 1, rng).read_bytes()
    return site.answer(stage, request)


def run_child(directory: Path, cohort: Cohort, stage: Stage, request: bytes, last: int) -> None:
    """Let the site make ``last`` - 1 changes in its own directory; at the next one it dies."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in CHANGES) or str(directory) not in str(arguments[0]):
            return
        count += 1
        if count == last:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        answer(directory, cohort, stage, request, seed=1)
    except BaseException:  # a traceback: the parent counts it as a failed case
        os._exit(70)
    os._exit(0)


def killed_at(directory: Path, stage: Stage, change: int) -> int:
    """Run one attempt in which s0 is killed once; return how the child ended."""
    cohort, code = Cohort(3, 2), 0
    while (current := cohort.server.stage) is not None:
        request = cohort.server.request()
        for name in sorted(cohort.server.waiting):
            if name != "s0":
                reply = cohort.sites[name].answer(current, request, cohort.terms)
                cohort.server.take(name, reply)
                continue
            if current == stage:
                child = os.fork()
                if child == 0:
                    run_child(directory, cohort, current, request, change)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            reply = answer(directory, cohort, current, request, seed=2)
            again = answer(directory, cohort, current, request, seed=3)
            assert reply == again, f"{stage}, change {change}: two answers in {current}"
            cohort.server.take(name, reply)
        cohort.server.close()
    # The numbers are levels, so that every rounding of them is the same.
    expected = cohort.plain_sum(cohort.sites)
    assert cohort.sum() == expected, f"{stage}, change {change}: another sum"
    names = sorted(path.name for path in (directory / f"run-{cohort.terms.run}").iterdir())
    # What a kill left half written is removed with the next attempt, or before the next vector.
    assert {"attempt.json", "masked", "revealed"} <= set(names), names
    assert len(names) <= 4, names
    return code


def main(work: Path) -> None:
    kills = {}
    for stage in Stage:
        change, code = 0, 9
        while code == 9:
            change += 1
            code = killed_at(work / f"{stage}-{change}", stage, change)
        assert code == 0, f"{stage}, change {change}: exit code {code}"
        kills[stage] = change - 1
    print(json.dumps(kills))


if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process loses nothing that it had written
    main(Path(sys.argv[1]))
