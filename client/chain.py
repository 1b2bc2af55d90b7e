"""An append-only SQLite file whose rows hold each other: the paper of the ledger.

    row n:  body    one JSON object, as text, exactly as it was hashed
            hash    sha256(hash of row n-1 + body); row 0 would have 64 zeros

    PATH         rows, and data_sets: the sorted record digests of each data set that a row names
    PATH.head    {"count": n, "hash": …} of the last row, replaced in one step after each commit
    PATH.lock    held by the one process that writes

So a changed, missing or exchanged row is seen at the first row that no longer fits, with nothing
but `sqlite3` and `sha256sum`, and rows that were cut off the end are seen by the head file.

What this cannot do: who can write the ledger *and* the head file can make up another history, and
who deletes both has none. Against that an auditor notes the head hash now and then, outside the
site (`client ledger show --head`), and asks for it later (`client ledger verify --noted`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from federation.atomic import sync_directory, write_atomically
from federation.errors import FedgeError, UserError

APPLICATION_ID = 0x46454C31
"""Marks the file as ours: "FEL1"."""
SCHEMA = (
    "CREATE TABLE rows (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE data_sets (fingerprint TEXT PRIMARY KEY, records BLOB NOT NULL)",
    *(
        f"CREATE TRIGGER {table}_no_{change} BEFORE {change} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'a ledger is only added to'); END"
        for table in ("rows", "data_sets")
        for change in ("update", "delete")
    ),
    # INSERT OR REPLACE would remove a row without a delete trigger.
    *(
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {is_there} "
        "BEGIN SELECT RAISE(ABORT, 'a ledger is only added to'); END"
        for table, is_there in (
            ("rows", "NEW.number <= (SELECT coalesce(max(number), 0) FROM rows)"),
            ("data_sets", "NEW.fingerprint IN (SELECT fingerprint FROM data_sets)"),
        )
    ),
)


class LedgerError(FedgeError):
    """The ledger is broken, in use, or does not take what it was given."""


class NotALedgerError(UserError):
    """There is no ledger in that place."""


@dataclass(frozen=True)
class Head:
    """The end of a chain: whoever knows it knows every row before it."""

    count: int
    hash: str


@dataclass(frozen=True)
class Link:
    """One row, as it stands in the file."""

    number: int
    """From 1."""
    body: dict[str, Any]
    hash: str


EMPTY = Head(0, "0" * 64)


def to_body(values: Mapping[str, Any]) -> str:
    """Return the one text that stands for ``values``.

    Raises:
        LedgerError: A value is NaN, infinite or no JSON value.
    """
    try:
        return json.dumps(dict(values), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError):
        raise LedgerError(
            "an entry holds a value that is NaN, infinite or no plain number or text: nothing was "
            "written, so nothing may leave"
        ) from None


def hash_after(previous: str, body: str) -> str:
    """Return the hash of the row after ``previous``."""
    return hashlib.sha256((previous + body).encode()).hexdigest()


def head_path(path: Path) -> Path:
    """Return where the head of a ledger is kept beside it."""
    return path.with_name(f"{path.name}.head")


def write_head(path: Path, head: Head) -> None:
    """Replace the head file; it is on disk when this returns."""
    write_atomically(head_path(path), json.dumps(asdict(head)) + "\n", mode=0o600)


def read_head(path: Path) -> Head:
    """Return what the head file says.

    Raises:
        LedgerError: It is missing or damaged.
    """
    place = head_path(path)
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
        head = Head(**values)
        is_right = isinstance(head.count, int) and isinstance(head.hash, str)
    except (OSError, ValueError, TypeError):
        is_right = False
    if not is_right:
        raise LedgerError(
            f"{place} is missing or damaged, so nobody can say whether rows were cut off the end: "
            "put it back from a backup; or, if an auditor's note agrees with `client ledger show "
            f"{path} --head`, write it anew with that command and --json"
        )
    return head


def claim(path: Path) -> TextIO:
    """Return the lock of the one process that writes; closing it gives it back.

    Raises:
        LedgerError: Another process holds it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    file = os.fdopen(os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600), "w")
    lock.chmod(0o600)  # an earlier version made it readable for all
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise LedgerError(
            f"another process writes {path}: a ledger has one writer; stop the other trainer"
        ) from None
    return file


def create(path: Path) -> None:
    """Make an empty ledger; it exists whole or not at all.

    Raises:
        LedgerError: Its head file is there already and says that it had rows.
        UserError: It cannot be written here.
        FedgeError: It could be, if the disk were not full.
    """
    if head_path(path).exists() and (head := read_head(path)).count:
        raise LedgerError(
            f"{path} is gone, and {head_path(path)} says that it had {head.count} rows: put it "
            "back from a backup; a budget does not start anew with the file"
        )
    new = path.with_name(f".{path.name}.new")
    for suffix in ("", "-wal", "-shm"):  # what a kill left
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    # Its -wal and -shm get the same mode from SQLite.
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with contextlib.closing(connect(new, is_writer=True)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # the file remembers it
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise _disk_error(
            path, f"{path} cannot be made ({error}): free some space there, or mount it for writing"
        ) from None
    write_head(path, EMPTY)
    new.replace(path)
    sync_directory(path.parent)


def connect(path: Path, *, is_writer: bool) -> sqlite3.Connection:
    """Open the file. A reader sees what was committed, and changes nothing.

    Raises:
        NotALedgerError: It is no SQLite file.
        UserError: It is another user's, or lies where nothing can be written.
        FedgeError: The disk does not let SQLite open it.
    """
    if path.is_file() and not os.access(path, os.R_OK, effective_ids=True):
        raise UserError(
            f"{path} may not be read by this user: run this as the user that runs the trainer, or "
            "as root"
        )
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={'rw' if is_writer else 'ro'}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,  # the one writer holds a lock of its own
        )
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
    except sqlite3.DatabaseError as error:
        raise _unopened(path, error) from None
    return connection


