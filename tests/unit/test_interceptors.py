"""What becomes of a request's bytes before anything else looks at them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.interceptors import MOST_VALUES, _forgiving, _is_crowded, _Unread
from common.pb import backend_pb2 as pb

FILLING = "x" * (5 * 2**20)
read: Any = _forgiving(pb.PredictOptions.FromString)


def test_more_values_than_any_request_needs() -> None:
    options = pb.PredictOptions(Prompt=FILLING, Messages=[pb.Message()] * (MOST_VALUES - 1))
    assert read(options.SerializeToString()) == options
    options.Messages.add()
    refused = read(options.SerializeToString())
    assert isinstance(refused, _Unread)
    assert str(refused.error) == "request: has more than 100000 values in its fields; use at most so many"


def test_numbers_are_one_value() -> None:
    request = pb.DetokenizeRequest(tokens=range(2_000_000))
    assert _forgiving(pb.DetokenizeRequest.FromString)(request.SerializeToString()) == request


def test_every_kind_of_field_is_counted() -> None:
    one = pb.PredictOptions(Seed=1, Temperature=0.5, Prompt="a", Metadata={"a": "b"}).SerializeToString()
    assert not _is_crowded(one * (MOST_VALUES // 4))
    assert _is_crowded(one * (MOST_VALUES // 4) + one)


def test_what_is_in_a_group_is_counted() -> None:
    group, messages = b"\x0b\x0c", pb.PredictOptions(Messages=[pb.Message()] * MOST_VALUES).SerializeToString()
    assert pb.PredictOptions.FromString(group).ByteSize() == len(group)
    assert _is_crowded(group + messages)
    assert not _is_crowded(group + messages[: -3 * 2])


@pytest.mark.parametrize("part", [b"\xff", b"\x0b", b"\x0a", b"\x0a\xff\xff\xff\xff\x7f", b"\x80"])
def test_what_is_no_message_is_refused_as_such(part: bytes) -> None:
    refused = read(part + b"\xff" * (5 * 2**20))
    assert isinstance(refused, _Unread)
    assert "not a message" in str(refused.error)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Small ones are not counted, so a prefix of them is what a large one begins with."""
    refused = read(data + pb.PredictOptions(Prompt=FILLING).SerializeToString())
    assert isinstance(refused, pb.PredictOptions | _Unread)
