"""Kill the writer of a ledger at every step; prints one JSON object.

    python -m tests.client.ledger_kill_matrix DIRECTORY

For n = 1, 2, 3, …: in a child, open the ledger, append three releases of two data sets and mark
each as sent; the child ends without any clean-up at its n-th step, where a step is a file opened
for writing, renamed or removed by Python, or a few instructions of SQLite's own machine. Then: the
ledger verifies; every release that was marked as sent has its row; the same releases appended by
the next process give the rows of the undisturbed run, each once. The last n is the one at which a
child gets to its end.

A kill inside SQLite's write of a commit is the other half: the log (-wal) as it was after a commit,
cut at every sector, beside the file and the head before it.
"""

import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

from client import chain
from client.chain import head_path
from client.ledger import read_ledger
from tests.client.ledgers import data_set, entry, open_ledger

ENTRIES = [
    entry(1),
    entry(2, data_set=data_set(*range(5, 15))),
    entry(3, data_set=data_set(*range(5, 15))),
]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.chmod"}


class SqliteStep:
    """What SQLite calls every few instructions of its machine."""

    call = staticmethod(lambda: None)


def connect(path: Path, *, is_writer: bool) -> sqlite3.Connection:
    connection = open_connection(path, is_writer=is_writer)
    connection.set_progress_handler(SqliteStep.call, 5)
    connection.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing written
    return connection


def append_all(directory: Path) -> None:
    with open_ledger(directory / "ledger.db") as ledger:
        for number, each in enumerate(ENTRIES):
            ledger.append(each)
            (directory / f"sent-{number}").touch()


def run_child(directory: Path, last: int) -> None:
    """Append in this forked process and end at the ``last``-th step."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == last:
            os._exit(9)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and str(directory) in str(arguments[0]):
            step()

    SqliteStep.call = step
    sys.addaudithook(hook)
    try:
        append_all(directory)
    except BaseException:  # a traceback: the parent counts it as a failed case
        os._exit(70)
    os._exit(0)


def check(directory: Path, expected: list[object], place: str) -> None:
    path = directory / "ledger.db"
    there = read_ledger(path).rows if path.exists() else []
    assert there == expected[: len(there)], place
    num_sent = len(list(directory.glob("sent-*")))
    assert num_sent <= len(there), f"{place}: {num_sent} left, {len(there)} rows"
    append_all(directory)
    assert read_ledger(path).rows == expected, place


def kill_at_every_step(work: Path, expected: list[object]) -> int:
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        directory = work / "killed"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        child = os.fork()
        if child == 0:
            run_child(directory, len(codes) + 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert codes[-1] in {0, 9}, f"step {len(codes)}: exit code {codes[-1]}"
        check(directory, expected, f"step {len(codes)}")
    return len(codes) - 1


def cut_the_log_everywhere(work: Path, expected: list[object]) -> int:
    directory, copy = work / "logged", work / "cut"
    directory.mkdir()
    path = directory / "ledger.db"
    log = path.with_name("ledger.db-wal")
    cuts = 0
    with open_ledger(path) as ledger:
        for number, each in enumerate(ENTRIES):
            before = log.stat().st_size if log.exists() else 0
            head = head_path(path).read_bytes()
            ledger.append(each)
            content = log.read_bytes()
            for length in range(before, len(content) + 1, 512):
                shutil.rmtree(copy, ignore_errors=True)
                copy.mkdir()
                shutil.copy(path, copy)
                (copy / log.name).write_bytes(content[:length])
                head_path(copy / path.name).write_bytes(head)
                for sent in range(number):
                    (copy / f"sent-{sent}").touch()
                check(copy, expected, f"release {number + 1}, log cut at {length}")
                cuts += 1
    return cuts


def main(work: Path) -> None:
    (work / "whole").mkdir(parents=True)
    append_all(work / "whole")
    expected: list[object] = list(read_ledger(work / "whole" / "ledger.db").rows)
    assert len(expected) == len(ENTRIES)
    kills = kill_at_every_step(work, expected)
    cuts = cut_the_log_everywhere(work, expected)
    print(json.dumps({"kills": kills, "cuts": cuts, "rows": len(expected)}))


if __name__ == "__main__":
    os.fsync = lambda _: None
    open_connection, chain.connect = chain.connect, connect
    main(Path(sys.argv[1]))
