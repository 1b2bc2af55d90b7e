import hashlib
import json
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from client.chain import SCHEMA, LedgerError, NotALedgerError, connect, head_path
from client.ledger import Ledger, read_ledger
from federation.accountant import PrivacyEvent, epsilon_of
from tests.client.ledgers import ONE, RUN, data_set, entry, fill, open_ledger
from tests.matrices import run_matrix

TRIGGERS = [statement for statement in SCHEMA if statement.startswith("CREATE TRIGGER")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def filled(path: Path) -> Path:
    fill(path, 6)
    return path


def tamper(path: Path, *statements: str, triggers: list[str] = TRIGGERS) -> None:
    """Change the file as somebody would who knows the triggers, and puts them back."""
    connection = sqlite3.connect(path)
    for trigger in TRIGGERS:
        connection.execute(f"DROP TRIGGER {trigger.split()[2]}")
    for statement in (*statements, *triggers):
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_row_says_what_left_and_is_there_for_the_next_process(path):
    with open_ledger(path) as ledger:
        row = ledger.append(entry(3, metrics={"seconds": 2.5}))
        assert ledger.rows() == [row]
    with open_ledger(path) as ledger:
        assert ledger.rows() == [row]
    assert (row.run, row.server_round, row.sha256) == (RUN, 3, entry(3).sha256)
    assert (row.metrics, row.event) == ({"seconds": 2.5}, PrivacyEvent(1.0, 0.1, 4))
    assert row.time == "2026-11-24T12:00:00+00:00"
    assert row.data_set == ONE.digest
    assert read_ledger(path).rows == [row]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_commit_waits_for_the_disk(path):
    """What a power cut would show cannot be tested here: this is what SQLite promises for it."""
    with open_ledger(path), closing(connect(path, is_writer=True)) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_chain_can_be_followed_with_sqlite_and_sha256_alone(filled):
    connection = sqlite3.connect(filled)
    previous, count = "0" * 64, 0
    for number, body, found in connection.execute("SELECT * FROM rows ORDER BY number"):
        count += 1
        previous = hashlib.sha256((previous + body).encode()).hexdigest()
        assert (number, found) == (count, previous)
    connection.close()
    assert count == 9  # six releases, and three data sets before the first release of each
    assert json.loads(head_path(filled).read_text()) == {"count": 9, "hash": previous}


def test_the_same_bytes_asked_again_have_one_row_and_other_bytes_are_charged_again(path):
    with open_ledger(path) as ledger:
        first = ledger.append(entry())
        assert ledger.append(entry()) == first
        again = ledger.append(entry(sha256="f" * 64))
        assert (first.epsilon, again.epsilon) == (4.001, 8.001)
        assert len(ledger.spent(ONE, RUN).events) == 2
    with open_ledger(path) as ledger:
        assert ledger.append(entry()) == first
        assert len(ledger.rows()) == 2


def test_the_same_bytes_with_other_facts_are_refused(path):
    with open_ledger(path) as ledger:
        ledger.append(entry())
        for change in (
            {"adapter": "9" * 64},
            {"settings": "9" * 64},
            {"num_bytes": 9},
            {"metrics": {"seconds": 9.0}},
        ):
            with pytest.raises(LedgerError, match="nothing may leave"):
                ledger.append(entry(**change))
        assert len(ledger.rows()) == 1


def test_the_same_bytes_are_sent_again_under_another_delta_and_with_more_records(path):
    with open_ledger(path) as ledger:
        first = ledger.append(entry())
        grown = data_set(*range(12))
        again = entry(delta=1e-5, bundle="9" * 64, data_set=grown, event=PrivacyEvent(1.0, 0.05, 4))
        assert ledger.append(again) == first
        assert ledger.rows() == [first]


def test_spent_names_what_this_run_was_answered(path):
    with open_ledger(path) as ledger:
        ledger.append(entry(1))
        ledger.append(entry(1, stage="keys", sha256="e" * 64, event=PrivacyEvent(0, 0, 0)))
        ledger.append(entry(2, run="12" * 16))
        ledger.append(entry(4))
        spent = ledger.spent(ONE, RUN)
        assert spent.answered == {1: entry(1).adapter, 4: entry(4).adapter}
        assert spent.num_records == 10
        assert spent.events == (PrivacyEvent(1.0, 0.1, 4),) * 3  # the keys cost nothing
        # A training that follows keys is none that was charged already.
        ledger.append(entry(9, stage="keys", sha256="d" * 64, event=PrivacyEvent(0, 0, 0)))
        spent = ledger.spent(ONE, RUN)
        assert 9 not in spent.answered
        assert 9 not in spent.settings
        assert ledger.spent(data_set(99), "34" * 16).answered == {}


def test_data_sets_that_share_one_record_are_both_charged(path):
    left, right, both, other = (
        data_set(*range(100)),
        data_set(*range(99, 200)),  # shares record 99 with the left
        data_set(5, 150),
        data_set(500),
    )
    with open_ledger(path) as ledger:
        ledger.append(entry(1, data_set=left, event=PrivacyEvent(1.0, 0.1, 1)))
        ledger.append(entry(2, data_set=right, event=PrivacyEvent(1.0, 0.1, 20)))
        ledger.append(entry(3, data_set=other, event=PrivacyEvent(1.0, 0.1, 300)))

        def steps(data):
            return sum(event.steps for event in ledger.spent(data, RUN).events)

        assert [steps(data) for data in (left, right, both, other)] == [21, 21, 21, 300]
        assert steps(data_set(0)) == 1
        assert steps(data_set(777)) == 0
        # Whatever subset it trains on next, no record gets away with less than its own spend.
        for record, own in [(0, 1), (99, 21), (199, 20), (500, 300)]:
            assert steps(data_set(record, 888)) >= own
    with open_ledger(path) as ledger:  # nor does a restart lose it
        assert steps(left) == 21


def test_epsilon_is_the_accountants_and_none_where_there_is_no_bound(path):
    event = PrivacyEvent(1.1, 0.05, 40)
    with Ledger.open(path) as ledger:
        rows = [ledger.append(entry(number, event=event, delta=1e-5)) for number in (1, 2, 3)]
        assert [row.epsilon for row in rows] == [
            epsilon_of([event] * number, 1e-5) for number in (1, 2, 3)
        ]
        assert ledger.append(entry(4, event=PrivacyEvent(0, 0.05, 40))).epsilon is None
        # Once it left without noise, no later noise bounds it.
        assert ledger.append(entry(5, event=event)).epsilon is None
        assert math.isinf(epsilon_of(ledger.spent(ONE, RUN).events, 1e-5))
        with pytest.raises(ValueError, match="delta is 0"):
            ledger.append(entry(6, delta=0.0))
        assert len(ledger.rows()) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"seconds": math.nan}},
        {"metrics": {"seconds": math.inf}},
        {"metrics": {"seconds": object()}},
        {"clip_norm": -math.inf},
        {"delta": math.nan},
    ],
)
def test_what_is_no_plain_number_is_refused_and_nothing_is_written(path, change):
    with open_ledger(path) as ledger, pytest.raises(LedgerError, match="nothing may leave"):
        ledger.append(entry(**change))
    assert read_ledger(path).rows == []


