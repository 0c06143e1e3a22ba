"""What a prompt or an answer says stays out of the log, whatever vLLM's renderers and parsers make of it."""

import io
import logging
from collections.abc import Iterator

import pytest

from common.vllm_log import TextsLeftOut, leave_texts_out

SAID = "what the model said, or its user"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What vLLM's handler writes, with our filter on it."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("vllm")
    before, level = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG)
    leave_texts_out()
    leave_texts_out()
    assert len(handler.filters) == 1
    yield written
    logger.handlers = before
    for other in logging.getLogger().handlers:
        other.filters = [old for old in other.filters if not isinstance(old, TextsLeftOut)]
    logger.setLevel(level)


@pytest.mark.parametrize(
    "room", ["vllm.tool_parsers.llama_tool_parser", "vllm.reasoning.x", "vllm.parser.y", "vllm.renderers.hf"]
)
def test_values_are_left_out(log: io.StringIO, room: str) -> None:
    logging.getLogger(room).warning("Regex timeout occurred when matching: %s", SAID)
    assert log.getvalue() == "WARNING Regex timeout occurred when matching: %s (values left out)\n"


@pytest.mark.parametrize("room", ["vllm.tool_parsers.hermes", "vllm.renderers.mistral"])
def test_the_text_of_an_exception_is_left_out(log: io.StringIO, room: str) -> None:
    logger = logging.getLogger(room)
    logger.error("Error in extracting tool call", exc_info=ValueError(SAID))
    assert log.getvalue() == "WARNING Error in extracting tool call: ValueError\n"


def test_debug_and_others_stay(log: io.StringIO) -> None:
    logging.getLogger("vllm.tool_parsers.hermes").debug("saw %s", SAID)
    logging.getLogger("vllm.config").warning("max_model_len %d", 7)
    assert log.getvalue() == f"DEBUG saw {SAID}\nWARNING max_model_len 7\n"
