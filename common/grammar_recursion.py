"""Rules of a grammar that recursion spoils: they never end, or can be several of themselves with nothing between.

`s ::= "a" s` has no text that is whole; where nothing else can follow, the engine finds no token that it may take, and
ends the request with an error. `s ::= s s | [a-z]` reads n characters in a number of ways that grows exponentially with
n, and xgrammar keeps up with them between two steps of all requests: 0.3 s a token after 100 tokens, of
`s ::= s s s | s s | [a-z]*` 3 s after 10. No grammar needs one: a repetition says the same. llama.cpp refuses every
rule that begins with itself, so also these; other left recursion, as of `sum ::= sum "+" term | term`, is cheap here.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

# Tokens of a rule's body as xgrammar writes it. What comes after a lookahead's bracket consumes no text.
_ELEMENT = re.compile(
    r'(?P<text>"(?:\\.|[^"\\])*")'
    r"|(?P<class>\[(?:\\.|[^\]\\])*\])(?P<star>\*)?"
    r"|(?P<ahead>\(=)"
    r"|(?P<mark>[()|])"
    r"|(?P<rule>[^\s\"()\[\]{}|]+)(?:\{(?P<low>\d+), (?P<high>-?\d+)\})?"
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """One part of an alternative: a rule, or (`rule` is empty) characters."""

    rule: str
    low: int = 1
    high: int = 1
    """How often at least and at most; -1: without end."""


def spoiled(rules: dict[str, str]) -> str | None:
    """Why the grammar of `rules` (name -> body, as `str(xgrammar.Grammar)` writes it) is refused; None: it is not."""
    if (name := endless(rules)) is not None:
        return f"rule {name} never ends: each of its alternatives leads back to it"
    if (name := doubled(rules)) is not None:
        return f"rule {name} can be several of itself with nothing between; use a repetition"
    return None


def endless(rules: dict[str, str]) -> str | None:
    """The name of a rule that has no finite text; None where there is none."""
    alternatives = _all_alternatives(rules)
    known = {""} | {part.rule for _, parts in alternatives for part in parts if part.rule not in rules}
    finite = _finite(alternatives, known)
    return next((name for name in rules if name not in finite), None)


def doubled(rules: dict[str, str]) -> str | None:
    """The name of a rule that can be two or more of itself and nothing else; None where there is none.

    Time grows with the size of the grammar, and with its square / 64.
    """
    alternatives = _all_alternatives(rules)
    empty = _finite(alternatives, frozenset())
    numbers = {name: number for number, name in enumerate(rules)}

    def may_vanish(part: _Part) -> bool:
        return part.low == 0 or part.rule in empty

    # What a rule can be alone, in one step: an alternative's part beside which all others may vanish.
    alone: list[set[int]] = [set() for _ in rules]
    for head, parts in alternatives:
        firm = [part for part in parts if not may_vanish(part)]
        for part in firm if len(firm) == 1 else parts if not firm else ():
            if part.rule in numbers and (part.low <= 1 or may_vanish(part)):
                alone[numbers[head]].add(numbers[part.rule])
    becomes = _closures(alone)
    comes_from = _closures(_reversed(alone))
    for head, parts in alternatives:
        found = comes_from[numbers[head]]
        once = twice = 0
        for part in parts:
            targets = becomes[numbers[part.rule]] if part.rule in numbers else 0
            if not may_vanish(part):
                found &= targets
            twice |= once & targets if part.high == 1 else targets
            once |= targets
        if found := found & twice:
            return list(rules)[(found & -found).bit_length() - 1]
    return None


def _all_alternatives(rules: dict[str, str]) -> list[tuple[str, Sequence[_Part]]]:
    return [(head, parts) for head, body in rules.items() for parts in _alternatives(body)]


def _alternatives(body: str) -> Iterator[Sequence[_Part]]:
    parts: list[_Part] = []
    depth = 0
    for match in _ELEMENT.finditer(body):
        if match["ahead"]:
            break
        if match["mark"] == "(":
            depth += 1
        elif match["mark"] == ")":
            depth -= 1
        elif match["mark"] == "|" and depth == 1:
            yield parts
            parts = []
        elif match["rule"]:
            low, high = (int(match["low"]), int(match["high"])) if match["low"] else (1, 1)
            if high:
                parts.append(_Part(match["rule"], low, high))
        elif match["text"] != '""':
            parts.append(_Part("", 0 if match["star"] else 1))
    yield parts


def _finite(alternatives: Sequence[tuple[str, Sequence[_Part]]], known: Collection[str]) -> set[str]:
    """The rules that can be put together of rules in `known`; of none: those that may be no text at all."""
    waiting: dict[str, list[int]] = {}
    missing = []
    found: set[str] = set()
    ready: list[str] = []
    for index, (head, parts) in enumerate(alternatives):
        firm = [part for part in parts if part.low and part.rule not in known]
        missing.append(len(firm))
        for part in firm:
            waiting.setdefault(part.rule, []).append(index)
        if not firm:
            ready.append(head)
    while ready:
        rule = ready.pop()
        if rule in found:
            continue
        found.add(rule)
        for index in waiting.get(rule, ()):
            missing[index] -= 1
            if not missing[index]:
                ready.append(alternatives[index][0])
    return found


def _closures(edges: Sequence[set[int]]) -> list[int]:
    """What each node leads to, itself included, as bits of a number.

    By the strongly connected components after Kosaraju: those that others lead to come first.
    """
    closures = [0] * len(edges)
    backwards = _reversed(edges)
    assigned: set[int] = set()
    starts = reversed(_postorder(edges, range(len(edges))))
    components = [_postorder(backwards, [start], assigned) for start in starts if start not in assigned]
    for component in reversed(components):
        bits = 0
        for node in component:
            bits |= 1 << node
            for other in edges[node]:
                bits |= closures[other]
        for node in component:
            closures[node] = bits
    return closures


def _postorder(edges: Sequence[set[int]], starts: Sequence[int], seen: set[int] | None = None) -> list[int]:
    """The nodes that `starts` lead to and that are not in `seen`, each after those that it leads to."""
    seen = set() if seen is None else seen
    order = []
    for start in starts:
        if start in seen:
            continue
        seen.add(start)
        path = [(start, iter(edges[start]))]
        while path:
            node, others = path[-1]
            for other in others:
                if other not in seen:
                    seen.add(other)
                    path.append((other, iter(edges[other])))
                    break
            else:
                order.append(node)
                path.pop()
    return order


def _reversed(edges: Sequence[set[int]]) -> list[set[int]]:
    backwards: list[set[int]] = [set() for _ in edges]
    for node, others in enumerate(edges):
        for other in others:
            backwards[other].add(node)
    return backwards