def test_a_fingerprint_of_another_secret_is_refused(filled):
    other = data_set(1, 2, key=bytes(32))
    with open_ledger(filled) as ledger:
        with pytest.raises(LedgerError, match="put the secret back"):
            ledger.spent(other, RUN)
        with pytest.raises(LedgerError, match="put the secret back"):
            ledger.append(entry(9, data_set=other))


def test_sqlite_itself_refuses_to_change_a_row(filled):
    connection = sqlite3.connect(filled)
    for statement in (
        "UPDATE rows SET body = '{}' WHERE number = 2",
        "DELETE FROM rows WHERE number = 9",
        "INSERT OR REPLACE INTO rows VALUES (2, '{}', '')",
        "UPDATE data_sets SET records = x''",
        "DELETE FROM data_sets",
        "REPLACE INTO data_sets SELECT fingerprint, x'' FROM data_sets",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="only added to"):
            connection.execute(statement)
    connection.close()
    read_ledger(filled)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (
            "UPDATE rows SET body = replace(body, '\"steps\":4', '\"steps\":1') WHERE number = 4",
            "row 4 is broken",
        ),
        ("UPDATE rows SET hash = '0' WHERE number = 9", "row 9"),
        ("UPDATE rows SET body = CAST(body AS BLOB) WHERE number = 3", "row 3"),
        ("DELETE FROM rows WHERE number = 5", "row 5 is missing"),
        ("DELETE FROM rows WHERE number = 1", "row 1 is missing"),
        ("UPDATE rows SET number = 10 WHERE number = 9", "row 9 is missing"),
        ("DELETE FROM rows WHERE number > 6", "rows 7 to 9 were cut off"),
        ("DELETE FROM rows", "rows 1 to 9 were cut off"),
        ("DELETE FROM data_sets WHERE rowid = 2", "of a row is missing"),
        ("UPDATE data_sets SET records = substr(records, 17) WHERE rowid = 2", "is not the one"),
        ("INSERT INTO data_sets VALUES ('x', x'00')", "is not the one"),
    ],
)
def test_a_change_by_somebody_with_the_file_is_named(filled, statement, named):
    tamper(filled, statement)
    with pytest.raises(LedgerError, match=named):
        read_ledger(filled)
    with pytest.raises(LedgerError, match=named):  # and the trainer does not start
        open_ledger(filled)


def test_exchanged_rows_are_named(filled):
    tamper(
        filled,
        "UPDATE rows SET number = -4 WHERE number = 4",
        "UPDATE rows SET number = 4 WHERE number = 6",
        "UPDATE rows SET number = 6 WHERE number = -4",
    )
    with pytest.raises(LedgerError, match="row 4 is broken"):
        read_ledger(filled)


def test_missing_triggers_are_noticed(filled):
    tamper(filled, triggers=TRIGGERS[1:])
    with pytest.raises(LedgerError, match="tables or triggers"):
        read_ledger(filled)


