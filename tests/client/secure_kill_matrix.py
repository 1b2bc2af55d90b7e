"""Kill a trainer at the changes that it makes to the file system in a private secure sum.

As in trainer_kill_matrix.py everything is real and the noise comes from keys of the test. Three
sites begin a sum; one of them dies at its n-th change in the stage that trains and in the one that
sends its masked vector. At that moment its keys must be on its disk only if its ledger holds the
training, and its vector only then too. The stage is then asked again, twice: the update is that of
an undisturbed site, the answers are the same, and each thing is in the ledger once.

    python secure_kill_matrix.py WORK_DIR EVERY

kills at every change with EVERY = 1, at every fourth with 4.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.fingerprint import fingerprint, read_secret
from client.gate import SiteGate
from client.ledger import LEDGER, Ledger, read_ledger
from client.ledger_audit import check_epsilons
from client.round import site_records
from client.site import Site
from client.trainer import Trainer
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.header import num_numbers
from federation.secure_messages import Stage, Terms, subject_of
from federation.secure_sum import SecureSum
from federation.wire import open_update, write_message
from tests.client.policy_example import changed
from tests.client.seeded_site import key_of
from tests.client.trainer_kill_matrix import CHANGES, HEAD, LIMITS, NUM_RECORDS, RUN, say_nothing
from tests.conftest import write_records, write_tiny_model
from tests.policies import policy_of

NAMES = ("a", "b", "c")
TERMS: dict[str, Any] = {"cohort": 3, "threshold": 2, "clip": 4e-3, "bits": 16}
SECURE = changed(HEAD, uplink="float32", downlink="float32", trains="B", aggregation="alternating")
SECURE |= {"secure_sum": TERMS, "cohort": 3, "server_round": 1, "attempt": 1}
SECURE_LIMITS: dict[str, Any] = {
    "traffic__uplink": ["float32"],
    "aggregation": {"kinds": ["alternating"], "min_cohort": 2, "cohort": ["any"]},
}
POLICY = policy_of(**LIMITS | SECURE_LIMITS)


def answer(work: Path, name: str, stage: Stage, message: Path) -> bytes:
    """Ask a trainer that begins its life with this question; return what leaves."""
    state = work / name
    site = Site(work / "base", work / f"{name}.jsonl", name, state, None)
    scratch = Path(tempfile.mkdtemp(dir=work))
    shutil.copy(message, scratch / "message")
    data_set = fingerprint(site_records(site.data), read_secret(state))
    identity = Ed25519PrivateKey.from_private_bytes(name.encode() * 32)
    ledger = Ledger.open(state / LEDGER)
    with SiteGate(POLICY, ledger, data_set, say=say_nothing, identity=identity) as gate:
        trainer = Trainer(site, gate, say_nothing, key_of=key_of(name))
        head = json.dumps(SECURE | {"stage": stage}).encode()
        reply = trainer.answer(head, scratch / "message", scratch)
        assert reply.update is not None, reply.head
        return reply.update.read_bytes()


def run_child(work: Path, stage: Stage, message: Path, last: int) -> None:
    """Let site a make ``last`` - 1 changes in its own directory; at the next one it dies."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        is_writing = event == "open" and isinstance(arguments[2], int)
        is_writing = is_writing and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not (is_writing or event in CHANGES) or str(work / "a") not in str(arguments[0]):
            return
        count += 1
        if count == last:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        answer(work, "a", stage, message)
    except BaseException:  # a traceback: the parent counts it as a failed case
        os._exit(70)
    os._exit(0)


def rows_of(work: Path) -> list[tuple[str, int]]:
    path = work / "a" / LEDGER
    contents = read_ledger(path)  # which checks the chain
    check_epsilons(path, contents)
    return [(row.stage, row.steps) for row in contents.rows]


def kill_everywhere(work: Path, stage: Stage, message: Path, every: int) -> dict[str, int]:
    """Return how many kills there were, and after how many of them the stage was charged."""
    secure, update = work / "a" / "secure" / f"run-{RUN}", work / "a" / "answers" / RUN / "1.update"
    before = [("trained", 2), ("secure", 0)][: list(Stage).index(stage) // 2]
    charged = [("trained", 2), ("secure", 0)][: len(before) + 1]
    codes: list[int] = []
    num_charged, expected = 0, (work / "expected").read_bytes()
    while not codes or codes[-1] != 0:
        shutil.rmtree(work / "a")
        shutil.copytree(work / f"before-{stage}", work / "a")
        child = os.fork()
        if child == 0:
            run_child(work, stage, message, 1 + every * len(codes))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        place = f"stage {stage}, case {len(codes)}"
        assert codes[-1] in {0, 9}, f"{place}: exit code {codes[-1]}"
        rows = rows_of(work)
        assert rows in (before, charged), place
        # What the next stages reveal of the training is there only once the training is paid for.
        assert rows or not (secure / "attempt.json").exists(), place
        num_charged += rows == charged
        first, second = (answer(work, "a", stage, message) for _ in range(2))
        assert first == second, place
        assert rows_of(work) == charged, place
        assert update.read_bytes() == expected, place
    return {"kills": len(codes) - 1, "charged": num_charged}


def main(work: Path, every: int) -> None:
    write_tiny_model(work / "base", num_layers=1, hidden=32)
    adapter = initial_adapter(work / "base", rank=2, alpha=4.0, targets="attention", seed=0)
    message = work / "adapter"
    write_message(message, adapter, dtype="float32", base_model=model_digest(work / "base"))
    served = open_update(message)
    secure = SecureSum(
        Terms(
            run=RUN,
            server_round=1,
            attempt=1,
            subject=subject_of(served.sha256_of_content, "B", SECURE["training"]),
            num_coordinates=num_numbers(served.shapes(), served.rank, "B"),
            **TERMS,
        ),
        NAMES,
    )
    for index, name in enumerate(NAMES):
        write_records(work / f"{name}.jsonl", NUM_RECORDS, topic=name, start=100 * index)
        (work / name).mkdir()
        Ledger.open(work / name / LEDGER).close()  # as at a trainer's start
        read_secret(work / name)
    while secure.stage is not None:
        if secure.stage != Stage.ADVERTISE:
            message = work / f"message-{secure.stage}"
            message.write_bytes(secure.request())
        shutil.copytree(work / "a", work / f"before-{secure.stage}")
        for name in NAMES:
            secure.take(name, answer(work, name, secure.stage, message))
        secure.close()
    shutil.copy(work / "a" / "answers" / RUN / "1.update", work / "expected")
    messages = {Stage.ADVERTISE: work / "adapter", Stage.MASK: work / f"message-{Stage.MASK}"}
    report = {stage: kill_everywhere(work, stage, at, every) for stage, at in messages.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process loses nothing that it had written
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
