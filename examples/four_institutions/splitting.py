"""A held-out split that the training text does not leak into.

A model that has seen a sentence, or its twin with one word changed, is not tested by that
sentence. So the held-out records are drawn first, and a training record that nearly repeats one
of them, at any site, is left out of training. Only the few hundred held-out records are indexed,
therefore the comparison is exact: no hashing trick, and a few seconds for thousands of records.

Two records are near-duplicates when either
- their words say the same: Jaccard of word trigrams over prompt and response >= 0.5, or
- their answers do: Jaccard of character 5-grams over the response alone >= 0.5. This one catches
  an answer that stands under another question, and short answers, where one word of four differs.
"""

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

NEAR_DUPLICATE = 0.5
"""Jaccard similarity from which two records count as the same text."""

_WORD_SHINGLE = 3
_CHARACTER_SHINGLE = 5


class Record(NamedTuple):
    """One line of a data set: a question and its answer."""

    prompt: str
    response: str


class Size(NamedTuple):
    """How many records of one kind to keep: exactly in held-out, at most in the other two."""

    num_train: int
    num_heldout: int
    num_public: int = 0


class Split(NamedTuple):
    """The records of one kind; none that is held out is nearly repeated in train or public."""

    train: list[Record]
    """A site's private text."""
    heldout: list[Record]
    public: list[Record]
    """No site's: text of the same kind that a student may be distilled on."""


class SplitError(ValueError):
    """A site has fewer distinct records than its held-out split needs."""


class NearDuplicates:
    """Finds, among the records added so far, one that nearly repeats another record."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._words = _ShingleIndex()
        self._characters = _ShingleIndex()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Make ``record`` one that later records are compared with."""
        self._words.add(word_shingles(f"{record.prompt} {record.response}"))
        self._characters.add(character_shingles(record.response))

    def similarity(self, record: Record) -> float:
        """Return the highest similarity, in [0, 1], of ``record`` to any record added."""
        words = self._words.highest_jaccard(word_shingles(f"{record.prompt} {record.response}"))
        return max(words, self._characters.highest_jaccard(character_shingles(record.response)))

    def __contains__(self, record: Record) -> bool:
        return self.similarity(record) >= NEAR_DUPLICATE


class _ShingleIndex:
    """Sets of shingles, and for each shingle the numbers of the sets that hold it."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._holders: dict[str, list[int]] = defaultdict(list)

    def add(self, shingles: frozenset[str]) -> None:
        for shingle in shingles:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(shingles))

    def highest_jaccard(self, shingles: frozenset[str]) -> float:
        shared: Counter[int] = Counter()
        for shingle in shingles:
            shared.update(self._holders.get(shingle, ()))
        return max(
            (
                count / (len(shingles) + self._sizes[number] - count)
                for number, count in shared.items()
            ),
            default=0.0,
        )


def normalised(text: str) -> str:
    """Return what two spellings of the same text share: NFKC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def word_shingles(text: str) -> frozenset[str]:
    """Return the runs of three words in ``text``; a shorter text is one shingle."""
    words = re.findall(r"\w+", normalised(text))
    width = min(_WORD_SHINGLE, len(words)) or 1
    return frozenset(
        " ".join(words[start : start + width]) for start in range(len(words) - width + 1)
    )


def character_shingles(text: str) -> frozenset[str]:
    """Return the runs of five characters in ``text``; a shorter text is one shingle."""
    plain = normalised(text)
    width = min(_CHARACTER_SHINGLE, len(plain)) or 1
    return frozenset(plain[start : start + width] for start in range(len(plain) - width + 1))


def without_repeats(records: Iterable[Record]) -> list[Record]:
    """Return the records whose prompt and whose response are both new, in the same order.

    Two answers to one question would train the model to guess between them, and one answer under
    two questions says little twice.
    """
    prompts: set[str] = set()
    responses: set[str] = set()
    kept = []
    for record in records:
        prompt, response = normalised(record.prompt), normalised(record.response)
        if prompt not in prompts and response not in responses:
            prompts.add(prompt)
            responses.add(response)
            kept.append(record)
    return kept


def split(
    pools: Mapping[str, Sequence[Record]], sizes: Mapping[str, Size], seed: int
) -> dict[str, Split]:
    """Return training and held-out records for every site, the same for the same arguments.

    Held-out records are a random draw of each site's distinct records, none nearly repeating
    another. Training takes the records that follow, then public, unless they nearly
    repeat a held-out record of any site.

    Args:
        pools: All records of each site, in any order.
        sizes: How many to keep, for the same sites.
        seed: Fixes the draw.

    Raises:
        SplitError: A site has too few distinct records for its held-out split.
    """
    shuffled = {site: _shuffled(records, f"{seed}/{site}") for site, records in pools.items()}
    heldout: dict[str, list[Record]] = {}
    all_heldout = NearDuplicates()
    for site in sorted(pools):
        heldout[site] = _draw_heldout(shuffled[site], sizes[site].num_heldout, all_heldout)
        if len(heldout[site]) < sizes[site].num_heldout:
            raise SplitError(
                f"{site} has {len(heldout[site])} distinct records, and its held-out split "
                f"needs {sizes[site].num_heldout}"
            )
    splits = {}
    for site, size in sizes.items():
        both = _draw_rest(shuffled[site], size.num_train + size.num_public, all_heldout)
        splits[site] = Split(both[: size.num_train], heldout[site], both[size.num_train :])
    return splits


def _shuffled(records: Sequence[Record], seed: str) -> list[Record]:
    distinct = without_repeats(sorted(records))
    random.Random(seed).shuffle(distinct)  # noqa: S311  (a draw that must repeat, not a secret)
    return distinct


def _draw_heldout(
    candidates: Sequence[Record], number: int, drawn_anywhere: NearDuplicates
) -> list[Record]:
    drawn: list[Record] = []
    for record in candidates:
        if len(drawn) == number:
            break
        if record not in drawn_anywhere:
            drawn_anywhere.add(record)
            drawn.append(record)
    return drawn


def _draw_rest(candidates: Sequence[Record], number: int, heldout: NearDuplicates) -> list[Record]:
    drawn: list[Record] = []
    for record in candidates:
        if len(drawn) == number:
            break
        if record not in heldout:  # a held-out record nearly repeats itself, so it stays out too
            drawn.append(record)
    return drawn
