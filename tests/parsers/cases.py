"""What the formats are tried with: the same few conversations for all, written as each format writes them."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Arguments = dict[str, Any]
Call = tuple[str, Arguments]

WEATHER: Call = ("get_weather", {"city": "Paris"})
TIME: Call = ("get_time", {"zone": "Europe/Rome", "utc": False})
NESTED: Call = (
    "make_event",
    {
        "title": "Fête à 東京 🎉",
        "guests": [{"name": "Zoë", "tags": ["a", "b"]}, {"name": "Ян", "tags": []}],
        "when": {"day": 3, "exact": True, "hour": 9.5},
        "note": 'first line\nsecond "line"',
    },
)
# Spelt out as some models write what isn't ASCII, the emoji as the two halves of a surrogate pair.
ESCAPED: Call = ("get_weather", {"city": "x 😀 é y"})
_SPELT = (("😀", r"\ud83d\ude00"), ("é", r"\u00e9"))
PLAIN = "Grüße aus 東京! 👋 1 < 2."
BEFORE = "I will look."
THOUGHT = "The user asks for the weather.\nSo I look: déjà vu 🤔."


def _tool(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


_TEXT = {"type": "string"}
TOOLS = [
    _tool("get_weather", city=_TEXT),
    _tool("get_time", zone=_TEXT, utc={"type": "boolean"}),
    _tool(
        "make_event",
        title=_TEXT,
        guests={
            "type": "array",
            "items": {"type": "object", "properties": {"name": _TEXT, "tags": {"type": "array", "items": _TEXT}}},
        },
        when={
            "type": "object",
            "properties": {"day": {"type": "integer"}, "exact": {"type": "boolean"}, "hour": {"type": "number"}},
        },
        note=_TEXT,
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a family of models writes its answers.

    Attributes:
        tool: names of the tool parsers that read it.
        reasoning: names of the reasoning parsers that read it.
        tool_partner: the tool parser that goes with its reasoning parsers, where it has none of its own.
        reasoning_partner: the reasoning parser that goes with its tool parsers, where it has none of its own.
        special: tokens of their own that a detokenizer may skip.
        added: tokens of their own that count as text.
        tokenizer: what else its tokenizer needs: arguments of `make_tokenizer`.
        model_type: of the checkpoint's configuration, where vLLM goes by it.
        stops: tokens that end an answer, where its text shows them.
        prompt: the end of the rendered prompt, where the model is not to think.
        thinking_prompt: the same where it is.
        default_prompt: the same where the request doesn't say, if that is neither of them or can't be told from kwargs.
        kwargs: `chat_template_kwargs` where the model is not to think.
        thinking_kwargs: the same where it is.
        calls: writes calls; None for a format without.
        parallel: more than one call in an answer is part of the format.
        text_first: text before the calls is part of the format.
        answer: writes the text for the reader.
        opening: the same where calls follow.
        before: what stands between text and calls.
        think: writes a thought, up to what follows it; None for a format without.
        no_thought: what a model writes that is not to think, or has nothing to think.
        reply: writes the text after a thought.
        lead: the same where calls follow the text.
        before_calls: what stands between a thought and calls.
        after_calls: what ends an answer with a thought and calls.
        apart: the parser takes the thought out of the text, rather than marking it in there.
        note: tells formats apart that have the same parser.

    """

    tool: tuple[str, ...] = ()
    reasoning: tuple[str, ...] = ()
    tool_partner: str = ""
    reasoning_partner: str = ""
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_type: str = "llama"
    stops: tuple[str, ...] = ()
    prompt: str = "hello\n"
    thinking_prompt: str = "hello\n"
    default_prompt: str = ""
    kwargs: Arguments = dataclasses.field(default_factory=dict)
    thinking_kwargs: Arguments = dataclasses.field(default_factory=dict)
    calls: Callable[[Sequence[Call]], str] | None = None
    parallel: bool = True
    text_first: bool = True
    answer: Callable[[str], str] = str
    opening: Callable[[str], str] | None = None
    before: str = ""
    think: Callable[[str], str] | None = None
    no_thought: str = ""
    reply: Callable[[str], str] | None = None
    lead: Callable[[str], str] | None = None
    before_calls: str = ""
    after_calls: str = ""
    apart: bool = True
    note: str = ""

    @property
    def partners(self) -> tuple[str, str]:
        """The tool and the reasoning parser that read an answer with both; empty where the format lacks one."""
        return self.tool_partner or next(iter(self.tool), ""), self.reasoning_partner or next(iter(self.reasoning), "")

    @property
    def usual_prompt(self) -> str:
        """The end of the rendered prompt where the request says nothing of thinking."""
        on_request = self.thinking_kwargs and not self.kwargs
        return self.default_prompt or (self.prompt if on_request else self.thinking_prompt)

    @property
    def opens_thought(self) -> bool:
        """That prompt has the marker before a thought."""
        assert self.think is not None
        return self.usual_prompt == self.thinking_prompt and self.think(THOUGHT).lstrip().startswith(THOUGHT)

    @property
    def writes_literals(self) -> bool:
        """Strings in calls are JSON's or Python's, with their escapes."""
        assert self.calls is not None
        return r"\\" in self.calls([("f", {"k": "\\"})])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One answer and what it says."""

    raw: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    cut: bool = False
    """The answer ran into the limit of tokens."""
    thinks: bool | None = False
    """The prompt asked the model to think; None: the request doesn't say."""
    either: bool = False
    """The text may as well count as reasoning, if streams and the whole answer agree."""


