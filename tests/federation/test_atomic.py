import os
from pathlib import Path

import pytest

from federation.atomic import new_directory, write_atomically
from federation.errors import UserError


def test_a_failed_write_leaves_the_old_content_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half"), new_directory(tmp_path / "out") as building:
        (building / "one").write_text("1")
        assert not (tmp_path / "out").exists()
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "out") as building:
        (building / "one").write_text("1")
    assert (tmp_path / "out" / "one").read_text() == "1"
    with pytest.raises(UserError, match="exists already"), new_directory(tmp_path / "out"):
        pass
