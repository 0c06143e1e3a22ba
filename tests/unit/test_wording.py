"""How problems are put into words."""

import pydantic
import pytest

from common.wording import closest, first_problem


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(""), "ValueError"),
        (KeyError("k"), "'k'"),
    ],
)
def test_one_line(error: Exception, words: str) -> None:
    assert first_problem(error) == words


def test_pydantic_without_its_framing() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(int).validate_python("many")
    words = first_problem(caught.value)
    assert "integer" in words
    assert "many" not in words
    assert "errors.pydantic.dev" not in words


def test_of_a_long_name_the_beginning_is_compared() -> None:
    name = "a" * 100
    assert closest(name + "b" * 1000, [name, *map(str, range(20))]) == f"; did you mean {name}?"


def test_the_nearest_name() -> None:
    assert closest("max_modl_len", ["dtype", "max_model_len"]) == "; did you mean max_model_len?"
    assert closest("zzz", ["dtype", "model"]) == "; use one of dtype, model"
    assert closest("zzz", [f"name{number}" for number in range(20)]) == ""
