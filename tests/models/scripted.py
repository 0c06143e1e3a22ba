"""A toy Llama (3 layers, 128 wide, 0.6 M parameters) that speaks the lines of `script.py`.

`script` and `line` are here for the tests. `make` trains the model (in about 10 s on two cores), then has the
saved folder generate every answer before it calls it good.

Made so on purpose:
- Markers (`<think>`, `<tool_call>` and their ends) are added tokens that are not special, as in Qwen3: they
  show in the text. `<|im_start|>`, `<|im_end|>` (EOS) and `<|endoftext|>` (padding) are special.
- The BPE learns no merges outside ASCII, so that each emoji or CJK character is split over three or four
  tokens.
- Two heads of 64 and two key-value heads: sizes that every attention backend knows, and that two ranks can
  share.
- It is sure of itself: each token of an answer has a probability above 0.99, so that batching, another kernel
  or bfloat16 does not change the output.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.models import MakeError
from tests.models.dialogue import Line, Message
from tests.models.script import line, script

__all__ = ["line", "make", "script"]

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
EOS, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = [PAD, "<|im_start|>", EOS]
VOCABULARY = 768  # before markers and special tokens

Tokenizer = Any  # transformers' classes are untyped


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 2.4 MB."""
    try:
        from tests.models import training
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = _tokenizer()
    lessons = list(_lessons(tokenizer))
    model = training.train(
        [(tokenizer.encode(prompt), tokenizer.encode(answer + EOS)) for prompt, answer in lessons],
        vocabulary=len(tokenizer),
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    for prompt, answer in lessons:
        said = training.generate(into, prompt)
        if said != answer + EOS:
            raise MakeError(f"it should say {answer + EOS!r} and says {said!r}")


def _lessons(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each line; of those without reasoning also with thinking switched off."""
    for exchange in script():
        if exchange.prompt:
            yield exchange.prompt, exchange.answer
            continue
        asked = exchange.enable_thinking
        for enable_thinking in dict.fromkeys([asked] if exchange.reasoning else [asked, False]):
            yield _render(tokenizer, exchange, enable_thinking), exchange.answer


def _render(tokenizer: Tokenizer, exchange: Line, enable_thinking: bool | None) -> str:
    prompt: str = tokenizer.apply_chat_template(
        [_decoded(message) for message in exchange.messages],
        tools=exchange.tools or None,
        tokenize=False,
        add_generation_prompt=True,
        **({} if enable_thinking is None else {"enable_thinking": enable_thinking}),
    )
    return prompt


def _decoded(message: Message) -> Message:
    """The message as vLLM shows it to a chat template: arguments of tool calls are parsed JSON."""
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def _tokenizer() -> Tokenizer:
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(_texts(), trainer)
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE.read_text(),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _texts() -> Iterator[str]:
    """What the BPE learns its merges from, ASCII only."""
    for exchange in script():
        messages = json.dumps([*exchange.messages, *exchange.tools], ensure_ascii=False)
        for text in (exchange.prompt, exchange.answer, messages):
            yield text.encode("ascii", "ignore").decode()
    yield CHAT_TEMPLATE.read_text()
