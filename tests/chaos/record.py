"""What happened, and whether it may happen: counts by client and status, the times of trouble, and violations.

Bounded: a run of hours keeps counts, the latest troubles and the first violations.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator, Mapping

import grpc

Code = grpc.StatusCode

# What a client may hear beside its own answer, by what was done while its call was on its way.
GONE = frozenset({Code.UNAVAILABLE, Code.CANCELLED, Code.FAILED_PRECONDITION})
LOST = frozenset({Code.UNAVAILABLE})
RELOADED = frozenset({Code.UNAVAILABLE, Code.FAILED_PRECONDITION})
NOTHING: frozenset[Code] = frozenset()

_KEPT_TROUBLES = 64
_KEPT_VIOLATIONS = 50


@dataclasses.dataclass
class Trouble:
    """One thing that was done to the server, until a normal client had its answer again.

    Attributes:
        answers: statuses that calls under it may end with.
        probes: the same, for Health and Status.

    """

    what: str
    answers: frozenset[Code]
    probes: frozenset[Code]
    began: float = dataclasses.field(default_factory=time.monotonic)
    ended: float | None = None

    def touches(self, began: float, ended: float) -> bool:
        """Whether it was going on at any moment between the two."""
        return self.began <= ended and (self.ended is None or self.ended >= began)


class Record:
    """All that is known of a run."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.calm: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        """As `counts`, of calls during which nothing was done to the server."""
        self.troubles: collections.deque[Trouble] = collections.deque(maxlen=_KEPT_TROUBLES)
        self.recoveries: dict[str, list[float]] = collections.defaultdict(list)
        """Seconds from a trouble's begin to the next good answer, by what it was."""
        self.violations: list[str] = []
        self.violation_count = 0
        self.good = 0
        """Right answers to normal clients."""
        self.last_good = 0.0
        """When the call of the latest right answer began."""

    def violation(self, what: str) -> None:
        """Something that may not happen."""
        self.violation_count += 1
        if len(self.violations) < _KEPT_VIOLATIONS:
            self.violations.append(what)

    def begin(self, what: str, answers: frozenset[Code], probes: frozenset[Code]) -> Trouble:
        """Something is about to be done to the server."""
        trouble = Trouble(what, answers, probes)
        self.troubles.append(trouble)
        return trouble

    def end(self, trouble: Trouble) -> None:
        """A normal client has its answer again."""
        trouble.ended = time.monotonic()
        self.recoveries[trouble.what].append(trouble.ended - trouble.began)

    def during(self, began: float, ended: float) -> Iterator[Trouble]:
        """The troubles that a call between the two moments may have felt."""
        return (trouble for trouble in self.troubles if trouble.touches(began, ended))

    def end_of_call(
        self, kind: str, code: Code, details: str, began: float, expected: frozenset[Code], *, probe: bool
    ) -> None:
        """Count a call that has ended, and judge its status."""
        ended = time.monotonic()
        self.counts[kind][code.name] += 1
        troubles = list(self.during(began, ended))
        if not troubles:
            self.calm[kind][code.name] += 1
        allowed = expected.union(*(trouble.probes if probe else trouble.answers for trouble in troubles))
        if code not in allowed:
            during = ", ".join(trouble.what for trouble in troubles) or "nothing else"
            self.violation(f"{kind}: {code.name} {details[:300]!r} after {ended - began:.2f} s, during {during}")

    def good_answer(self, began: float) -> None:
        """A normal client got exactly what it should."""
        self.good += 1
        self.last_good = max(self.last_good, began)

    def share_of_good(self, kinds: Mapping[str, bool]) -> float:
        """The part of calm calls by normal clients (true in `kinds`) that were answered; 1.0 where there were none."""
        totals = collections.Counter[str]()
        for kind, normal in kinds.items():
            if normal:
                totals += self.calm[kind]
        return totals["OK"] / totals.total() if totals else 1.0
