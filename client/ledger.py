"""What left this site, and what it cost: a row for each answer, written before the bytes leave.

A spend is on disk when ``Ledger.append`` returns, so a crash after it counts as spent and a crash
before it left nothing. Asked again, the same bytes have their row already and cost nothing; other
bytes for the same round have their noise drawn anew and are charged again.

**A budget cannot be reset.** A data set is known by its records (`client.fingerprint`), and what it
has spent is the sum over every row whose data set shares at least one record with it. No record's
own spend is above that sum, for each row that used the record is in it. It counts too much where
two data sets overlap a little: all of both is charged for what only the overlap may have cost.
It cannot see a record that was rewritten.

How the rows are kept from being changed: `client.chain`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from client import chain
from client.chain import Head, LedgerError, NotALedgerError
from client.fingerprint import RECORD_BYTES, Fingerprint, share_a_record
from federation import accountant
from federation.accountant import PrivacyEvent

LEDGER = "ledger.db"
"""File of the ledger in a site's state directory."""

EpsilonOf = Callable[[Sequence[PrivacyEvent], float], float]
"""The accountant: events and delta to epsilon (federation.accountant.epsilon_of)."""


@dataclass(frozen=True)
class Entry:
    """One thing that is about to leave."""

    run: str
    bundle: str
    server_round: int
    stage: str
    """What it is of its round: `client.gate` has the names."""
    adapter: str
    """Content digest of the adapter that the round came with."""
    settings: str
    """Digest of all that the request says (client.request.SiteRequest.settings_digest)."""
    sha256: str
    """Of the bytes that leave."""
    num_bytes: int
    metrics: Mapping[str, float]
    """Those that leave beside the bytes."""
    clip_norm: float
    """L2 bound of one record's gradient; 0 = none."""
    event: PrivacyEvent
    """Steps on the data. Noise 0 says that there was none: then no epsilon bounds what the data set
    gave away, now and for life. 0 steps says that nothing of the data leaves that is not charged
    already: a secure sum masks an update whose training has a row of its own."""
    batch: int
    """Records that a step draws in the mean: the sampling rate is this over the data set's records,
    or 1."""
    delta: float
    """At which the row's epsilon is given, in (0, 1)."""
    data_set: Fingerprint


@dataclass(frozen=True)
class Row:
    """One thing that left."""

    number: int
    hash: str
    time: str
    """UTC, ISO 8601."""
    run: str
    bundle: str
    server_round: int
    stage: str
    adapter: str
    settings: str
    sha256: str
    num_bytes: int
    metrics: dict[str, float]
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    batch: int
    delta: float
    data_set: str
    """Digest of its fingerprint."""
    epsilon: float | None
    """Spent for life by the data set and those that share a record with it, this row included;
    None = no bound."""

    @property
    def event(self) -> PrivacyEvent:
        """What the row cost."""
        return PrivacyEvent(self.noise_multiplier, self.sampling_rate, self.steps)

    @property
    def charges_sum(self) -> bool:
        """Whether it charges a training for a secure sum; older ledgers did with the vector."""
        return self.steps > 0 and self.stage in ("trained", "secure")

    def is_training_of(self, vector: Row) -> bool:
        """Return whether it charges the training of a masked vector that charges nothing."""
        same = ("run", "server_round", "adapter", "settings", "data_set")
        return self.charges_sum and all(getattr(self, n) == getattr(vector, n) for n in same)


@dataclass(frozen=True)
class Spent:
    """What a verdict of the policy depends on of the past."""

    events: tuple[PrivacyEvent, ...]
    """All that the data set at hand has been charged with, for life."""
    num_records: int
    """Of the data set at hand."""
    answered: Mapping[int, str]
    """This run: server_round to the content digest of the adapter whose training is charged."""
    settings: Mapping[int, str] = field(default_factory=dict)
    """``client.request.SiteRequest.settings_digest`` of the same rounds."""
    num_bytes: int = 0
    """That this run was sent."""
    is_kept: bool = True
    """Whether the answer to the round at hand, if it had one, is on disk: what can be sent again.
    Who knows only the ledger supposes so; the trainer looks (client.gate)."""
    is_counted: bool = False
    """Whether the masked vector that would leave has its row already."""


@dataclass
class Contents:
    """Everything in a ledger, checked."""

    rows: list[Row] = field(default_factory=list)
    data_sets: dict[str, int] = field(default_factory=dict)
    """Fingerprint to number of records."""
    key: str = ""
    """Which secret the fingerprints were made with."""
    head: Head = chain.EMPTY

    def spent(self, charged: Collection[str], num_records: int, run: str) -> Spent:
        """Return what a data set was charged with, and what a run was answered.

        Args:
            charged: Fingerprints of the data sets that share a record with it, its own among them.
            num_records: Of the data set.
            run: Id of the run.
        """
        of_run = [row for row in self.rows if row.run == run]
        # A row that cost nothing does not make the training that follows it a repeat.
        charged_rows = [row for row in of_run if row.steps]
        return Spent(
            tuple(row.event for row in self.rows if row.steps and row.data_set in charged),
            num_records,
            {row.server_round: row.adapter for row in reversed(charged_rows)},
            {row.server_round: row.settings for row in reversed(charged_rows)},
            sum(row.num_bytes for row in of_run),
        )


