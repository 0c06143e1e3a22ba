"""The fields of vLLM's `AsyncEngineArgs`: which there are, and values for them, checked by their types."""

import copy
import dataclasses
import typing
from typing import Any, cast

import pydantic
from vllm import AsyncEngineArgs

from common.errors import InvalidRequest
from common.json_values import parse_json
from common.wording import closest, first_problem

# One structured-output backend per engine: with "auto" the first odd request would fix it for all others.
STRUCTURED_OUTPUTS = {"backend": "xgrammar"}
FIELDS = {field.name: field for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")}


def engine_args_json(text: str) -> dict[str, Any]:
    """The JSON object of `ModelOptions.EngineArgs`, each value checked.

    Raises:
        InvalidRequest: no object, a field that doesn't exist, or a value that it can't have.

    """
    if not text.strip():
        return {}
    given = parse_json("EngineArgs", text)
    if not isinstance(given, dict):
        raise InvalidRequest("EngineArgs", f"must be a JSON object, not {type(given).__name__}")
    return {name: checked(f"EngineArgs[{name!r}]", name, value) for name, value in given.items()}


def checked(where: str, name: str, value: Any) -> Any:
    """`value` in the type of the engine argument `name`, which must exist; objects stay as they came."""
    field = FIELDS.get(name)
    if field is None:
        raise InvalidRequest(where, f"is not an engine argument of vLLM 0.32{closest(name, FIELDS)}")
    if value is None:
        if field.default is None:
            return None
        raise InvalidRequest(where, "must not be null")
    if name == "structured_outputs_config" and isinstance(value, dict):
        value = STRUCTURED_OUTPUTS | value
    try:
        if isinstance(value, dict) and as_config(name, value) is not value:
            return value  # checked; made anew for each engine
        typed = pydantic.TypeAdapter(cast("Any", field.type)).validate_python(value)
        return value if isinstance(value, dict | list) else typed
    except pydantic.ValidationError as error:
        raise InvalidRequest(where, f"{value!r}: {first_problem(error)}") from error
    except pydantic.PydanticUserError:
        return value  # a type that pydantic can't describe; vLLM checks it itself


def as_config(name: str, value: Any) -> Any:
    """A config object of vLLM for a JSON object, where the argument is one: some of these vLLM does not make itself.

    Made anew for each engine, since vLLM writes into them.
    """
    if not isinstance(value, dict):
        return value
    kinds = typing.get_args(FIELDS[name].type) or (FIELDS[name].type,)
    config = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if config is None or any(typing.get_origin(kind) is dict for kind in kinds):
        return value
    return pydantic.TypeAdapter(cast("Any", config)).validate_python(copy.deepcopy(value))
