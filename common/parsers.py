"""Which tool and reasoning parser a loaded model needs, where the caller has not said.

The families are data, in `parser_families.toml`; what decides is what the model itself shows: its chat template, its
vocabulary, its type. A parser is chosen only when vLLM can build it for this very tokenizer.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vllm.config import ModelConfig
from vllm.parser.parser_manager import HF_PARSER, ParserManager
from vllm.parser.response_template import resolve_response_template
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.hf import resolve_chat_template
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers import ToolParserManager
from vllm.utils.mistral import is_mistral_tokenizer

from common.errors import InvalidRequest
from common.wording import first_problem

# What a caller asks for who wants no parser, and none chosen.
NONE = "none"

Kind = Literal["tool", "reasoning"]


@dataclasses.dataclass(frozen=True)
class ParserChoice:
    """Names in vLLM's registries, None for no parser, and one sentence for the log that says why."""

    tool_parser: str | None
    reasoning_parser: str | None
    why: str
    beware: tuple[str, ...] = ()
    """What vLLM's own parsers get wrong badly enough to warn of."""


def tool_parser_names() -> list[str]:
    """What `tool_parser` may name, apart from "none"."""
    return sorted(ToolParserManager.list_registered())


def reasoning_parser_names() -> list[str]:
    """What `reasoning_parser` may name, apart from "none"."""
    return sorted(ReasoningParserManager.list_registered())


