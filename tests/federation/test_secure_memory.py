"""What a server remembers of its secure sums."""

from pathlib import Path

import pytest

from federation.gathering import Part
from federation.secure_memory import SecureMemory, SecureMemoryError
from federation.secure_messages import Stage
from federation.sites import Reply
from tests.secure_cohort import LENGTH, Cohort


def kept(directory: Path) -> tuple[Cohort, SecureMemory]:
    """Keep what the last stage of a cohort stands on."""
    cohort = Cohort(4, 3)
    cohort.run_stage()
    cohort.server.close()
    cohort.run_stage({"s3": Stage.SHARE})
    cohort.server.close()
    cohort.until(Stage.REVEAL)
    memory = SecureMemory(directory)
    parts = {name: Part(Reply(name, 1, train_loss=0.5), "ab" * 32) for name in ("s0", "s1", "s2")}
    memory.keep_opening(cohort.server, parts)
    return cohort, memory


def test_a_number_of_an_attempt_is_never_used_twice(tmp_path: Path) -> None:
    assert [SecureMemory(tmp_path).next_attempt(1) for _ in range(3)] == [1, 2, 3]
    assert [SecureMemory(tmp_path).next_attempt(2) for _ in range(2)] == [1, 2]
    (tmp_path / "attempt.json").write_text("{")
    with pytest.raises(SecureMemoryError, match=r"attempt\.json is damaged"):
        SecureMemory(tmp_path).next_attempt(2)


def test_another_server_opens_the_sum_with_the_very_same_request(tmp_path: Path) -> None:
    cohort, memory = kept(tmp_path)
    request = cohort.server.request()
    secure, parts = memory.opening(1, cohort.terms.subject)
    assert secure.request() == request
    assert secure.waiting == {"s0", "s1", "s2"}
    assert parts["s1"] == Part(Reply("s1", 1, train_loss=0.5), "ab" * 32)
    cohort.server = secure
    cohort.run_stage()
    secure.close()
    expected = cohort.plain_sum(["s0", "s1", "s2"])
    width = cohort.terms.ring_bits // 8
    ring = secure.result.elements_N[:LENGTH]
    assert b"".join(int(x).to_bytes(8, "little")[:width] for x in ring) == expected


def test_an_opening_of_another_round_or_adapter_is_none(tmp_path: Path) -> None:
    cohort, memory = kept(tmp_path)
    assert memory.opening(2, cohort.terms.subject) is None
    assert memory.opening(1, "0" * 64) is None
    assert SecureMemory(tmp_path / "empty").opening(1, cohort.terms.subject) is None


@pytest.mark.parametrize("name", ["opening.json", "opening.sum"])
def test_a_damaged_opening_is_named(tmp_path: Path, name: str) -> None:
    cohort, memory = kept(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SecureMemoryError, match=f"{name} is damaged"):
        memory.opening(1, cohort.terms.subject)
