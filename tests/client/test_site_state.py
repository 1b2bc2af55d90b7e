import json
import os
import time
from pathlib import Path

import pytest
import torch

from client import site_state
from client.site_state import SiteState, SiteStateError
from federation.adapter import Adapter, LowRank
from federation.wire import (
    Factors,
    MissingReferenceError,
    Update,
    WireError,
    open_update,
    tensors_of,
    write_message,
)
from tests.matrices import run_matrix


def adapter(seed: int, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = LowRank(
        torch.randn(4, rank, generator=generator), torch.randn(rank, 6, generator=generator)
    )
    return Adapter(rank, 2.0 * rank, {"layers.0.q_proj": factors})


def sent(directory: Path, seed: int, reference: Update | None = None) -> Update:
    path = directory / f"sent-{seed}"
    dtype = "int8" if reference else "float32"
    write_message(path, adapter(seed), dtype=dtype, base_model="m", reference=reference)
    return open_update(path, reference=reference)


def value(residual: Factors | None) -> float | None:
    return residual and float(residual.rows("layers.0.q_proj", "B", 1)[0, 0])


def test_a_round_asked_again_starts_from_the_residual_it_started_from(tmp_path: Path) -> None:
    one, two = sent(tmp_path, 1), sent(tmp_path, 2)
    root, like = tmp_path / "state", adapter(0)
    assert SiteState(root, "a").residual(1, one, like) is None
    for _ in range(2):
        SiteState(root, "a").keep(1, one, residual=adapter(11), is_reference=True)
        assert SiteState(root, "a").residual(1, one, like) is None
    for _ in range(3):
        assert value(SiteState(root, "a").residual(2, two, like)) == value(adapter(11))
        SiteState(root, "a").keep(2, two, residual=adapter(12), is_reference=True)
    assert value(SiteState(root, "a").residual(3, one, like)) == value(adapter(12))
    assert value(SiteState(root, "a").residual(2, one, like)) == value(adapter(12)), "not that x_t"


def test_a_residual_never_gets_into_another_run_or_another_rank(tmp_path: Path) -> None:
    one, root = sent(tmp_path, 1), tmp_path / "state"
    SiteState(root, "aa").keep(1, one, residual=adapter(11), is_reference=False)
    assert SiteState(root, "bb").residual(2, one, adapter(0)) is None
    assert SiteState(root, "aa").residual(2, one, adapter(0, rank=1)) is None
    assert SiteState(root, "aa").residual(2, one, adapter(0)) is not None


def test_old_adapters_residuals_and_runs_go(tmp_path: Path) -> None:
    root, held = tmp_path / "state", None
    digests = []
    for number in range(1, 5):
        held = sent(tmp_path, number, held)
        digests.append(held.sha256_of_content)
        SiteState(root, "aa").keep(number, held, residual=adapter(number), is_reference=True)
    left = {path.name for path in (root / "run-aa").iterdir()}
    assert left == {
        "state.json",
        f"adapter-{digests[-1]}",
        f"adapter-{digests[-2]}",
        f"residual-4-{digests[-1][:16]}",
        f"residual-3-{digests[-2][:16]}",
    }
    (root / "mine").mkdir()
    for run in ("bb", "cc"):
        SiteState(root, run).keep(1, held, residual=None, is_reference=False)
    assert len(list(root.glob("run-*"))) == 3, "runs side by side do not remove each other's state"
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(root / "run-bb", (long_ago, long_ago))
    SiteState(root, "cc").keep(2, held, residual=None, is_reference=False)
    assert {path.name for path in root.glob("run-*")} == {"run-aa", "run-cc"}
    assert (root / "mine").is_dir()


def test_only_the_state_of_old_runs_is_removed_from_a_directory_of_the_users_choice(
    tmp_path: Path,
) -> None:
    one, root = sent(tmp_path, 1), tmp_path / "state"
    mine = [root / name / "precious.jsonl" for name in ("run-archive", "run-bed", "run-")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    SiteState(tmp_path / "elsewhere", "ee").keep(1, one, residual=None, is_reference=False)
    (root / "run-ee").symlink_to(tmp_path / "elsewhere" / "run-ee")
    for name in ("run-notes.txt", "run-aa"):
        (root / name).write_text("mine")
    SiteState(root, "bb").keep(1, one, residual=None, is_reference=False)
    long_ago = time.time() - 31 * 24 * 3600
    for path in root.iterdir():
        os.utime(path, (long_ago, long_ago))
    SiteState(root, "cc").keep(1, one, residual=None, is_reference=False)
    assert all(path.read_text() == "mine" for path in mine)
    left = {"run-archive", "run-bed", "run-", "run-ee", "run-notes.txt", "run-aa", "run-cc"}
    assert {path.name for path in root.iterdir()} == left


@pytest.mark.parametrize("existing", ["", "state", "state/run-a"])
def test_no_other_user_of_the_machine_reads_what_a_site_keeps(
    tmp_path: Path, existing: str
) -> None:
    one, root = sent(tmp_path, 1), tmp_path / "deep" / "state"
    (tmp_path / "deep" / existing).mkdir(parents=True)
    for path in (root, root / "run-a"):
        if path.exists():
            path.chmod(0o755)
    SiteState(root, "a").keep(1, one, residual=adapter(1), is_reference=True)
    assert (root / "run-a").stat().st_mode & 0o777 == 0o700
    assert root.stat().st_mode & 0o777 == (0o755 if existing else 0o700), "a user's is the user's"


def test_an_adapter_that_was_kept_is_the_reference_of_the_next_change(tmp_path: Path) -> None:
    root, first = tmp_path / "state", sent(tmp_path, 1)
    with pytest.raises(MissingReferenceError, match=f"{first.checksum[:16]}….*as float32"):
        SiteState(root, "a").open_adapter(first.checksum)
    SiteState(root, "a").keep(1, first, residual=None, is_reference=True)
    kept = SiteState(root, "a").open_adapter(first.checksum)
    assert kept.path.read_bytes() == first.path.read_bytes()
    kept.path.write_bytes(kept.path.read_bytes()[:-1] + b"\0")
    with pytest.raises(MissingReferenceError, match="does not hold"):
        SiteState(root, "a").open_adapter(first.checksum)


@pytest.mark.parametrize("run", ["", "../up", "A", "g", "f" * 65, "a/b"])
def test_a_run_cannot_name_a_file(tmp_path: Path, run: str) -> None:
    with pytest.raises(WireError, match="expected 1 to 64 hex digits"):
        SiteState(tmp_path, run)


def test_damage_is_one_sentence_with_a_way_out(tmp_path: Path) -> None:
    one = sent(tmp_path, 1)
    SiteState(tmp_path, "a").keep(1, one, residual=adapter(1), is_reference=False)
    name = json.loads((tmp_path / "run-a" / "state.json").read_text())["after"]
    (tmp_path / "run-a" / name).write_bytes(b"damaged")
    with pytest.raises(SiteStateError, match="residual-1-.* is damaged .*remove"):
        SiteState(tmp_path, "a").residual(2, one, adapter(0))
    (tmp_path / "run-a" / "state.json").write_text("{}")
    with pytest.raises(SiteStateError, match="state.json is damaged: remove"):
        SiteState(tmp_path, "a")


def test_a_site_killed_at_any_change_to_its_disk_answers_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    report = run_matrix(Path(__file__).with_name("site_kill_matrix.py"), tmp_path)
    assert report["kills"] > 40
    assert len(report["files"]) == 5


def test_what_a_process_remembers_is_what_the_next_one_reads(tmp_path: Path) -> None:
    one = open_update(sent(tmp_path, 1).path, keeps=True)
    root, like = tmp_path / "state", adapter(0)
    SiteState(root, "a").keep(1, one, residual=adapter(11), is_reference=True)
    held = [SiteState(root, "a").open_adapter(one.sha256_of_content)]
    rest = [SiteState(root, "a").residual(2, one, like)]
    site_state._memory.clear()
    held.append(SiteState(root, "a").open_adapter(one.sha256_of_content))
    rest.append(SiteState(root, "a").residual(2, one, like))
    for remembered, read in (held, rest):
        for module, factor in tensors_of(read):
            assert torch.equal(remembered.rows(module, factor, 2), read.rows(module, factor, 2))
    assert len(site_state._memory) == 2, "an adapter and a residual, however many rounds"


def test_an_adapter_of_which_one_factor_came_is_a_reference_as_well(tmp_path: Path) -> None:
    """As no server of ours sends it, but the format allows it."""
    root, one = tmp_path / "state", open_update(sent(tmp_path, 1).path, keeps=True)
    SiteState(root, "a").keep(1, one, residual=None, is_reference=True)
    held = SiteState(root, "a").open_adapter(one.sha256_of_content)
    path = tmp_path / "one-factor"
    write_message(path, adapter(2), dtype="float32", base_model="m", reference=one, factors="A")
    two = open_update(path, reference=held, keeps=True)
    SiteState(root, "a").keep(2, two, residual=None, is_reference=True)
    kept = SiteState(root, "a").open_adapter(two.sha256_of_content)
    for factor, of in (("A", adapter(2)), ("B", adapter(1))):
        assert torch.equal(
            kept.rows("layers.0.q_proj", factor, 2), of.rows("layers.0.q_proj", factor, 2)
        )


def test_a_process_remembers_one_run_at_a_time(tmp_path: Path) -> None:
    one = open_update(sent(tmp_path, 1).path, keeps=True)
    for run in ("a", "b"):
        SiteState(tmp_path, run).keep(1, one, residual=None, is_reference=True)
    assert {path.parent.name for path in site_state._memory} == {"run-b"}


def test_a_file_that_changed_is_not_remembered(tmp_path: Path) -> None:
    one = open_update(sent(tmp_path, 1).path, keeps=True)
    root = tmp_path / "state"
    SiteState(root, "a").keep(1, one, residual=None, is_reference=True)
    path = root / "run-a" / f"adapter-{one.sha256_of_content}"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(MissingReferenceError):
        SiteState(root, "a").open_adapter(one.sha256_of_content)