def _cut(raw: str, after: str) -> str:
    return raw[: raw.index(after) + len(after)]


def _spelt(text: str) -> str:
    for character, escapes in _SPELT:
        text = text.replace(character, escapes)
    return text


def tool_cases(form: Format) -> dict[str, Case]:
    """The cases of a tool parser, read without a reasoning parser."""
    assert form.calls is not None
    one = form.calls([WEATHER])
    escaped = [ESCAPED, TIME] if form.parallel else [ESCAPED]
    cases = {
        "plain": Case(raw=form.answer(PLAIN), content=PLAIN),
        "one": Case(raw=one, calls=(WEATHER,)),
        "two": Case(raw=form.calls([WEATHER, TIME]), calls=(WEATHER, TIME)),
        "after text": Case(
            raw=(form.opening or form.answer)(BEFORE) + form.before + one, content=BEFORE, calls=(WEATHER,)
        ),
        "nested": Case(raw=form.calls([NESTED]), calls=(NESTED,)),
        "escapes": Case(raw=_spelt(form.calls(escaped)), calls=tuple(escaped)),
        "cut": Case(raw=_cut(one, "Par"), calls=(WEATHER,), cut=True),
    }
    if not form.writes_literals:
        del cases["escapes"]
    if not form.parallel:
        del cases["two"]
    if not form.text_first:
        del cases["after text"]
    return cases


def reasoning_cases(form: Format) -> dict[str, Case]:
    """The cases of a reasoning parser, read without a tool parser."""
    assert form.think is not None
    thought, reply = form.think(THOUGHT), form.reply or form.answer
    cut = _cut(thought, "weather")
    if not form.apart:
        return {
            "no markers": Case(raw=PLAIN, content=f"<think>{PLAIN}", thinks=None),
            "thought": Case(raw=thought + reply(PLAIN), content=f"<think>{thought}{reply(PLAIN)}", thinks=True),
            "cut": Case(raw=cut, content=f"<think>{cut}", cut=True, thinks=True),
        }
    return {
        "plain": Case(raw=form.no_thought + (reply if form.no_thought else form.answer)(PLAIN), content=PLAIN),
        "no markers": Case(raw=PLAIN, content=PLAIN, thinks=None, either=form.opens_thought),
        "thought": Case(raw=thought + reply(PLAIN), reasoning=THOUGHT, content=PLAIN, thinks=True),
        "cut": Case(raw=cut, reasoning=_cut(THOUGHT, "weather"), cut=True, thinks=True),
    }


def both_cases(form: Format) -> dict[str, Case]:
    """The cases of a pair of parsers."""
    assert form.think is not None
    assert form.calls is not None
    thought, calls = form.think(THOUGHT), [WEATHER, TIME] if form.parallel else [WEATHER]
    lead = (form.lead or form.reply or form.answer)(BEFORE)
    inside = "" if form.apart else f"<think>{thought}"
    reasoning = THOUGHT if form.apart else ""
    cases = {
        "thought, call": Case(
            raw=thought + form.before_calls + form.calls([WEATHER]) + form.after_calls,
            content=inside,
            reasoning=reasoning,
            calls=(WEATHER,),
            thinks=True,
        ),
        "thought, text, calls": Case(
            raw=thought + lead + form.before + form.calls(calls) + form.after_calls,
            content=inside + BEFORE,
            reasoning=reasoning,
            calls=tuple(calls),
            thinks=True,
        ),
    }
    if not form.text_first:
        del cases["thought, text, calls"]
    return cases


def dumps(value: Any) -> str:
    """JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)
