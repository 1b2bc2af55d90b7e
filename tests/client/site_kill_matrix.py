"""Kill a site at every single change that it makes to the file system while it answers rounds.

Runs as a process of its own, because an audit hook cannot be taken away again. Each case forks;
the child counts its own file system changes (the audit events of CPython) and dies at the n-th.
The site is then asked the same round again and must give the bytes of an undisturbed run, and the
round after it too; asked the next round at once, it goes on from the state before the kill or from
the one after it.

    python site_kill_matrix.py WORK_DIR
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from client.feedback import encode_with_feedback
from client.site_state import SiteState
from federation.adapter import Adapter, LowRank
from federation.wire import open_update, reference_of, write_message

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}
ROUNDS, RUN = 4, "beef"
TRAINS = {1: "B", 2: "A", 3: "AB", 4: "AB"}


def served(server_round: int) -> Adapter:
    generator = torch.Generator().manual_seed(server_round)
    factors = LowRank(
        torch.randn(5, 3, generator=generator), torch.randn(3, 70, generator=generator)
    )
    return Adapter(3, 6.0, {"layers.0.q_proj": factors})


def prepare(messages: Path) -> None:
    """Write what the server sends: a whole adapter, then the changes of it."""
    messages.mkdir()
    held = None
    for number in range(1, ROUNDS + 1):
        path = messages / str(number)
        dtype = "float32" if held is None else "int8"
        write_message(path, served(number), dtype=dtype, base_model="m", reference=held)
        held = open_update(path, reference=held)
        write_message(messages / f"{number}-whole", held, dtype="float32", base_model="m")


def answer(messages: Path, device: Path, server_round: int, kind: str = "") -> bytes:
    """Answer a round as client.round does, with a step in place of the training."""
    state = SiteState(device, RUN)
    path = messages / f"{server_round}{kind}"
    reference = reference_of(path)
    held = state.open_adapter(reference) if reference else None
    received = open_update(path, reference=held)
    adapter = received.adapter()
    trained = Adapter(
        3, 6.0, {n: LowRank(f.b_OR * 1.01, f.a_RI * 0.99) for n, f in adapter.modules.items()}
    )
    residual = state.residual(server_round, received, trained)
    message, residual = encode_with_feedback(
        trained,
        residual,
        received,
        dtype="int4",
        factors=TRAINS[server_round],
    )
    state.keep(server_round, received, residual=residual, is_reference=True)
    return message


def run_child(messages: Path, device: Path, server_round: int, last: int) -> None:
    """Let the site make ``last`` - 1 changes in its own directory; at the next one it dies."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in CHANGES) or str(device) not in str(arguments[0]):
            return
        count += 1
        if count == last:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        answer(messages, device, server_round)
    except BaseException:  # a traceback: the parent counts it as a failed case
        os._exit(70)
    os._exit(0)


def files(device: Path) -> list[str]:
    return sorted(path.name for path in (device / f"run-{RUN}").iterdir())


def main(work: Path) -> None:
    messages, device = work / "messages", work / "device"
    prepare(messages)
    (device / "run-dead").mkdir(parents=True)
    expected, skipped, left = {}, {}, {}
    for server_round in range(1, ROUNDS + 1):
        shutil.copytree(device, work / f"before-{server_round}")
        if server_round < ROUNDS:
            shutil.copytree(device, work / "skipped")
            skipped[server_round] = answer(messages, work / "skipped", server_round + 1, "-whole")
            shutil.rmtree(work / "skipped")
        expected[server_round] = answer(messages, device, server_round)
        left[server_round] = files(device)
    num_kills = 0
    for server_round in range(1, ROUNDS + 1):
        codes = []
        while not codes or codes[-1] != 0:
            shutil.rmtree(device)
            shutil.copytree(work / f"before-{server_round}", device)
            child = os.fork()
            if child == 0:
                run_child(messages, device, server_round, len(codes) + 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            place = f"round {server_round}, change {len(codes)}"
            assert codes[-1] in {0, 9}, f"{place}: exit code {codes[-1]}"
            if server_round < ROUNDS:  # the server may go on without this site
                shutil.copytree(device, work / "skipped")
                sent = answer(messages, work / "skipped", server_round + 1, "-whole")
                assert sent in {skipped[server_round], expected[server_round + 1]}, place
                shutil.rmtree(work / "skipped")
            for following in range(server_round, min(server_round + 1, ROUNDS) + 1):
                assert answer(messages, device, following) == expected[following], place
                assert files(device) == left[following], place
        num_kills += len(codes) - 1
    print(json.dumps({"kills": num_kills, "files": left[ROUNDS]}))


if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process loses nothing that it had written
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
