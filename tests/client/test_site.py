from pathlib import Path

import pytest

from client.site import find_site
from federation.errors import UserError
from tests.conftest import write_records

REAL = {"data": "/srv/text.jsonl", "base_model": "/srv/base"}


def find(node: dict[str, object], simulation: dict[str, object] | None = None) -> object:
    return find_site(node, simulation or {}, node_id=17, environment={"HOME": "/home/site"})


def test_a_real_site_keeps_its_state_below_its_home_under_its_node_id() -> None:
    site = find(REAL)
    assert site.state == Path("/home/site/.local/state/fedge/17")
    assert (site.name, site.rank) == ("", None)
    elsewhere = find_site(REAL, {}, node_id=3, environment={"XDG_STATE_HOME": "/var/lib"})
    assert elsewhere.state == Path("/var/lib/fedge/3")
    assert find(REAL | {"state": "/srv/state", "rank": 4}).state == Path("/srv/state")


def test_nothing_that_a_run_says_names_a_file_on_a_real_site(tmp_path: Path) -> None:
    write_records(tmp_path / "sites" / "bank" / "train.jsonl", 1)
    run = {"simulated_sites": str(tmp_path / "sites"), "base_model": "/run/base"}
    assert find(REAL, run) == find(REAL)
    assert find(REAL | {"partition-id": 0}, run) == find(REAL)
    with pytest.raises(UserError, match="does not say its data"):
        find({}, run)
    with pytest.raises(UserError, match="does not say its base_model"):
        find({"data": "d"}, run)


def test_a_simulated_site_is_a_folder_and_keeps_its_state_beside_them(tmp_path: Path) -> None:
    for name in ("clinic", "bank"):
        write_records(tmp_path / "sites" / name / "train.jsonl", 1)
    run = {"simulated_sites": str(tmp_path / "sites"), "base_model": "/run/base"}
    site = find({"partition-id": 1, "rank": 2}, run)
    assert site.data == tmp_path / "sites" / "clinic" / "train.jsonl"
    assert site.state == tmp_path / "site-state" / "clinic"
    assert (site.name, site.rank, site.base_model) == ("clinic", 2, Path("/run/base"))
    assert not site.state.exists()
    with pytest.raises(UserError, match="holds 2 sites, the simulation has one more"):
        find({"partition-id": 2}, run)
    with pytest.raises(UserError, match="simulated_sites is '': a simulation needs"):
        find({"partition-id": 0}, {})


@pytest.mark.parametrize("rank", [0, -1, 2.0, "4", True])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank: object) -> None:
    with pytest.raises(UserError, match=f"rank in this site's node config is {rank!r}"):
        find(REAL | {"rank": rank})