def choose_parsers(
    model_config: ModelConfig, tokenizer: TokenizerLike, *, tool_parser: str | None, reasoning_parser: str | None
) -> ParserChoice:
    """The parsers asked for, proved; for those not asked for (None or empty) the ones that the model shows it needs.

    "none" asks for no parser. Takes milliseconds, unless the model's processor must be loaded for its template.

    Raises:
        InvalidRequest: a parser asked for doesn't exist, doesn't fit the tokenizer or doesn't go with the other one.

    """
    model = _Model(model_config, tokenizer)
    tool, reasoning = (tool_parser or "").strip(), (reasoning_parser or "").strip()
    asked_tool = _asked(model, "tool", tool, tool_parser_names())
    asked_reasoning = _asked(model, "reasoning", reasoning, reasoning_parser_names())
    if asked_tool and asked_reasoning and (refusal := model.refusal(asked_tool, asked_reasoning)):
        raise InvalidRequest(
            "Options", f"tool_parser {tool!r} and reasoning_parser {reasoning!r} don't go together: {refusal}"
        )
    chosen_tool, tool_why = (asked_tool, "as asked") if tool else _choose(model, "tool", asked_reasoning)
    chosen_reasoning, reasoning_why = (
        (asked_reasoning, "as asked") if reasoning else _choose(model, "reasoning", chosen_tool)
    )
    return ParserChoice(
        chosen_tool,
        chosen_reasoning,
        f"tool parser {chosen_tool or NONE} ({tool_why}), "
        f"reasoning parser {chosen_reasoning or NONE} ({reasoning_why})",
        tuple(_harm("tool", chosen_tool)) + tuple(_harm("reasoning", chosen_reasoning)),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of `parser_families.toml`, which says what the fields mean."""

    parser: str
    model: Sequence[str] = ()
    template: Sequence[str] = ()
    without: Sequence[str] = ()
    tokens: Sequence[str] = ()
    marker: str = ""
    decodes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    opens: str = ""
    switches: str = ""
    renderer: str = ""

    def holds(self, model: "_Model") -> bool:
        """Whether the model meets all conditions; the cheap ones are looked at first."""
        return (
            (not self.renderer or self.renderer == model.renderer)
            and (not self.model or not model.types.isdisjoint(self.model))
            and all(mark in model.template for mark in self.template)
            and not any(mark in model.template for mark in self.without)
            and all(token in model.vocabulary for token in self.tokens)
            and self.marker in model.template
            and (not self.marker or {self.marker, _end(self.marker)} <= model.vocabulary.keys())
            and all(model.decodes(ids, text) for text, ids in self.decodes.items())
            and (not self.opens or model.leaves_open(self.opens))
            and (not self.switches or model.switches(self.switches))
        )

    @property
    def evidence(self) -> str:
        """The conditions in words."""
        words = []
        if self.renderer:
            words.append(f"vLLM writes the prompts itself in tokenizer mode {self.renderer}")
        if self.model:
            words.append(f"the model is {' or '.join(self.model)}")
        if marks := [self.marker, *self.template] if self.marker else self.template:
            words.append(f"the chat template has {', '.join(marks)}")
        if written := self.opens or self.switches:
            words.append(f"it writes {written} into the prompt")
        if tokens := [self.marker, _end(self.marker)] if self.marker else self.tokens:
            words.append(f"the vocabulary has {', '.join(tokens)}")
        return " and ".join(words)


@functools.cache
def families() -> dict[Kind, list[Family]]:
    """The table, in the order in which it is searched."""
    table = _table()
    return {
        "tool": [Family(**row) for row in table["tool"]],
        "reasoning": [Family(**row) for row in table["reasoning"]],
    }


@functools.cache
def _table() -> dict[str, Any]:
    with Path(__file__).with_name("parser_families.toml").open("rb") as file:
        return tomllib.load(file)


def _harm(kind: Kind, parser: str | None) -> Iterator[str]:
    if harm := _table()["beware"][kind].get(parser):
        yield f"{kind} parser {parser}: {harm}; {kind}_parser:{NONE} leaves the text as it is"


class _Model:
    """What a loaded model shows of itself."""

    def __init__(self, config: ModelConfig, tokenizer: TokenizerLike) -> None:
        self.tokenizer: Any = tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._config = config
        hf_config = config.hf_config
        self.renderer = "mistral" if is_mistral_tokenizer(tokenizer) else config.tokenizer_mode
        self.is_harmony = hf_config.model_type == "gpt_oss"
        self.types = frozenset(
            {hf_config.model_type, config.hf_text_config.model_type, *(getattr(hf_config, "architectures", None) or ())}
        )

    @functools.cached_property
    def _templates(self) -> tuple[str, str]:
        """The templates of a chat without tools and of one with them: some models have two."""
        if any(self.renderer == family.renderer for family in families()["tool"]):
            return "", ""
        resolve = functools.partial(resolve_chat_template, self.tokenizer, None, model_config=self._config)
        return resolve(tools=None) or "", resolve(tools=[{}]) or ""

    @property
    def template(self) -> str:
        return "\n".join(dict.fromkeys(self._templates))

    def decodes(self, ids: Sequence[int], text: str) -> bool:
        try:
            return bool(self.tokenizer.decode(list(ids)) == text)
        except Exception:  # noqa: BLE001  # ids that this vocabulary has not; tokenizers differ in what they raise
            return False

    def leaves_open(self, marker: str) -> bool:
        """Whether an answer begins inside of `marker`, as the prompt is written by default."""
        _, found, rest = self._prompt().rpartition(marker)
        return bool(found) and _end(marker) not in rest

    def switches(self, marker: str) -> bool:
        """Whether the prompt has `marker` with thinking on or off; where a template only cuts it off, it has not."""
        return any(marker in self._prompt(enable_thinking=on, thinking=on) for on in (True, False))

    def _prompt(self, **switches: bool) -> str:
        messages = [{"role": "user", "content": "Hi"}]
        try:
            prompt = self.tokenizer.apply_chat_template(
                messages, chat_template=self._templates[0], tokenize=False, add_generation_prompt=True, **switches
            )
        except Exception:  # noqa: BLE001  # whatever a foreign template raises, it shows nothing
            return ""
        return str(prompt)

    def refusal(self, tool: str | None, reasoning: str | None) -> str | None:
        """Why vLLM can't parse this model's answers with these, or None: it can."""
        try:
            parser_class = ParserManager.get_parser(
                tool_parser_name=tool,
                reasoning_parser_name=reasoning,
                enable_auto_tools=True,
                model_name=self._config.model,
                is_harmony=self.is_harmony,
                tokenizer=self.tokenizer,
            )
            thinker = parser_class(self.tokenizer).reasoning_parser
        except Exception as error:  # noqa: BLE001  # each parser has its own way to refuse
            cause = error.__cause__ if isinstance(error, TypeError) else None  # vLLM's own words are of its flags
            return first_problem(cause if isinstance(cause, Exception) else error).rstrip(".")
        # Parsers of vLLM's newer kind tell thoughts by token ids, and don't look whether there are any; those of
        # Mistral's tokenizers may be text.
        if thinker is not None and thinker.engine_based_streaming and self.renderer != "mistral":
            markers = (thinker.reasoning_start_str, thinker.reasoning_end_str)
            missing = [marker for marker in markers if marker and marker not in self.vocabulary]
            if missing:
                return f"{', '.join(missing)} is not in the vocabulary"
        return None


def _asked(model: _Model, kind: Kind, name: str, valid: list[str]) -> str | None:
    """The parser that the caller named, proved; None where it named none."""
    if name in ("", NONE):
        return None
    pair = (name, None) if kind == "tool" else (None, name)
    problem = "doesn't exist" if name not in valid else model.refusal(*pair)
    if problem is None:
        return name
    if name in valid:
        problem = f"doesn't fit this model: {problem}"
    raise InvalidRequest("Options", f"{kind}_parser {name!r} {problem}; valid names are {', '.join([*valid, NONE])}")


def _choose(model: _Model, kind: Kind, other: str | None) -> tuple[str | None, str]:
    """The first candidate that goes with the other parser, and why."""
    passed_over = ""
    for name, evidence in _candidates(model, kind, other):
        refusal = model.refusal(*((name, other) if kind == "tool" else (other, name)))
        if refusal is None:
            return name, evidence + passed_over
        passed_over += f"; not {name}: {refusal}"
    return None, f"nothing in the model shows that it needs one{passed_over}"


def _candidates(model: _Model, kind: Kind, other: str | None) -> Iterator[tuple[str, str]]:
    # vLLM parses with a response template alone or without it, so `hf` goes with itself or with nothing.
    if other in (None, HF_PARSER) and resolve_response_template(model.tokenizer) is not None:
        yield HF_PARSER, "the tokenizer carries a response template"
    if other != HF_PARSER:
        yield from ((family.parser, family.evidence) for family in families()[kind] if family.holds(model))


def _end(marker: str) -> str:
    return marker.replace("<", "</", 1)
