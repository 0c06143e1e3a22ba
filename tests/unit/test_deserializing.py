"""What becomes of a request's bytes before anything else looks at them."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from backend.deserializing import MOST_VALUES, Unread, forgiving, is_crowded
from common.pb import backend_pb2 as pb

FILLING = "x" * (5 * 2**20)
read: Any = forgiving(pb.PredictOptions.FromString)


def test_more_values_than_any_request_needs() -> None:
    options = pb.PredictOptions(Prompt=FILLING, Messages=[pb.Message()] * (MOST_VALUES - 1))
    assert read(options.SerializeToString()) == options
    options.Messages.add()
    refused = read(options.SerializeToString())
    assert isinstance(refused, Unread)
    assert str(refused.error) == "request: has more than 100000 values in its fields; use at most so many"


def test_numbers_are_one_value() -> None:
    request = pb.DetokenizeRequest(tokens=range(2_000_000))
    assert forgiving(pb.DetokenizeRequest.FromString)(request.SerializeToString()) == request


def test_every_kind_of_field_is_counted() -> None:
    one = pb.PredictOptions(Seed=1, Temperature=0.5, Prompt="a", Metadata={"a": "b"}).SerializeToString()
    one += b"\x09" + bytes(8)
    assert not is_crowded(one * (MOST_VALUES // 5))
    assert is_crowded(one * (MOST_VALUES // 5) + one)


def test_small_messages_are_not_counted() -> None:
    request = pb.RerankRequest(documents=["a"] * (MOST_VALUES + 1))
    assert forgiving(pb.RerankRequest.FromString)(request.SerializeToString()) == request


def test_what_is_in_a_group_is_counted() -> None:
    group, messages = b"\x0b\x0c", pb.PredictOptions(Messages=[pb.Message()] * MOST_VALUES).SerializeToString()
    assert pb.PredictOptions.FromString(group).ByteSize() == len(group)
    assert is_crowded(group + messages)
    assert is_crowded(group[:1] + messages + group[1:])
    assert not is_crowded(group + messages[: -3 * 2])


@pytest.mark.parametrize("part", [b"\xff", b"\x0b", b"\x0a", b"\x0a\xff\xff\xff\xff\x7f", b"\x80"])
def test_what_is_no_message_is_refused_as_such(part: bytes) -> None:
    refused = read(part + b"\xff" * (5 * 2**20))
    assert isinstance(refused, Unread)
    assert "not a message" in str(refused.error)


@given(st.binary(max_size=200))
@example(b"\x80")
@example(b"\x08")
def test_any_bytes(data: bytes) -> None:
    """As protobuf reads them, behind a text that makes them worth counting."""
    data = pb.PredictOptions(Prompt=FILLING).SerializeToString() + data
    try:
        expected = pb.PredictOptions.FromString(data)
    except DecodeError:
        assert "not a message" in str(read(data).error)
    else:
        assert read(data).SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
