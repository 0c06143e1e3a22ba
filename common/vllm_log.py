"""vLLM's own log lines, where they would tell what a prompt or an answer says.

Its parsers log what they can't read, the answer or a part of it, and its renderers what a chat template says of the
messages that it refuses: as an argument of the line, or in an exception's text.
"""

import logging

# Whose lines may hold some of a prompt or an answer.
_READERS = ("vllm.tool_parsers", "vllm.reasoning", "vllm.parser", "vllm.renderers")


class TextsLeftOut(logging.Filter):
    """Takes the values out of their lines above DEBUG; a warning at most: the mistake is a model's or a caller's."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        if record.levelno > logging.DEBUG and record.name.startswith(_READERS):
            if record.args:
                record.msg, record.args = f"{record.msg} (values left out)", None
            if record.exc_info and record.exc_info[0] is not None:
                record.msg, record.exc_info = f"{record.msg}: {record.exc_info[0].__name__}", None
                record.exc_text = None
            if record.levelno > logging.WARNING:
                record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


def leave_texts_out() -> None:
    """From now on, in this process; vLLM, which makes its handler with its first line, must have logged something."""
    for handler in logging.getLogger("vllm").handlers + logging.getLogger().handlers:
        if not any(isinstance(old, TextsLeftOut) for old in handler.filters):
            handler.addFilter(TextsLeftOut())
