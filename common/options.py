"""`ModelOptions.Options` -> the backend's own options and vLLM's flags."""

import dataclasses
import logging
import os
import re
from argparse import Action, ArgumentParser
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from vllm import AsyncEngineArgs
from vllm.engine.arg_utils import _expand_json_human_readable_numbers
from vllm.utils.argparse_utils import FlexibleArgumentParser

from common.engine_fields import checked
from common.errors import InvalidRequest
from common.json_values import check_depth, parse_json
from common.wording import closest, first_problem

logger = logging.getLogger(__name__)

# Backend options, and the dashed spellings that mean the same.
TOOL_PARSER_FLAGS = ("--tool-parser", "--tool-call-parser")
REASONING_PARSER_FLAGS = ("--reasoning-parser",)
BACKEND_OPTIONS = (
    "tool_parser",
    "reasoning_parser",
    "ignore_seed",
    "pooling",
    "rank_timeout",
    "score_template",
    "gguf",
)


def split_options(entries: Iterable[str], model_path: str) -> tuple[dict[str, str], list[tuple[str, str | None]]]:
    """The backend's own options, and vLLM's flags as (flag, value or None)."""
    own: dict[str, str] = {}
    spelled: dict[str, str] = {}
    flags: list[tuple[str, str | None]] = []
    for entry in entries:
        name, separator, value = _partition(entry)
        if name.startswith("--"):
            flag = name.replace("_", "-")
            if flag in TOOL_PARSER_FLAGS:
                spelled["tool_parser"] = value
            elif flag in REASONING_PARSER_FLAGS:
                spelled["reasoning_parser"] = value
            else:
                flags.append((flag, value if separator else None))
        elif name in BACKEND_OPTIONS:
            own[name] = value
        elif value and model_path and os.path.exists(os.path.join(model_path, value)):
            # The orchestrator names the files it has fetched beside the model in this form; vLLM needs none of them.
            logger.info("Options: %s is a companion file of the model; not used", entry)
        else:
            raise InvalidRequest("Options", f"{entry[:80]!r} is unknown{closest(name, BACKEND_OPTIONS)}")
    return own | spelled, flags


def flag_values(flags: list[tuple[str, str | None]], fields: Collection[str]) -> dict[str, Any]:
    """The engine arguments that flags of vLLM's command line set, of those in `fields`.

    Raises:
        InvalidRequest: a flag that vLLM lacks, or a value that it refuses.

    """
    if not flags:
        return {}
    parser: ArgumentParser = AsyncEngineArgs.add_cli_args(_FlagParser(add_help=False))
    known: dict[str, Action] = parser._option_string_actions  # argparse has no public look-up
    args: dict[str, Any] = {}
    for flag, value in flags:
        action = known.get(flag)
        if action is None or action.dest not in fields:
            raise InvalidRequest("Options", f"{flag} is not a flag of vLLM 0.32{closest(flag, known)}")
        if action.nargs == 0 and value is not None and value.lower() in ("true", "false"):
            # YAML has no bare flags: `--enforce-eager:false` is how they are switched off there.
            args[action.dest] = (value.lower() == "true") != flag.startswith("--no-")
            continue
        try:
            parsed = parser.parse_args([flag] if value is None else [flag, *_words(action, value)])
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidRequest("Options", f"{flag}: {first_problem(error)}") from error
        except RecursionError:
            raise InvalidRequest("Options", f"{flag}: its JSON is nested too deep") from None
        result = getattr(parsed, action.dest)
        if dataclasses.is_dataclass(result):
            # As it was written: followers are told it, and some of vLLM's objects are not equal when made twice.
            where = f"Options[{flag!r}]"
            written = parse_json(where, _expand_json_human_readable_numbers(value or ""))
            result = checked(where, action.dest, written)
        check_depth("Options", result)
        args[action.dest] = result
    return args


def _partition(entry: str) -> tuple[str, str, str]:
    """`--flag:value`, `--flag=value`, `--flag value` or `key:value` -> (name, separator, value)."""
    # No lazy group before blanks: it would look at a run of them once for each.
    match = re.match(r"\s*([\w.-]+)\s*([:=]|\s|$)(.*)", entry, re.DOTALL)
    if not match:
        raise InvalidRequest("Options", f"{entry[:80]!r} is not of the form key:value, --flag or --flag:value")
    return match[1], match[2], match[3].strip()


class _FlagParser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is untyped to us
    """vLLM's own command line, raising where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _words(action: Action, value: str) -> list[str]:
    return value.split() if action.nargs in ("+", "*") and not value.startswith(("{", "[")) else [value]
