"""Every parser of vLLM with every case of its format: we say what vLLM's server says, and that is right or known."""

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from tests.parsers.matrix import CELLS, Cell, known, result
from tests.parsers.report import PATH, report


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_says_what_the_model_said(cell: Cell) -> None:
    tried = result(cell)
    assert not tried.differences
    expected = {mode: fault for (name, mode), fault in known().items() if name == str(cell)}
    # Not less either: a defect that is gone leaves the list.
    assert tried.faults == expected


def test_every_parser_is_tried() -> None:
    registered = {
        "tool": set(ToolParserManager.list_registered()),
        "reasoning": set(ReasoningParserManager.list_registered()),
    }
    for kind, names in registered.items():
        assert {cell.parser for cell in CELLS if cell.kind == kind} == names


def test_no_known_defect_is_of_a_case_that_is_gone() -> None:
    assert {name for name, _ in known()} <= {str(cell) for cell in CELLS}


def test_report_is_fresh() -> None:
    assert PATH.read_text(encoding="utf-8") == report()
