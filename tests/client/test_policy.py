import ast
import inspect
import itertools
import math
import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel

import client.policy
from client.policy import Policy, QuietHours, read_policy
from client.policy_template import policy_template
from client.verdict import rounded
from federation.run_signature import is_signed_by
from federation.settings import SettingsError, load_settings
from tests.client.policy_example import BASE, REQUEST, RUN, SPENT, changed, policy, refused_by


def loaded(text: str) -> Policy:
    return load_settings(Policy, tomllib.loads(text), "policy.toml")


def test_an_empty_policy_allows_nothing() -> None:
    assert refused_by(REQUEST, loaded("")) == "models.base"


def test_any_has_to_be_written_out() -> None:
    assert refused_by(REQUEST, policy(models__base=[])) == "models.base"
    assert refused_by(REQUEST, policy(models__base=["any"])) == ""
    assert refused_by(REQUEST, policy(runs__allowed=["any"], runs__bundles=["any"])) == ""
    assert refused_by(REQUEST, policy(aggregation__kinds=["any"])) == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[models]\nbases = []", "unknown setting 'models.bases'; known here: base"),
        ("[model]\nbase = []", "unknown setting 'model'"),
        ('[models]\nbase = "any"', "models.base"),
        ('[models]\nbase = ["Any"]', "models.base.0"),
        ("[adapter]\nmax_rank = true", "adapter.max_rank"),
        ("[adapter]\nmax_rank = 8.0", "adapter.max_rank"),
        ("[adapter]\nmax_alpha = inf", "adapter.max_alpha"),
        ("[privacy]\nepsilon = nan", "privacy.epsilon"),
        ("[privacy]\ndelta = 0", "privacy.delta"),
        ("[privacy]\nnoise_floor = 0", "expected a noise multiplier above 0"),
        ('[adapter]\nmodules = ["[a-z]*"]', "adapter.modules.0"),
        ('[quiet_hours]\ntime_zone = "Europe/Atlantis"', "'Europe/Atlantis'"),
        ('[quiet_hours]\ntime_zone = "../../etc/passwd"', "does not know"),
        ('[[quiet_hours.windows]]\nfrom = "24:00"\nto = "06:00"', "from"),
        ('[[quiet_hours.windows]]\ndays = ["Mo"]\nfrom = "22:00"\nto = "06:00"', "days.0"),
    ],
)
def test_a_policy_with_a_fault_is_not_read(text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        loaded(text)


LOW_ORDER = (
    "00" * 32,
    "01" + "00" * 31,
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
)
"""The list of libsodium's ge25519_has_small_order, each of which also stands with the sign bit."""


@pytest.mark.parametrize("key", LOW_ORDER)
@pytest.mark.parametrize("sign", [0, 0x80])
def test_a_key_that_anybody_can_sign_for_is_no_key_of_a_policy(key: str, sign: int) -> None:
    content = bytes.fromhex(key)
    key = (content[:-1] + bytes([content[-1] | sign])).hex()
    for table in (f'[runs]\nsigners = ["{key}"]', f'[aggregation]\ncohort = ["any", "{key}"]'):
        with pytest.raises(SettingsError, match=f"public key {key[:16]}… is of low order"):
            loaded(table)
    # The forgery: S = 0, and R = -hA is one of the eight points, whichever the text makes it.
    forgeries = [point + "00" * 32 for point in LOW_ORDER]
    assert not any(is_signed_by(key, forged, f"{n}") for n in range(50) for forged in forgeries)


def test_no_key_that_was_drawn_is_of_low_order() -> None:
    for _ in range(100):
        key = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
        assert loaded(f'[runs]\nsigners = ["{key}"]').runs.signers == (key,)


def test_the_template_loads_and_allows_nothing_until_it_names_a_base_and_a_run() -> None:
    text = policy_template()
    request = changed(REQUEST, metrics=[])
    assert refused_by(request, loaded(text)) == "models.base"
    with_base = text.replace("base = []", f'base = ["{BASE}"]')
    assert refused_by(request, loaded(with_base)) == "runs.allowed"
    with_run = with_base.replace("allowed = []", f'allowed = ["{RUN}"]', 1)
    assert refused_by(request, loaded(with_run)) == "aggregation.cohort"
    with_cohort = with_run.replace("cohort = []", 'cohort = ["any"]')
    assert refused_by(request, loaded(with_cohort)) == ""


def test_the_template_mentions_every_key() -> None:
    text = policy_template()
    parts = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(tables) == list(Policy.model_fields)
    for table, field in Policy.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        for key in kind.model_fields:
            assert re.search(rf"^{key} = ", tables[table], flags=re.MULTILINE), key
    assert re.search(r"^# windows = .*days = .* from = .* to = ", text, flags=re.MULTILINE)
    commented = text.replace("windows = []\n", "").replace("# windows =", "windows =")
    assert len(loaded(commented).quiet_hours.windows) == 1


def test_every_key_of_the_policy_has_a_docstring() -> None:
    module = ast.parse(inspect.getsource(client.policy))
    for table in (node for node in module.body if isinstance(node, ast.ClassDef)):
        for key, after in itertools.pairwise([*table.body, ast.Pass()]):
            if isinstance(key, ast.AnnAssign) and table.name != "Policy":
                assert isinstance(after, ast.Expr), ast.unparse(key)


def test_a_policy_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_template(), encoding="utf-8")
    assert read_policy(path) == loaded(policy_template())
    with pytest.raises(SettingsError, match="does not exist"):
        read_policy(tmp_path / "other.toml")


