"""What the patterns of a JSON schema may be, so that xgrammar compiles them in seconds.

xgrammar makes an automaton of each, in which every repetition is written out, and reads the whole vocabulary from each
of its states. That takes the longer, the more states it can be in at once: `([a-z]{1,30}){1,30}` has 900, and after a
few letters dozens of them are possible. So the automaton, which takes no tokenizer to make, is tried with a few bytes.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator

import xgrammar

# What may be left out counts three times: xgrammar takes 1.2 s for 2,000 such in a row and 8 s for 4,000, but 0.5 s for
# 16,000 others. Numbers of digits, as in "^([0-9]{128}){1,20}$", have 2,560 and take 0.4 s with 30,000 tokens.
MOST_CHARACTERS = 10_000
# One takes 0.2 to 0.6 ms with 30,000 tokens and one thread: ([a-z]{1,10}){1,10} has 8,500 and takes 5.4 s,
# ([a-z]{128}){1,20} 20,500 and 13 s, ([a-z]{1,20}){1,20} 42,000 and 28 s. A host name whose labels have their lengths
# has 20,600.
MOST_STATES_TRIED = 30_000
# As long as a long word's token. Of all that printable ASCII can begin, the letters a to z begin a fourth, and with
# fewer bytes to choose from than that, there are fewer tokens to read at each step. What else UTF-8 has is cheap.
_STEPS = 8
_ASCII = 128
_LETTERS = 26

# As xgrammar writes a pattern: also what else may have its letters, texts and character classes.
_REGEX = re.compile(r'(?P<regex>Regex\("(?P<text>(?:\\.|[^"\\])*)"[^)"]*\))|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')
_PART = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(?P<low>\d+)(?:,(?P<high>\d*))?\}|.", re.DOTALL)
_NO_VOCABULARY = xgrammar.TokenizerInfo(["\0", "a"], vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[0])


def too_much_in_patterns(grammar: str) -> str | None:
    """Why a pattern in `grammar`, as `str(xgrammar.Grammar)` writes it, is refused; None where none is."""
    patterns = {match["regex"]: match["text"] for match in _REGEX.finditer(grammar) if match["regex"]}
    characters = sum(_characters(re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)) for text in patterns.values())
    if characters > MOST_CHARACTERS:
        return f"has patterns of {characters} characters, repetitions written out; use at most {MOST_CHARACTERS}"
    compiler = xgrammar.GrammarCompiler(_NO_VOCABULARY, max_threads=1)
    tried = 0.0
    for regex in patterns:
        try:
            compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(f"root ::= {regex}"))
        except Exception:  # noqa: BLE001  # xgrammar raises what its C++ gives: here, that an inner check of it failed
            return (
                "has a pattern that xgrammar can't compile; one that repeats something more than 128 times is"
                " (minLength and maxLength, and grammars, may)"
            )
        for states in _Automaton(compiled).tries():
            tried += states
            if tried > MOST_STATES_TRIED:
                return (
                    "has patterns that take too long to compile; repeat less within repetitions, or put between"
                    " what is repeated a character that it can't have itself"
                )
    return None


def _characters(pattern: str) -> int:
    """How many characters the pattern has, as MOST_CHARACTERS counts them; or some number above the most."""
    total = last = 0
    outer: list[int] = []
    for match in _PART.finditer(pattern):
        part = match[0]
        if part == "(":
            outer.append(total)
            total = last = 0
        elif part == ")" and outer:
            last, total = total, outer.pop() + total
        elif part in ("?", "*"):
            last, total = last * 3, total + last * 2
        elif match["low"]:
            if not int(match["low"][:9]):
                last, total = last * 3, total + last * 2
            times = max(1, *(int(digits[:9]) for digits in match.group("low", "high") if digits))
            last, total = last * times, total + last * (times - 1)
        elif part not in "+|^$":
            last, total = 1, total + 1
        if total > MOST_CHARACTERS:
            return total
    return total


class _Automaton:
    """The states that xgrammar has made of one pattern: what leads from them with a byte (lowest, highest), or none."""

    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        edges = json.loads(compiled.serialize_json())["grammar"]["complete_fsm"]["edges"]
        ends = edges["indptr_"]
        states = [edges["data_"][start:end] for start, end in itertools.pairwise(ends)]
        self._bytes = [[edge for edge in state if edge[0] >= 0] for state in states]
        self._free = [[target for kind, _, target in state if kind == -1] for state in states]
        self._next: dict[frozenset[int], tuple[frozenset[int], float]] = {}

    def tries(self) -> Iterator[float]:
        """For each state and step: how many are possible at once, times the tokens that get there."""
        for state in range(len(self._bytes)):
            possible, tokens = frozenset([state]), self._choice([state]) / _LETTERS
            for _ in range(_STEPS):
                possible, share = self._step(possible)
                if not (tokens := min(tokens, tokens * share)):
                    break
                yield len(possible) * tokens

    def _choice(self, states: Iterable[int]) -> int:
        spans = {(low, high) for state in states for low, high, _ in self._bytes[state] if low < _ASCII}
        return len({byte for low, high in spans for byte in range(max(low, ord(" ")), min(high + 1, _ASCII))})

    def _step(self, states: frozenset[int]) -> tuple[frozenset[int], float]:
        """The states after the byte that leaves the most possible, and how much there is to choose from, in letters."""
        if (known := self._next.get(states)) is None:
            edges = [edge for state in states for edge in self._bytes[state]]
            reached = {
                frozenset(target for low, high, target in edges if low <= byte <= high)
                for byte in {low for low, _, _ in edges if low < _ASCII}
            }
            most = max(map(self._with_free, reached), key=len, default=frozenset[int]())
            known = self._next[states] = most, self._choice(states) / _LETTERS
        return known

    def _with_free(self, states: frozenset[int]) -> frozenset[int]:
        found, waiting = set(states), list(states)
        while waiting:
            new = set(self._free[waiting.pop()]) - found
            found |= new
            waiting += new
        return frozenset(found)
