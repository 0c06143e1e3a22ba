"""Whom a follower's command line names as its head."""

import pytest

from backend.follower import heads


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--data-parallel-address", "10.0.0.1"], {"--data-parallel-address": "10.0.0.1"}),
        (["--data-parallel-address=head"], {"--data-parallel-address": "head"}),
        (["--data_parallel_address", "head"], {"--data-parallel-address": "head"}),
        (["-dpa", "fd00::1"], {"--data-parallel-address": "fd00::1"}),
        (["--master-addr", "head", "--nnodes", "2"], {"--master-addr": "head"}),
        # What vLLM will refuse.
        (["--master-addr"], {}),
        (["--master-addr", "--headless"], {}),
    ],
)
def test_the_head_of_a_line(words: list[str], expected: dict[str, str]) -> None:
    assert heads(["serve", "model", "--headless", "--data-parallel-size", "2", *words]) == expected
