"""One line of `client doctor`: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "skip", "warn", "fail"]
"""skip: it could not be found out, and the line says why. fail: the site will not work so."""
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    level: Level
    found: str
    """Never text of a record."""
    fix: str = ""
    """What to do; "" where nothing is to be done."""


def ok(name: str, found: str) -> Check:
    """Return a check that found what it should."""
    return Check(name, "ok", found)


def skipped(name: str, why: str) -> Check:
    """Return a check that could not be made."""
    return Check(name, "skip", why)


def first_problem(
    name: str, problems: Iterable[tuple[bool, Level, str, str]], otherwise: str
) -> Check:
    """Return the first problem that there is, or that all is well.

    Args:
        name: Of the check.
        problems: Is it one, how bad is it, what was found, what to do; the worst first.
        otherwise: What was found where there is none.
    """
    for is_one, level, found, fix in problems:
        if is_one:
            return Check(name, level, found, fix)
    return ok(name, otherwise)


def exit_code(checks: Iterable[Check]) -> int:
    """Return 2 if something must be changed, else 0."""
    return 2 if any(check.level == "fail" for check in checks) else 0


def gib(num_bytes: int) -> str:
    """Return a size for people."""
    return f"{num_bytes / GIB:.1f} GiB"