def test_a_row_of_unknown_kind_is_refused_though_its_hash_fits(filled):
    body = '{"kind":"gift"}'
    found = hashlib.sha256((read_ledger(filled).head.hash + body).encode()).hexdigest()
    tamper(filled, f"INSERT INTO rows VALUES (10, '{body}', '{found}')")  # noqa: S608
    with pytest.raises(LedgerError, match="row 10 is none that this version knows"):
        read_ledger(filled)


def test_any_flipped_byte_is_noticed_or_changes_nothing(filled, tmp_path):
    connection = sqlite3.connect(filled)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = read_ledger(filled)
    content = filled.read_bytes()
    copy = tmp_path / "copy.db"
    shutil.copy(head_path(filled), head_path(copy))
    noticed = 0
    for place in range(0, len(content), 61):
        copy.write_bytes(content[:place] + bytes([content[place] ^ 0x11]) + content[place + 1 :])
        try:
            assert read_ledger(copy) == whole
        except (LedgerError, NotALedgerError):
            noticed += 1
    assert noticed > 100


def test_without_its_head_file_or_with_a_strange_one_a_ledger_is_not_trusted(filled):
    head = head_path(filled)
    content = head.read_text()
    for wrong in ("", "[]", '{"count": "9", "hash": "0"}', '{"count": 9}'):
        head.write_text(wrong)
        with pytest.raises(LedgerError, match="missing or damaged"):
            read_ledger(filled)
    head.write_text(json.dumps({"count": 3, "hash": "0" * 64}))
    with pytest.raises(LedgerError, match="row 3 is another one"):
        open_ledger(filled)
    head.unlink()
    with pytest.raises(LedgerError, match=r"missing or damaged.*show .* --head"):
        open_ledger(filled)
    head.write_text(content)
    assert read_ledger(filled).head.count == 9


def test_a_ledger_that_was_deleted_does_not_start_anew(filled):
    filled.unlink()
    with pytest.raises(LedgerError, match="says that it had 9 rows"):
        open_ledger(filled)
    assert not filled.exists()


def test_a_head_that_is_behind_is_brought_up_to_date(filled, tmp_path):
    before = tmp_path / "before"
    shutil.copy(head_path(filled), before)
    with open_ledger(filled) as ledger:
        ledger.append(entry(7))
    shutil.copy(before, head_path(filled))  # killed between the row and the head
    assert len(read_ledger(filled).rows) == 7
    with open_ledger(filled) as ledger:
        assert ledger.verify().count == json.loads(head_path(filled).read_text())["count"] == 10


def test_one_process_writes_and_others_read(filled):
    with open_ledger(filled) as ledger:
        with pytest.raises(LedgerError, match="one writer"):
            open_ledger(filled)
        ledger.append(entry(7))
        assert len(read_ledger(filled).rows) == 7  # before it is closed
    open_ledger(filled).close()


def test_a_row_that_somebody_else_wrote_meanwhile_stops_the_writer(filled):
    with open_ledger(filled) as ledger:
        connection = sqlite3.connect(filled)
        connection.execute("INSERT INTO rows VALUES (10, '{}', '')")
        connection.commit()
        connection.close()
        with pytest.raises(LedgerError, match="did not take a row"):
            ledger.append(entry(7))
        with pytest.raises(LedgerError, match="row 10"):
            ledger.verify()


def test_a_data_set_that_is_changed_meanwhile_does_not_make_a_record_unknown(filled):
    with open_ledger(filled) as ledger:
        tamper(filled, "UPDATE data_sets SET records = zeroblob(160)")
        with pytest.raises(LedgerError, match="is missing or changed"):
            ledger.spent(data_set(3, 4), RUN)


def test_rows_from_several_threads_make_one_chain(path):
    with open_ledger(path) as ledger:
        threads = [
            threading.Thread(target=ledger.append, args=(entry(number % 10 + 1),))
            for number in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(row.server_round for row in ledger.rows()) == list(range(1, 11))
    assert read_ledger(path).head.count == 11


def test_other_files_are_no_ledgers_and_stay_as_they_are(tmp_path):
    text, empty, other = tmp_path / "a.txt", tmp_path / "b", tmp_path / "c.db"
    text.write_text("no database, though it is longer than the header of one " * 9)
    empty.touch()
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE rows (number)")
    connection.close()
    for path in (text, empty, other, tmp_path, tmp_path / "missing"):
        with pytest.raises(NotALedgerError):
            read_ledger(path)
    for path in (text, empty, other):
        content = path.read_bytes()
        with pytest.raises(NotALedgerError):
            open_ledger(path)
        assert path.read_bytes() == content


def test_the_import_is_light():
    code = (
        "import sys, client.ledger;"
        "print({'torch', 'numpy', 'opacus', 'flwr', 'rich'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_writer_killed_at_any_step_leaves_a_ledger_that_holds_all_that_left(tmp_path):
    report = run_matrix(Path(__file__).with_name("ledger_kill_matrix.py"), tmp_path)
    assert report["kills"] > 150
    assert report["cuts"] > 40
