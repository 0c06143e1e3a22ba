"""What a grammar may be, so that one request can't keep the engine from all others.

xgrammar compiles in the engine's process, where nothing can stop it, and finds the tokens allowed next between two
steps of all requests. Some shapes make it take minutes or for ever for either. They are looked for in a grammar as
xgrammar writes it, which is the same for GBNF and JSON schemas: one rule a line, repetitions in rules of their own. Of
most patterns in a schema it writes the text alone, which common/grammar_patterns judges. An ambiguous grammar can hide
the same trouble in other shapes; which ones, no program can tell in general.
"""

import re

from common.grammar_recursion import spoiled

# Measured with 49,000 tokens: 1.5 s to compile; time grows with the square.
MOST_CHARACTERS = 100_000
# Of all tools, each of which may have as many as above: with 30,000 tokens 7.4 s for 128 ordinary ones, 8.4 s for five
# of 100,000 characters. One of 400,000 takes 50 s.
MOST_CHARACTERS_OF_TOOLS = 512_000
# 50 take 0.4 s to compile, 100 take 1.8 s, 200 more than 15.
MOST_OPTIONALS = 64
# Two levels of 30 take 0.04 s a token, three of 10 take 0.6 s, four take minutes. A star is a level that never ends.
MOST_LEVELS = 2
MOST_REPEATS = 1000

_RULE = re.compile(r"^(\S+) ::= (.*)$", re.MULTILINE)
# What a rule is where it is nothing but a repetition, or another name, of one other rule.
_BOUNDED = re.compile(r"\(\((\S+)\{(\d+), (-?\d+)\}\)\)")
_STAR = re.compile(r'\("" \| \((\S+) (\S+)\)\)')
_PLUS = re.compile(r"\(\((\S+) (\S+)\) \| \(\1\)\)")
_ALIAS = re.compile(r'\((?:"" \| )?\(([^\s"()\[\]{}]+)\)\)')
_SEQUENCE = re.compile(r"\(((?:[^\s\"()\[\]{}]+ )+[^\s\"()\[\]{}]+)\)")


def too_much(grammar: str, most_characters: int = MOST_CHARACTERS) -> str | None:
    """Why `grammar`, as `str(xgrammar.Grammar)` writes it, is refused; None where it is not."""
    if len(grammar) > most_characters:
        return f"expands to {len(grammar)} characters of rules; use at most {most_characters}"
    rules = dict(_RULE.findall(grammar))
    optional = {name for name, body in rules.items() if body.startswith('("" | ')}
    for body in rules.values():
        for sequence in _SEQUENCE.findall(body):
            if (count := _longest_run(sequence.split(" "), optional)) > MOST_OPTIONALS:
                return f"has {count} optional parts in a row; use at most {MOST_OPTIONALS}"
    if reason := spoiled(rules):
        return reason
    for name in rules:
        levels, repeats = _nesting(name, rules)
        if levels > MOST_LEVELS:
            return f"repeats a repetition of a repetition, with nothing between; use at most {MOST_LEVELS} levels"
        if levels == MOST_LEVELS and repeats > MOST_REPEATS:
            return (
                f"repeats a repetition up to {repeats} times in all, with nothing between; use at most {MOST_REPEATS}"
            )
    return None


def _longest_run(names: list[str], optional: set[str]) -> int:
    longest = run = 0
    for name in names:
        run = run + 1 if name in optional else 0
        longest = max(longest, run)
    return longest


def _nesting(name: str, rules: dict[str, str]) -> tuple[int, int]:
    """How many repetitions stand directly in each other from this rule on, and the product of their bounds."""
    levels, repeats, seen = 0, 1, {name}
    while body := rules.get(name):
        if match := _BOUNDED.fullmatch(body):
            inner, levels, repeats = match[1], levels + 1, repeats * max(int(match[3]), 1)
        elif (match := _STAR.fullmatch(body) or _PLUS.fullmatch(body)) and match[2] == name:
            inner, levels = match[1], levels + 1
        elif match := _ALIAS.fullmatch(body):
            inner = match[1]
        else:
            break
        if inner in seen:
            break
        seen.add(inner)
        name = inner
    return levels, repeats
