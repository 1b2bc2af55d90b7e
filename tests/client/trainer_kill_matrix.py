"""Kill a trainer at the changes that it makes to the file system in a private round.

Everything between question and answer is real: policy, ledger, training with noise, error feedback,
the kept answer. Only the noise comes from keys of the test, so that the bytes can be compared. Each
case forks; the child answers and dies at its n-th change of the site's files (the audit events of
CPython). The round is then asked again, as the node does: it gives the bytes of an undisturbed
site, the round after it too, and the ledger holds each round once.

    python trainer_kill_matrix.py WORK_DIR EVERY

kills at every change with EVERY = 1, at every fifth with 5.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from client.fingerprint import fingerprint, read_secret
from client.gate import SiteGate
from client.ledger import LEDGER, Ledger, read_ledger
from client.round import settle, site_records
from client.site import Site
from client.trainer import Trainer
from federation.accountant import PrivacyEvent
from federation.adapter import Adapter, LowRank, initial_adapter
from federation.base_model import model_digest
from federation.wire import open_update, write_message
from tests.client.seeded_site import key_of
from tests.conftest import write_records, write_tiny_model
from tests.policies import policy_of

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}
RUN, ROUNDS, NUM_RECORDS = "ab" * 16, 3, 24
EVENT = PrivacyEvent(noise_multiplier=2.0, sampling_rate=4 / NUM_RECORDS, steps=2)
HEAD: dict[str, Any] = {
    "run": RUN,
    "bundle": "",
    "uplink": "int8",
    "downlink": "int8",
    "trains": "AB",
    "aggregation": "products",
    "cohort": 2,
    "metrics": [],
    "training": {
        "num_steps": EVENT.steps,
        "batch_size": 4,
        "max_tokens": 32,
        "dtype": "float32",
        "noise_multiplier": EVENT.noise_multiplier,
    },
}
LIMITS: dict[str, Any] = {
    "runs__allowed": [RUN],
    "traffic__uplink": ["int8"],
    "aggregation": {"kinds": ["products"], "secure_sum_required": False, "min_cohort": 2},
    "privacy__max_record_clip_norm": 1.0,
    "privacy__epsilon": 1000.0,
    "privacy__delta": 1e-3,
    "privacy__one_factor_only": False,
}
POLICY = policy_of(**LIMITS)


def say_nothing(event: str, **values: Any) -> None:
    """Log nothing."""


def prepare(work: Path) -> None:
    """Write what a server sends: a whole adapter, then changes of it."""
    write_tiny_model(work / "base", num_layers=1, hidden=32)
    write_records(work / "data.jsonl", NUM_RECORDS)
    adapter = initial_adapter(work / "base", rank=2, alpha=4.0, targets="attention", seed=0)
    digest, held = model_digest(work / "base"), None
    for number in range(1, ROUNDS + 1):
        dtype = "float32" if held is None else "int8"
        path = work / f"message-{number}"
        write_message(path, adapter, dtype=dtype, base_model=digest, reference=held)
        held = open_update(path, reference=held)
        moved = {n: LowRank(f.b_OR + 0.01, f.a_RI * 1.01) for n, f in adapter.modules.items()}
        adapter = Adapter(adapter.rank, adapter.alpha, moved)


def answer(work: Path, state: Path, server_round: int) -> bytes:
    """Ask a trainer that begins its life with this question; return the update."""
    site = Site(work / "base", work / "data.jsonl", "bank", state, None)
    scratch = Path(tempfile.mkdtemp(dir=work))
    shutil.copy(work / f"message-{server_round}", scratch / "message")
    head = json.dumps(HEAD | {"server_round": server_round}).encode()
    data_set = fingerprint(site_records(site.data), read_secret(state))
    with SiteGate(POLICY, Ledger.open(state / LEDGER), data_set, say=say_nothing) as gate:
        trainer = Trainer(site, gate, say_nothing, key_of=key_of("bank"))
        reply = trainer.answer(head, scratch / "message", scratch)
        assert reply.update is not None, reply.head
        return reply.update.read_bytes()


def run_child(work: Path, state: Path, server_round: int, last: int) -> None:
    """Let the site make ``last`` - 1 changes in its own directory; at the next one it dies."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        is_writing = event == "open" and isinstance(arguments[2], int)
        is_writing = is_writing and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not (is_writing or event in CHANGES) or str(state) not in str(arguments[0]):
            return
        count += 1
        if count == last:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        answer(work, state, server_round)
    except BaseException:  # a traceback: the parent counts it as a failed case
        os._exit(70)
    os._exit(0)


def check_ledger(state: Path, server_round: int, place: str) -> None:
    rows = read_ledger(state / LEDGER).rows  # which checks the chain
    assert [row.server_round for row in rows] == list(range(1, server_round + 1)), place
    assert {row.event for row in rows} == {EVENT}, place


def main(work: Path, every: int) -> None:
    prepare(work)
    state = work / "state"
    state.mkdir()
    expected = {}
    for server_round in range(1, ROUNDS + 1):
        shutil.copytree(state, work / f"before-{server_round}")
        expected[server_round] = answer(work, state, server_round)
        settle()
    assert len({hashlib.sha256(update).digest() for update in expected.values()}) == ROUNDS
    # The second round: it begins with a residual and a change, and leaves both.
    codes: list[int] = []
    num_charged = 0
    while not codes or codes[-1] != 0:
        shutil.rmtree(state)
        shutil.copytree(work / "before-2", state)
        child = os.fork()
        if child == 0:
            run_child(work, state, 2, 1 + every * len(codes))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        place = f"case {len(codes)}"
        assert codes[-1] in {0, 9}, f"{place}: exit code {codes[-1]}"
        num_charged += len(read_ledger(state / LEDGER).rows) == 2
        for following in (2, 3):
            assert answer(work, state, following) == expected[following], place
            check_ledger(state, following, place)
    print(json.dumps({"kills": len(codes) - 1, "charged": num_charged}))


if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process loses nothing that it had written
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