def utc_now() -> datetime:
    """Return the time of a row."""
    return datetime.now(UTC)


class Ledger:
    """The ledger of one site, open for writing: by one process, from any of its threads."""

    def __init__(self, path: Path, now: Callable[[], datetime], epsilon_of: EpsilonOf) -> None:
        """Use ``open``."""
        self._path = path
        self._now = now
        self._epsilon_of = epsilon_of
        self._thread = threading.Lock()
        self._shared: dict[tuple[str, str], bool] = {}
        self._file = chain.claim(path)
        try:
            if not path.exists():
                chain.create(path)
            self._connection = chain.connect(path, is_writer=True)
            self._contents = _read(self._connection, path, is_head_checked=True)
            self._head = chain.read_head(path)
            self._keep_head()  # a kill may have come between a row and the head file
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        now: Callable[[], datetime] = utc_now,
        epsilon_of: EpsilonOf = accountant.epsilon_of,
    ) -> Self:
        """Open a ledger, or make it; check every row.

        Args:
            path: Its file, on a local disk.
            now: Clock of the rows.
            epsilon_of: The accountant.

        Raises:
            LedgerError: It is broken, or another process writes it.
            NotALedgerError: The file is something else.
        """
        return cls(path, now, epsilon_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        with contextlib.suppress(AttributeError):  # it was never opened
            self._connection.close()
        self._file.close()

    def append(self, entry: Entry) -> Row:
        """Return the row of ``entry``: it is on disk, and so is its spend.

        The same run, round, stage and bytes have one row, however often they are asked. Sent again
        they cost what they cost the first time: what the policy says of delta by now, and which
        records there are by now, changes nothing.

        Raises:
            LedgerError: The row could not be written, the fingerprint was made with another secret,
                or the same bytes are there with other facts: nothing may leave.
            ValueError: ``delta`` is out of range.
        """
        values = _values_of(entry)
        with self._thread:
            self._check_data_set(entry.data_set)
            row = self._find(values)
            if row is None:
                charged = self._charged(entry.data_set)
                spent = self._contents.spent(charged, entry.data_set.num_records, entry.run)
                epsilon = self._epsilon_of([*spent.events, entry.event], entry.delta)
                values["epsilon"] = None if math.isinf(epsilon) else epsilon
                self._write(entry.data_set, values)
                row = self._contents.rows[-1]
            self._keep_head()
            return row

    def spent(self, data_set: Fingerprint, run: str) -> Spent:
        """Return what ``data_set`` was charged with, and what ``run`` was answered.

        Raises:
            LedgerError: The fingerprint was made with another secret.
        """
        with self._thread:
            self._check_data_set(data_set)
            charged = self._charged(data_set)
            return self._contents.spent(charged, data_set.num_records, run)

    def rows(self) -> list[Row]:
        """Return every row, in order."""
        with self._thread:
            return list(self._contents.rows)

    def verify(self) -> Head:
        """Check the file as it now is, and return the end of its chain.

        Raises:
            LedgerError: Naming the first row that is broken.
        """
        return read_ledger(self._path).head

    def _find(self, values: Mapping[str, Any]) -> Row | None:
        """Return the row that these bytes have, or None."""
        identity = ("run", "server_round", "stage", "sha256")
        for row in self._contents.rows:
            if all(getattr(row, name) == values[name] for name in identity):
                facts = ("num_bytes", "adapter", "settings", "metrics")
                other = [name for name in facts if getattr(row, name) != values[name]]
                if other:
                    raise LedgerError(
                        f"row {row.number} has the same run, round, stage and bytes with another "
                        f"{', '.join(other)}: nothing was written, so nothing may leave"
                    )
                return row
        return None

    def _charged(self, data_set: Fingerprint) -> set[str]:
        """Return the data sets that share a record with ``data_set``."""
        return {name for name in self._contents.data_sets if self._shares(name, data_set)}

    def _shares(self, name: str, data_set: Fingerprint) -> bool:
        if name == data_set.digest:
            return bool(data_set.records)
        pair = (name, data_set.digest)
        if pair not in self._shared:
            records = chain.read_data_set(self._connection, self._path, name)
            self._shared[pair] = share_a_record(records, data_set.records)
        return self._shared[pair]

    def _check_data_set(self, data_set: Fingerprint) -> None:
        if hashlib.sha256(data_set.records).hexdigest() != data_set.digest:
            raise ValueError("the fingerprint's digest is not that of its records")
        if self._contents.key not in ("", data_set.key):
            raise LedgerError(
                "the secret of this site's fingerprints is not the one that its ledger was kept "
                "with, so records could not be recognised: put the secret back from a backup"
            )

    def _write(self, data_set: Fingerprint, values: dict[str, Any]) -> None:
        """Commit a row, and before it that of a data set that is new."""
        time = self._now().astimezone(UTC).isoformat(timespec="seconds")
        bodies = [values | {"time": time}]
        is_new = data_set.digest not in self._contents.data_sets
        if is_new:
            named = {"fingerprint": data_set.digest, "num_records": data_set.num_records}
            bodies.insert(0, named | {"kind": "data_set", "key": data_set.key, "time": time})
        head = self._contents.head
        links: list[tuple[int, str, str]] = []
        for text in map(chain.to_body, bodies):
            head = Head(head.count + 1, chain.hash_after(head.hash, text))
            links.append((head.count, text, head.hash))
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            if is_new:
                self._connection.execute(
                    "INSERT INTO data_sets VALUES (?, ?)", (data_set.digest, data_set.records)
                )
            self._connection.executemany("INSERT INTO rows VALUES (?, ?, ?)", links)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise LedgerError(
                f"{self._path} did not take a row ({error}): nothing may leave; look for a full "
                "disk, or for another program that changed the file"
            ) from None
        for body, (number, _, found) in zip(bodies, links, strict=True):
            _take(self._contents, chain.Link(number, body, found), self._path)

    def _keep_head(self) -> None:
        if self._head != self._contents.head:
            try:
                chain.write_head(self._path, self._contents.head)
            except OSError as error:
                raise LedgerError(
                    f"{chain.head_path(self._path)} could not be written ({error.strerror}): "
                    "nothing may leave; the row is there and counts as spent"
                ) from None
            self._head = self._contents.head


def read_ledger(path: Path, *, is_head_checked: bool = True) -> Contents:
    """Return everything in a ledger, which another process may be writing.

    Args:
        path: Its file.
        is_head_checked: Whether the head file has to be there and to agree.

    Raises:
        LedgerError: Naming the first row that is broken.
        NotALedgerError: There is no ledger.
    """
    if not path.is_file():
        raise NotALedgerError(
            f"{path} is not a ledger: there is no such file; the trainer makes it when it starts"
        )
    with contextlib.closing(chain.connect(path, is_writer=False)) as connection:
        return _read(connection, path, is_head_checked=is_head_checked)


def _read(connection: sqlite3.Connection, path: Path, *, is_head_checked: bool) -> Contents:
    chain.check_kind(connection, path)
    # The head before the rows: so it cannot be ahead of them while another process writes.
    head = chain.read_head(path) if is_head_checked else chain.EMPTY
    connection.execute("BEGIN")  # rows and data sets of one moment
    contents = Contents()
    hashes = []
    for link in chain.read_links(connection, path):
        _take(contents, link, path)
        hashes.append(link.hash)
    chain.check_head(path, head, hashes)
    chain.check_data_sets(connection, path, contents.data_sets, RECORD_BYTES)
    connection.execute("ROLLBACK")
    return contents


def _take(contents: Contents, link: chain.Link, path: Path) -> None:
    """Add a row of the chain to what is known."""
    values = dict(link.body)
    kind = values.pop("kind", None)
    try:
        if kind == "data_set":
            contents.data_sets[values["fingerprint"]] = values["num_records"]
            contents.key = values["key"]
        elif kind == "release" and values["data_set"] in contents.data_sets:
            row = Row(number=link.number, hash=link.hash, **values)
            row.event  # noqa: B018  # refuses numbers out of range
            contents.rows.append(row)
        else:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise LedgerError(
            f"{path}: row {link.number} is none that this version knows: use the version that "
            "wrote it"
        ) from None
    contents.head = Head(link.number, link.hash)


def _values_of(entry: Entry) -> dict[str, Any]:
    return {
        "kind": "release",
        "run": entry.run,
        "bundle": entry.bundle,
        "server_round": entry.server_round,
        "stage": entry.stage,
        "adapter": entry.adapter,
        "settings": entry.settings,
        "sha256": entry.sha256,
        "num_bytes": entry.num_bytes,
        "metrics": dict(entry.metrics),
        "clip_norm": entry.clip_norm,
        "noise_multiplier": entry.event.noise_multiplier,
        "sampling_rate": entry.event.sampling_rate,
        "steps": entry.event.steps,
        "batch": entry.batch,
        "delta": entry.delta,
        "data_set": entry.data_set.digest,
    }
