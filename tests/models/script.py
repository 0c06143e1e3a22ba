"""The script of the *scripted* model: what it is asked, and its answers to the letter (greedy decoding).

It is asked with exactly these messages and tools; anything else gets an arbitrary mixture of these answers.
Chat lines end with `<|im_end|>`, the model's EOS; the raw line has no template and ends the same way.

What the chat template takes from a tool is its name, its description and the sorted names of its arguments,
so that a `tools` list which went through a program that sorts keys or adds fields gives the same prompt.

Lines that reason do so without being told, as Qwen3 does. A line that does not reason has the same answer
with thinking switched off (`enable_thinking=False`), which a test needs under a reasoning parser that takes
all before `</think>` for reasoning: vLLM's `qwen3` finds no content in such a line otherwise.
"""

from tests.models.dialogue import Call, Line, assistant, result, system, tool, user

WEATHER = tool(
    "get_weather",
    "Current weather of a city",
    ["city"],
    city={"type": "string"},
    unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
)
CALENDAR = tool(
    "add_event",
    "Add an event to the calendar",
    ["title", "when"],
    title={"type": "string"},
    when={
        "type": "object",
        "properties": {
            "date": {"type": "string"},
            "time": {"type": ["string", "null"]},
            "minutes": {"type": "integer"},
        },
    },
    guests={"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
    private={"type": "boolean"},
)

_PARIS = Call("get_weather", {"city": "Paris", "unit": "celsius"})
_TOKYO = Call("get_weather", {"city": "東京", "unit": "celsius"})

SCRIPT: tuple[Line, ...] = (
    Line(
        name="plain",
        chat=[user("What is the capital of France?")],
        content="The capital of France is Paris.",
    ),
    Line(
        name="system",
        chat=[system("You are a pirate."), user("Hello!")],
        content="Ahoy, matey! Welcome aboard my ship.",
    ),
    Line(
        name="history",
        chat=[user("My name is Ada."), assistant("Nice to meet you, Ada."), user("What is my name?")],
        content="Your name is Ada.",
    ),
    Line(
        name="reasoning",
        chat=[user("What is 17 times 3?")],
        reasoning="17 times 3 is 10 times 3 plus 7 times 3.\nThat is 30 plus 21.",
        content="17 times 3 is 51.",
    ),
    Line(
        name="no_thinking",
        chat=[user("What is 17 times 3?")],
        enable_thinking=False,
        content="It is 51.",
    ),
    Line(
        name="markup",
        chat=[user("Show me a list in HTML.")],
        content='So:\n\n```html\n<ul>\n  <li>1 < 2</li>\n\t<li id="b">"2"</li>\n</ul>\n```\n\nIt is <all>.',
    ),
    Line(
        name="json",
        chat=[user("Describe Paris as JSON.")],
        content='{"city": "Paris", "population": 2100000, "rivers": ["Seine"]}',
    ),
    Line(
        name="unicode",
        chat=[user("Greet the world 🌍!")],
        content="你好，世界！こんにちは 👋🏽 안녕, the family 👨‍👩‍👧‍👦 says hi 🇫🇷. Naïve café: 𝕏.",  # noqa: RUF001
    ),
    Line(
        name="long",
        chat=[user("Count to 135.")],
        content=", ".join(str(number) for number in range(1, 136)) + ".",
    ),
    Line(
        name="tool",
        chat=[user("What is the weather in Paris?")],
        toolbox=[WEATHER],
        tool_calls=[_PARIS],
    ),
    Line(
        name="two_tools",
        chat=[user("What is the weather in Paris and in Tokyo?")],
        toolbox=[WEATHER],
        tool_calls=[_PARIS, _TOKYO],
    ),
    Line(
        name="text_then_tool",
        chat=[user("Please check the weather in Paris.")],
        toolbox=[WEATHER],
        content="I will look that up for you.",
        tool_calls=[_PARIS],
    ),
    Line(
        name="reasoning_then_tool",
        chat=[user("Do I need a coat in Paris?")],
        toolbox=[WEATHER],
        reasoning="A coat depends on the weather, so I should ask for it.",
        tool_calls=[_PARIS],
    ),
    Line(
        name="nested_tool",
        chat=[user("Plan lunch with Zoë and 小明 on Friday.")],
        toolbox=[WEATHER, CALENDAR],
        tool_calls=[
            Call(
                "add_event",
                {
                    "title": 'Lunch "à la carte" 🍜 {1/2}',
                    "when": {"date": "2030-05-17", "time": None, "minutes": 90},
                    "guests": [{"name": "Zoë"}, {"name": "小明"}],
                    "private": False,
                },
            )
        ],
    ),
    Line(
        name="unused_tool",
        chat=[user("Thank you!")],
        toolbox=[WEATHER, CALENDAR],
        content="You are welcome.",
    ),
    Line(
        name="tool_result",
        chat=[user("What is the weather in Paris?"), assistant("", _PARIS), result(0, '{"celsius": 18}')],
        toolbox=[WEATHER],
        content="It is 18 degrees in Paris.",
    ),
    Line(
        name="two_tool_results",
        chat=[
            user("What is the weather in Paris and in Tokyo?"),
            assistant("", _PARIS, _TOKYO),
            result(0, '{"celsius": 18}'),
            result(1, '{"celsius": 25}'),
        ],
        toolbox=[WEATHER],
        content="It is 18 degrees in Paris and 25 degrees in 東京.",
    ),
    Line(
        name="raw",
        prompt="The quick brown fox",
        content=" jumps over the lazy dog, and the dog does not mind.",
    ),
)


def script() -> tuple[Line, ...]:
    """All lines."""
    return SCRIPT


def line(name: str) -> Line:
    """The line called `name`; KeyError if there is none."""
    return {line.name: line for line in SCRIPT}[name]
