"""Entries of `Options`: whose they are, and in which forms they come. What they do to a load: test_engine_args."""

from pathlib import Path

import pytest

from common.errors import InvalidRequest
from common.options import flag_values, split_options

FIELDS = {"max_model_len", "enforce_eager", "enable_prefix_caching"}


@pytest.mark.parametrize(
    ("entry", "flag"),
    [
        ("--max-model-len:128", ("--max-model-len", "128")),
        ("--max-model-len=128", ("--max-model-len", "128")),
        ("--max-model-len 128", ("--max-model-len", "128")),
        ("--max_model_len:128", ("--max-model-len", "128")),
        (" --enforce-eager ", ("--enforce-eager", None)),
    ],
)
def test_flags_in_every_form(entry: str, flag: tuple[str, str | None]) -> None:
    assert split_options([entry], "") == ({}, [flag])


@pytest.mark.parametrize("spelling", ["--tool-parser", "--tool-call-parser", "--tool_parser"])
def test_a_users_spelling_beats_an_appended_default(spelling: str) -> None:
    for entries in ([f"{spelling}:a", "tool_parser:b"], ["tool_parser:b", f"{spelling}=a"]):
        assert split_options(entries, "") == ({"tool_parser": "a"}, [])


def test_a_companion_file_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    assert split_options(["vae:vae"], str(tmp_path)) == ({}, [])
    with pytest.raises(InvalidRequest, match="tool_parser"):
        split_options(["vae:other"], str(tmp_path))


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        (("--max-model-len", "1k"), {"max_model_len": 1000}),
        (("--enforce-eager", None), {"enforce_eager": True}),
        (("--enforce-eager", "false"), {"enforce_eager": False}),
        (("--no-enable-prefix-caching", None), {"enable_prefix_caching": False}),
    ],
)
def test_values_as_vllms_command_line_reads_them(flag: tuple[str, str | None], values: dict[str, object]) -> None:
    assert flag_values([flag], FIELDS) == values


@pytest.mark.parametrize(
    ("flag", "words"), [(("--max-modl-len", "1"), "--max-model-len"), (("--max-model-len", "many"), "--max-model-len")]
)
def test_flags_that_cannot_be_used(flag: tuple[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        flag_values([flag], FIELDS)
    assert caught.value.field == "Options"


@pytest.mark.timeout(30)  # it took an hour
def test_blanks_within_a_value() -> None:
    value = "a" + " " * 1_000_000 + "b"
    assert split_options([f"tool_parser: {value} "], "") == ({"tool_parser": value}, [])


@pytest.mark.parametrize("entry", ["c" * 1_000_000 + ":d", "c" * 1_000_000], ids=["value", "flag"])
def test_a_long_entry_is_not_repeated(entry: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        split_options([entry], "")
    assert len(str(caught.value)) < 300
