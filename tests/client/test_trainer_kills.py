from pathlib import Path

import pytest

from tests.matrices import run_matrix

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("every", "least"), [(5, 5), pytest.param(1, 25, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_private_round_that_is_killed_anywhere_gives_the_same_bytes_and_is_charged_once(
    tmp_path: Path, every: int, least: int
) -> None:
    report = run_matrix(Path(__file__).with_name("trainer_kill_matrix.py"), tmp_path, every)
    print(report)
    assert report["kills"] >= least
    assert 0 < report["charged"] < report["kills"], "some died before their charge, some after it"


def test_no_command_and_no_setting_of_the_product_reaches_the_key_of_the_noise() -> None:
    sources = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "client").glob("*.py")}
    # An argument that is handed on, and None wherever it begins: only a test gives one.
    assert {n for n, text in sources.items() if "KeyOf" in text} == {
        *("trainer.py", "trainer_service.py"),
    }
    assert {n for n, text in sources.items() if "key=key" in text} == {
        *("privacy.py", "round.py"),
    }
    assert {n for n, text in sources.items() if "key=self.key(" in text} == {"trainer.py"}
    assert {n for n, text in sources.items() if "key=trainer.key(" in text} == {"secure_round.py"}
