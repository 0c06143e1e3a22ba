"""The sampling fields of `PredictOptions` -> the names and zeros of OpenAI requests as vLLM takes them.

A field that is unset on the wire becomes None, so that the model's generation_config.json may fill it; which zeros
mean "unset" and which mean "off" differs from field to field and is decided here alone.
"""

import math
from typing import Any

from common.errors import InvalidRequest
from common.json_values import parse_json
from common.pb import backend_pb2 as pb

MAX_STOP_STRINGS = 1024
# vLLM looks through all of them in the event loop, three times.
MAX_BIASES = 20_000


def sampling_fields(options: pb.PredictOptions, *, max_logprobs: int) -> dict[str, Any]:
    """Fields that a ChatCompletionRequest and a CompletionRequest share.

    Raises:
        InvalidRequest: a value that is NaN, infinite or out of its range.

    """
    return {
        "temperature": _in_range("Temperature", options.Temperature, 0, 2),  # 0 is greedy, never "unset"
        "top_p": _in_range("TopP", options.TopP, 0, 1) or None,
        "top_k": _top_k(options.TopK),
        "min_p": _in_range("MinP", options.MinP, 0, 1),
        "repetition_penalty": _in_range("Penalty", options.Penalty, 0, math.inf) or None,
        "frequency_penalty": _in_range("FrequencyPenalty", options.FrequencyPenalty, -2, 2),
        "presence_penalty": _in_range("PresencePenalty", options.PresencePenalty, -2, 2),
        "seed": None if options.Seed == -1 else options.Seed,
        "stop": _stop(options),
        "ignore_eos": options.IgnoreEOS,
        "logit_bias": _logit_bias(options.LogitBias),
        **({"top_logprobs": top} if (top := logprobs_asked(options, max_logprobs)) is not None else {}),
    }


def logprobs_asked(options: pb.PredictOptions, most: int) -> int | None:
    """How many alternatives per token to report; None where no log-probabilities are asked for."""
    for field in ("Logprobs", "TopLogprobs"):
        count = getattr(options, field)
        if not 0 <= count <= most:
            raise InvalidRequest(field, f"{count} is not from 0 to {most}, the engine's max_logprobs")
    if not options.Logprobs and not options.TopLogprobs:
        return None
    return int(options.TopLogprobs)


def _in_range(field: str, value: float, low: float, high: float) -> float:
    if not math.isfinite(value) or not low <= value <= high:
        allowed = f"use {low} or more" if high == math.inf else f"use a number from {low} to {high}"
        raise InvalidRequest(field, f"{value:g} is not allowed; {allowed}")
    # The wire carries 32-bit floats: 0.95 arrives as 0.949999988079071.
    return float(f"{value:.7g}")


def _top_k(value: int) -> int:
    if value < -1:
        raise InvalidRequest("TopK", f"{value} is not allowed; use 1 or more, or 0 or -1 for off")
    return max(value, 0)


def _stop(options: pb.PredictOptions) -> list[str]:
    stop = list(dict.fromkeys(options.StopPrompts))
    if "" in stop:
        raise InvalidRequest("StopPrompts", "has an empty string; leave it out")
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest("StopPrompts", f"has {len(stop)} strings; use at most {MAX_STOP_STRINGS}")
    return stop


def _logit_bias(text: str) -> dict[str, float] | None:
    if not text.strip():
        return None
    allowed = 'use a JSON object from token ids to numbers from -100 to 100, such as {"15": -100}'
    biases = parse_json("LogitBias", text)
    if biases is None:
        return None
    if not isinstance(biases, dict):
        raise InvalidRequest("LogitBias", allowed)
    if len(biases) > MAX_BIASES:
        raise InvalidRequest("LogitBias", f"has {len(biases)} token ids; use at most {MAX_BIASES}")
    for token, bias in biases.items():
        if not token.isdecimal():
            raise InvalidRequest("LogitBias", f"{token!r} is not a token id; {allowed}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidRequest("LogitBias", f"{bias!r} for token {token}; {allowed}")
    return biases or None
