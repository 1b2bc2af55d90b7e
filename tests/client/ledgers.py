"""What the tests of the ledger share: small data sets, entries, and a clock that stands still."""

from datetime import UTC, datetime
from pathlib import Path

from client.fingerprint import Fingerprint, fingerprint
from client.ledger import Entry, Ledger
from client.records import Record
from federation.accountant import PrivacyEvent

KEY = bytes(range(32))
RUN = "ab" * 16


def noon() -> datetime:
    return datetime(2026, 11, 24, 12, tzinfo=UTC)


def data_set(*numbers: int, key: bytes = KEY) -> Fingerprint:
    return fingerprint((Record(f"question {number}", "yes", 1) for number in numbers), key)


ONE = data_set(*range(10))


def entry(server_round: int = 1, **changes) -> Entry:
    records = changes.get("data_set", ONE).num_records
    values = {
        "run": RUN,
        "bundle": "c" * 64,
        "server_round": server_round,
        "stage": "update",
        "adapter": f"{server_round:064x}",
        "settings": "5" * 64,
        "sha256": f"{1000 + server_round:064x}",
        "num_bytes": 4096,
        "metrics": {"seconds": 1.5},
        "clip_norm": 1.0,
        "event": PrivacyEvent(1.0, 1 / records, 4),
        "batch": 1,
        "delta": 1e-3,
        "data_set": ONE,
    }
    return Entry(**(values | changes))


def steps_only(events, delta) -> float:
    """Stand in for the accountant where its figures do not matter: it imports torch."""
    return float(sum(event.steps for event in events)) + delta


def open_ledger(path: Path, **changes) -> Ledger:
    return Ledger.open(path, **({"now": noon, "epsilon_of": steps_only} | changes))


def fill(path: Path, num_rounds: int, **changes) -> None:
    """Write a release a round, of three data sets that overlap."""
    with open_ledger(path, **changes) as ledger:
        for server_round in range(1, num_rounds + 1):
            ledger.append(entry(server_round, data_set=data_set(*range(server_round % 3, 10))))
