"""What is asked of every system: the fleet that it belongs to, and one request."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAIN, TOOLS, REASONING, EMBED = "plain", "tools", "reasoning", "embed"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: the scenario, what the user says, how many tokens to answer with, streamed or whole."""

    scenario: str
    text: str
    tokens: int
    stream: bool

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        return [{"role": "user", "content": self.text}]

    @property
    def thinking(self) -> bool:
        """As the template is told."""
        return self.scenario == REASONING


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Systems that are loaded with one model at the same time.

    Attributes:
        model: a key of `tests.models.RECIPES`.
        engine: arguments of the engine, the same for all.
        parsers: names of vLLM's tool and reasoning parser, for those that parse.

    """

    model: Path
    engine: Mapping[str, Any]
    parsers: tuple[str, str] | None = None


def prompt_text(model: Path, ask: Ask) -> str:
    """The prompt as the engine sees it, by the model's own template."""
    if ask.scenario == EMBED:
        return ask.text
    tools = [TOOL] if ask.scenario == TOOLS else None
    text: str = _tokenizer(model).apply_chat_template(
        ask.messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=ask.thinking
    )
    return text


def prompt_ids(model: Path, ask: Ask) -> list[int]:
    """`prompt_text` in tokens."""
    return list(_tokenizer(model).encode(prompt_text(model, ask), add_special_tokens=ask.scenario == EMBED))


_tokenizers: dict[Path, Any] = {}


def _tokenizer(model: Path) -> Any:
    if model not in _tokenizers:
        from transformers import AutoTokenizer

        _tokenizers[model] = AutoTokenizer.from_pretrained(model)
    return _tokenizers[model]
