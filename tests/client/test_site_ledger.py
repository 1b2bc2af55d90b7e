"""A site's ledger that is gone, or that was put back from before, does not give a new budget."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from client.chain import LedgerError, head_path
from client.gate import SiteGate
from client.ledger import LEDGER, Ledger, read_ledger
from client.reasons import REFUSED
from client.site_ledger import open_site_ledger
from client.site_settings import SiteSettings, load_site
from client.trainer import Trainer
from tests.client.test_daemon import write_site
from tests.client.test_gate import HEAD, RUN, Box
from tests.conftest import write_records


def silent(*_: object, **__: object) -> None:
    """Say nothing."""


def settings_of(directory: Path, **more: Any) -> SiteSettings:
    write_records(directory / "data.jsonl", 12)
    (directory / "policy.toml").write_text(
        f'[models]\nbase = ["any"]\n[runs]\nallowed = ["any"]\nbundles = ["{HEAD["bundle"]}"]\n'
    )
    return load_site(write_site(directory, **more))


def remove_ledger(state: Path) -> None:
    for path in state.glob(f"{LEDGER}*"):
        path.unlink()


def test_the_first_start_makes_a_ledger_and_later_ones_find_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    for _ in range(2):
        with SiteGate.open(settings, silent) as gate:
            assert gate.data_set
    names = {path.name for path in settings.state.iterdir()}
    assert names == {LEDGER, f"{LEDGER}.head", f"{LEDGER}.lock", "fingerprint.key"}
    assert {path.stat().st_mode & 0o777 for path in settings.state.iterdir()} == {0o600}


def test_a_ledger_that_is_gone_with_its_head_is_not_made_anew(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with SiteGate.open(settings, silent):
        pass
    remove_ledger(settings.state)
    for witness in ("fingerprint.key", "answers"):
        with pytest.raises(LedgerError, match=f"is gone, and {witness} beside it") as caught:
            SiteGate.open(settings, silent)
        assert "the security officer's own decision" in str(caught.value)
        assert not (settings.state / LEDGER).exists()
        (settings.state / "answers").mkdir(exist_ok=True)
        (settings.state / "fingerprint.key").unlink(missing_ok=True)
    # What the sentence says helps.
    settings.state.rename(tmp_path / "away")
    with SiteGate.open(settings, silent):
        pass


def test_a_ledger_from_before_an_answer_is_not_used(tiny_model: Path, tmp_path: Path) -> None:
    box = Box(tiny_model, tmp_path)
    box.ask(HEAD)
    old = [shutil.copy(path, tmp_path) for path in (box.ledger, head_path(box.ledger))]
    box.ask(HEAD | {"server_round": 2}, box.message_of(1))
    with open_site_ledger(box.site.state) as ledger:
        assert len(ledger.rows()) == 2
    remove_ledger(box.site.state)
    for path in old:
        shutil.copy(path, box.site.state)
    with pytest.raises(LedgerError, match=f"no row for round 2 of run {RUN}, which this site"):
        open_site_ledger(box.site.state)
    assert len(read_ledger(box.ledger).rows) == 1


def test_an_answer_that_a_kill_kept_from_the_ledger_is_no_sign_of_an_old_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    box = Box(tiny_model, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", die)
        with pytest.raises(SystemExit):
            box.ask(HEAD)
    with open_site_ledger(box.site.state) as ledger:
        assert ledger.rows() == []
    # Nothing of it left: the run goes on with the next round, and the site starts as before.
    box.ask(HEAD | {"server_round": 2}, box.message_of(1))
    with open_site_ledger(box.site.state) as ledger:
        assert [row.server_round for row in ledger.rows()] == [2]


@pytest.mark.parametrize("node", ["resident", "supernode"])
def test_only_a_resident_node_is_believed_what_bundle_a_run_carries(
    tiny_model: Path, tmp_path: Path, node: str
) -> None:
    settings = settings_of(tmp_path, base_model=str(tiny_model), node=node, allow_same_user=True)
    message = tmp_path / "message"
    (tmp_path / "box").mkdir()
    message.write_bytes(Box(tiny_model, tmp_path / "box").message)
    with SiteGate.open(settings, silent) as gate:
        trainer = Trainer(settings.site, gate, silent)
        reply = trainer.answer(json.dumps(HEAD).encode(), message, tmp_path)
    assert reply.head["code"] == REFUSED
    assert ("(runs.bundles)" in reply.head["reason"]) == (node == "supernode")