def _unopened(path: Path, error: sqlite3.DatabaseError) -> FedgeError:
    """Tell a file that is no ledger from a disk that does not let SQLite read one."""
    if isinstance(error, sqlite3.OperationalError) and path.is_file():
        return _disk_error(
            path,
            f"{path} cannot be opened ({error}): look for a full disk, or one that cannot be "
            "written; the file itself may be whole",
        )
    return NotALedgerError(f"{path} is not a ledger ({error})")


def _disk_error(path: Path, reason: str) -> FedgeError:
    """Tell a full disk, which may have space again by itself, from a place to change."""
    can_write = os.access(path.parent, os.W_OK, effective_ids=True)  # no if mounted read-only
    return FedgeError(reason) if can_write else UserError(reason)


def check_kind(connection: sqlite3.Connection, path: Path) -> None:
    """Check that this is a ledger, with all its triggers.

    Raises:
        NotALedgerError: It is another file.
        LedgerError: Somebody changed its tables or triggers.
    """
    try:
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        statements = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master") if sql}
    except sqlite3.DatabaseError as error:
        raise _unopened(path, error) from None
    if found != APPLICATION_ID:
        raise NotALedgerError(f"{path} is not a ledger: it is another SQLite file")
    if statements != set(SCHEMA):
        raise LedgerError(
            f"{path}: its tables or triggers are not those of a ledger: somebody changed the file; "
            "put it back from a backup"
        )


def read_links(connection: sqlite3.Connection, path: Path) -> Iterator[Link]:
    """Yield every row, each checked against the one before it.

    Raises:
        LedgerError: Naming the first row that does not fit.
    """
    previous = EMPTY
    try:
        for number, body, found in connection.execute(
            "SELECT number, body, hash FROM rows ORDER BY number"
        ):
            expected = previous.count + 1
            if number != expected:
                raise LedgerError(f"{path}: row {expected} is missing; after it comes row {number}")
            if not isinstance(body, str) or hash_after(previous.hash, body) != found:
                raise LedgerError(
                    f"{path}: row {number} is broken: its hash does not follow from row "
                    f"{previous.count} and what it says; it was changed, exchanged or damaged"
                )
            previous = Head(number, found)
            yield Link(number, json.loads(body), found)
    except (sqlite3.DatabaseError, ValueError, RecursionError) as error:
        raise LedgerError(
            f"{path}: row {previous.count + 1} cannot be read ({type(error).__name__}): the file "
            "is damaged; put it back from a backup"
        ) from None


def read_data_set(connection: sqlite3.Connection, path: Path, name: str) -> bytes:
    """Return the record digests of a data set.

    Raises:
        LedgerError: They are missing, or not those that ``name`` stands for.
    """
    try:
        found = connection.execute(
            "SELECT records FROM data_sets WHERE fingerprint = ?", (name,)
        ).fetchone()
    except sqlite3.DatabaseError:
        found = None
    if not found or hashlib.sha256(found[0]).hexdigest() != name:
        raise LedgerError(f"{path}: data set {name[:8]} is missing or changed: nothing may leave")
    records: bytes = found[0]
    return records


def check_data_sets(
    connection: sqlite3.Connection, path: Path, named: Mapping[str, int], num_bytes: int
) -> None:
    """Check the record digests of every data set against the row that brought it in.

    Args:
        connection: To the ledger.
        path: Its place, for the message.
        named: Fingerprint to number of records, from the rows.
        num_bytes: Of one record's digest.

    Raises:
        LedgerError: Naming the data set that is missing, unnamed or changed.
    """
    found = set()
    try:
        for name, records in connection.execute("SELECT fingerprint, records FROM data_sets"):
            found.add(name)
            if (
                not isinstance(records, bytes)
                or hashlib.sha256(records).hexdigest() != name
                or named.get(name) != len(records) // num_bytes
            ):
                raise LedgerError(f"{path}: data set {str(name)[:8]} is not the one of its row")
        (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: its data sets cannot be read ({error})") from None
    if missing := set(named) - found:
        raise LedgerError(f"{path}: data set {min(missing)[:8]} of a row is missing")
    if state != "ok":
        raise LedgerError(f"{path}: SQLite finds the file damaged: put it back from a backup")


def check_head(path: Path, expected: Head, hashes: list[str]) -> None:
    """Check that the chain goes at least to where the head file says that it went.

    It may go further: a process can be killed between a row and the head file.

    Args:
        path: The ledger.
        expected: From the head file, read before the rows were.
        hashes: Of every row, in order.

    Raises:
        LedgerError: Rows are missing at the end, or the head is of another history.
    """
    if len(hashes) < expected.count:
        raise LedgerError(
            f"{path}: rows {len(hashes) + 1} to {expected.count} were cut off the end: "
            f"{head_path(path)} knows {expected.count} rows"
        )
    if [EMPTY.hash, *hashes][expected.count] != expected.hash:
        raise LedgerError(
            f"{path}: row {expected.count} is another one than {head_path(path)} knows: one of the "
            "two files was exchanged"
        )
