"""`Tools` and `ToolChoice` in every shape that the orchestrator's endpoints send them -> OpenAI's."""

from typing import Any, NoReturn

from common.errors import InvalidRequest
from common.json_values import parse_json

_CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}


def openai_tools(text: str) -> list[dict[str, Any]]:
    """The functions of a `Tools` field; empty when it is.

    Raises:
        InvalidRequest: not an array of OpenAI function tools.

    """
    if not text.strip():
        return []
    tools = parse_json("Tools", text)
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise InvalidRequest("Tools", "must be a JSON array of tools")
    return [_tool(f"Tools[{index}]", tool) for index, tool in enumerate(tools)]


def openai_tool_choice(text: str, tools: list[dict[str, Any]]) -> tuple[str | dict[str, Any], bool]:
    """`"auto"`, `"none"`, `"required"`, or OpenAI's object for one named function; and whether calls may be parallel.

    Takes JSON-quoted and bare words, OpenAI's and Anthropic's objects, and either of them encoded twice; `"auto"` when
    not given.

    Raises:
        InvalidRequest: another shape, or a function that is not among `tools`.

    """
    choice: Any = text.strip()
    for _ in range(3):  # bare, quoted, and quoted again
        if not isinstance(choice, str) or choice in _CHOICES or choice == "":
            break
        try:
            choice = parse_json("ToolChoice", choice)
        except InvalidRequest:
            _unknown(text)
    if choice is None or choice == "":
        return "auto", True
    if isinstance(choice, str):
        return _CHOICES.get(choice) or _unknown(text), True
    if not isinstance(choice, dict):
        _unknown(text)
    parallel = choice.get("disable_parallel_tool_use") is not True
    kind = choice.get("type")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    if isinstance(kind, str) and kind in _CHOICES and not name:
        return _CHOICES[kind], parallel
    if kind not in (None, "function", "tool") or not isinstance(name, str) or not name:
        _unknown(text)
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise InvalidRequest("ToolChoice", f"no function {name!r} in Tools; it has {', '.join(names) or 'none'}")
    return {"type": "function", "function": {"name": name}}, parallel


def _tool(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise InvalidRequest(where, 'must be {"type": "function", "function": {"name", "description", "parameters"}}')
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{where}.function.name", "must be a string that is not empty")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise InvalidRequest(f"{where}.function.parameters", "must be a JSON schema object, or null")
    kept = {key: function[key] for key in ("description", "parameters", "strict") if function.get(key) is not None}
    return {"type": "function", "function": {"name": name, **kept}}


def _unknown(text: str) -> NoReturn:
    shown = text if len(text) <= 80 else text[:80] + "…"
    raise InvalidRequest(
        "ToolChoice",
        f'{shown} is unknown; use auto, none, required, or {{"type": "function", "function": {{"name": …}}}}',
    )
