"""vLLM's own log lines, where they would tell what a model said.

Its parsers log what they can't read: the answer, or a part of it, as an argument of the line or in an exception's text.
"""

import logging

_PARSERS = ("vllm.tool_parsers", "vllm.reasoning", "vllm.parser")


class AnswersLeftOut(logging.Filter):
    """Takes the values out of what parsers log above DEBUG; a warning at most, since the mistake is the model's."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        if record.levelno > logging.DEBUG and record.name.startswith(_PARSERS):
            if record.args:
                record.msg, record.args = f"{record.msg} (values left out)", None
            if record.exc_info and record.exc_info[0] is not None:
                record.msg, record.exc_info = f"{record.msg}: {record.exc_info[0].__name__}", None
                record.exc_text = None
            if record.levelno > logging.WARNING:
                record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


def leave_answers_out() -> None:
    """From now on, in this process; vLLM, which makes its handler with its first line, must have logged something."""
    for handler in logging.getLogger("vllm").handlers + logging.getLogger().handlers:
        if not any(isinstance(old, AnswersLeftOut) for old in handler.filters):
            handler.addFilter(AnswersLeftOut())