def quiet(*windows: tuple[list[str], str, str], zone: str = "UTC") -> QuietHours:
    tables: list[dict[str, Any]] = [{"days": d, "from": f, "to": t} for d, f, t in windows]
    return QuietHours.model_validate({"time_zone": zone, "windows": tables})


@pytest.mark.parametrize(
    ("day", "clock", "is_quiet"),
    [
        (20, "21:59", False),  # Friday
        (20, "22:00", True),
        (21, "05:59", True),  # Saturday: Friday's window goes on
        (21, "06:00", False),
        (21, "22:00", False),  # none begins on a Saturday
        (22, "03:00", False),
        (23, "03:00", False),  # Monday: none began on Sunday
        (23, "23:00", True),
    ],
)
def test_a_window_goes_on_over_midnight(day: int, clock: str, is_quiet: bool) -> None:
    hours = quiet((["mon", "tue", "wed", "thu", "fri"], "22:00", "06:00"))
    assert hours.hold(datetime.fromisoformat(f"2026-11-{day}T{clock}:00+00:00")) == is_quiet


def test_a_window_within_a_day_and_one_of_24_hours() -> None:
    lunch, sunday = quiet((["tue"], "12:00", "13:00")), quiet((["sun"], "00:00", "00:00"))
    clocks = ("11:59", "12:00", "12:59", "13:00")
    moments = [datetime.fromisoformat(f"2026-11-24T{clock}:30+00:00") for clock in clocks]
    assert [lunch.hold(moment) for moment in moments] == [False, True, True, False]
    days = [datetime(2026, 11, day, hour, tzinfo=UTC) for day in (21, 22, 23) for hour in (0, 23)]
    assert [sunday.hold(moment) for moment in days] == [False, False, True, True, False, False]


def test_quiet_hours_follow_the_clock_of_the_site_through_summer_time() -> None:
    berlin = quiet((["mon"], "12:00", "13:00"), zone="Europe/Berlin")
    winter, summer = datetime(2026, 11, 23, 11, 30, tzinfo=UTC), datetime(2026, 7, 6, tzinfo=UTC)
    assert berlin.hold(winter)  # 12:30 in Berlin
    assert not berlin.hold(summer.replace(hour=11, minute=30))  # 13:30
    assert berlin.hold(summer.replace(hour=10, minute=30))


def test_metrics_leave_rounded_and_only_those_asked_and_allowed() -> None:
    measured = {
        "seconds": 123.456,
        "train_loss": 2.34567891,
        "num-examples": 1234,
        "secret": 1.0,
        "peak": math.inf,
    }
    rules = policy(metrics__allowed=["seconds", "train_loss", "num-examples", "peak"])
    asked = ("seconds", "train_loss", "secret", "peak")
    assert rounded(measured, rules, asked) == {"seconds": 123.0, "train_loss": 2.35}
    coarse = policy(metrics__allowed=["num-examples"], metrics__digits=1)
    assert rounded(measured, coarse, ("num-examples",)) == {"num-examples": 1000.0}
    assert rounded({"seconds": math.nan}, rules, asked) == {}


def test_a_policy_that_says_nothing_of_metrics_lets_none_out() -> None:
    rules = Policy()
    measured = {"seconds": 2.0, "train_loss": 1.0, "num-examples": 4.0}
    assert rounded(measured, rules, tuple(measured)) == {}
    assert rules.privacy.required


def test_what_was_spent_is_not_changed_by_a_verdict() -> None:
    before = repr(SPENT)
    refused_by(REQUEST)
    assert repr(SPENT) == before
