"""Documents that a source or a build leaves out: which, why, and how many of them are too many."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loopline.data_pipeline.errors import DataError, printable

# Nothing is lost with these; of the others something is, so they have a ceiling.
NO_TEXT = "without text"
NOT_UTF8 = "not UTF-8"
NO_MEMBER = "without a .txt or .json member"
NO_TOKENS = "for which the tokenizer has no token"

# Above a few stray files in a folder of text, below what a wrong encoding or a wrong tokenizer touches.
DEFAULT_MAX_SKIPPED_SHARE = 0.01
_N_NAMED = 3


@dataclass(frozen=True)
class Skip:
    """One document that is left out; `where` is its file, and the row or member in it."""

    where: str
    reason: str


class Skips:
    """Skipped documents by reason, each with the names of the first few."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}

    def add(self, skip: Skip) -> None:
        self.merge([(skip.reason, 1, [skip.where])])

    def merge(self, facts: Iterable[tuple[str, int, Sequence[str]]]) -> None:
        """Adds what another one's `facts` say."""
        for reason, n, names in facts:
            self._counts[reason] += n
            first = self._first.setdefault(reason, [])
            first += names[: _N_NAMED - len(first)]

    @property
    def facts(self) -> list[tuple[str, int, Sequence[str]]]:
        """(reason, count, first names) in the order met; goes through JSON."""
        return [(reason, n, self._first[reason]) for reason, n in self._counts.items()]

    @property
    def n(self) -> int:
        return self._counts.total()

    @property
    def n_lost(self) -> int:
        """Those that hold something."""
        return self.n - self._counts[NO_TEXT]

    def __str__(self) -> str:
        listed = []
        for reason, n, names in self.facts:
            more = ", ..." if n > len(names) else ""
            listed.append(f"{n} {reason} ({', '.join(map(printable, names))}{more})")
        return "; ".join(listed)

    def check(self, n_documents: int, max_share: float) -> None:
        """Raises DataError where more than `max_share` of the documents hold something and are left out.

        Args:
            n_documents: all of them, skipped ones included.
        """
        if self.n_lost > max_share * n_documents:
            raise DataError(
                f"{self.n_lost} of {n_documents} documents ({self.n_lost / n_documents:.2%}) would be lost, "
                f"max_skipped_share={max_share:g} allows {max_share:.2%}. Skipped: {self}. Convert or repair them, use "
                "another tokenizer where it lacks tokens, or raise the share (--max-skipped-share) and lose them"
            )
