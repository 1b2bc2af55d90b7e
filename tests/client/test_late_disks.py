"""A trainer whose files come late: its exit code says whether a service is to start it again."""

from pathlib import Path

import pytest

from client.gate import SiteGate
from client.round import site_records
from client.site_settings import SiteSettings, load_site
from client.trainer_service import _opened
from federation.errors import FedgeError
from tests.client.test_daemon import write_site
from tests.conftest import write_records
from tests.policies import policy_text


def say_nothing(*_: object, **__: object) -> None:
    """Log nothing."""


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    disk = tmp_path / "disk"
    disk.mkdir()
    write_records(disk / "data.jsonl", 8)
    (disk / "policy.toml").write_text(policy_text())
    made = load_site(write_site(tmp_path, data="disk/data.jsonl", policy="disk/policy.toml"))
    made.state.mkdir()
    return made


def exit_code(settings: SiteSettings) -> tuple[int, str]:
    site_records.cache_clear()  # a new process
    with pytest.raises(FedgeError) as caught:
        _opened(settings, SiteGate.open, say_nothing)
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("name", ["disk", "disk/data.jsonl", "disk/policy.toml"])
def test_a_file_that_was_there_before_is_waited_for(settings: SiteSettings, name: str) -> None:
    place = settings.state.parent / name
    away = settings.state.parent / "away"
    place.rename(away)
    code, said = exit_code(settings)
    assert (code, "was there" in said) == (2, False), "never seen: a mistake in site.toml"
    away.rename(place)
    with _opened(settings, SiteGate.open, say_nothing):
        pass
    place.rename(away)
    code, said = exit_code(settings)
    assert (code, "was there when this trainer ran before" in said) == (1, True)
    away.rename(place)
    with _opened(settings, SiteGate.open, say_nothing):
        pass


def test_a_file_that_is_there_and_wrong_is_for_the_user_to_mend(settings: SiteSettings) -> None:
    with _opened(settings, SiteGate.open, say_nothing):
        pass
    settings.policy.write_text("no policy")
    code, said = exit_code(settings)
    assert (code, "was there" in said) == (2, False)
