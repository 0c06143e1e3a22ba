"""One record, one line, whatever is in it."""

import asyncio
import datetime
import json
import logging
import sys
from typing import Any

import pytest

from backend.logs import JsonFormatter, TextFormatter, hide_header_value
from common.request_context import request_id

TEXT = TextFormatter("%(levelname)s [%(name)s] %(message)s")
JSON = JsonFormatter()
AWKWARD = [
    "a\nb",
    "a\r\nb",
    "a\rb",
    "\x1b[31mred",
    "a\x85b",
    "a\u2028b\u2029",
    "nul\0",
    "half \udfff",
    "tab\t'quotes\"\\",
]


def record(message: str, *args: Any, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("backend.x", logging.WARNING, __file__, 1, message, args, None)
    vars(made).update(fields)
    return made


def failure() -> Any:
    try:
        int("first\nsecond")
    except ValueError:
        return sys.exc_info()


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
@pytest.mark.parametrize("formatter", [TEXT, JSON], ids=["text", "json"])
def test_one_line(formatter: logging.Formatter, text: str) -> None:
    for made in (record("%s", text), record(text), record("x", request_id=text)):
        line = formatter.format(made)
        assert len((line + "\n").splitlines()) == 1
        assert "\x1b" not in line
        assert "\0" not in line


def test_text() -> None:
    assert TEXT.format(record("%d of %s", 3, "a\nb")) == "WARNING [backend.x] 3 of a\\nb"
    assert TEXT.format(record("東京\tüber")) == "WARNING [backend.x] 東京\tüber"


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_json_gives_the_message_back(text: str) -> None:
    assert json.loads(JSON.format(record("%s", text)))["message"] == text


def test_json_fields() -> None:
    line = json.loads(JSON.format(record("hello", created=1_700_000_000.25)))
    assert line == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "backend.x",
        "message": "hello",
    }
    assert datetime.datetime.fromisoformat(line["time"]).tzinfo is datetime.UTC


def test_a_traceback_is_part_of_the_line() -> None:
    made = record("failed", exc_info=failure())
    assert len(TEXT.format(made).splitlines()) == 1
    assert "Traceback (most recent call last):\\n" in TEXT.format(made)
    assert json.loads(JSON.format(made))["exception"].startswith("Traceback (most recent call last):\n")


async def test_the_request_of_the_task_that_logs() -> None:
    def both() -> tuple[str, str]:
        return TEXT.format(record("x")), json.loads(JSON.format(record("x"))).get("request_id", "")

    async def serve() -> tuple[str, str]:
        request_id.set("req-7")
        return await asyncio.to_thread(both)

    assert await asyncio.create_task(serve()) == ("WARNING [backend.x] x (request req-7)", "req-7")
    assert both() == ("WARNING [backend.x] x", "")
    assert json.loads(JSON.format(record("x", request_id="own")))["request_id"] == "own"
    assert len(json.loads(JSON.format(record("x", request_id="i" * 5000)))["request_id"]) == 200


def test_header_values_stay_out() -> None:
    made = record("Invalid encoding on %s", b"Bearer s\xff", levelno=logging.ERROR, exc_info=failure())
    assert hide_header_value(made)
    assert "Bearer" not in TEXT.format(made)
    kept = record("Invalid argument %s", "a")
    assert hide_header_value(kept)
    assert TEXT.format(kept).endswith("Invalid argument a")
