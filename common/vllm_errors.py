"""vLLM's exceptions -> ours. vLLM's own classification (what its HTTP server would answer) decides the kind."""

import contextlib
from collections.abc import Iterator

from vllm import envs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from common.errors import ENGINE_STOPPING, BackendError, EngineGone, InvalidRequest, Overloaded, Unsupported
from common.wire_names import from_vllm

ENGINE_DIED = "the engine died; its last error is in the log"
ENGINE_ERROR = "the engine ended the request with an error; it is in the engine's log"


@contextlib.contextmanager
def translated(prompt_field: str) -> Iterator[None]:
    """Raise our exceptions for vLLM's; `prompt_field` is named where vLLM names none.

    What vLLM would answer with 500 passes unchanged: it is a bug, ours or vLLM's.
    """
    try:
        yield
    except BackendError:
        raise
    except TimeoutError as error:
        # The renderer's; what held it may be this request or those before.
        limit = envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT
        raise Overloaded(
            f"{prompt_field}: the chat template had not been rendered after {limit:g} s"
            " (VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT); try again later"
        ) from error
    except RecursionError as error:
        raise InvalidRequest(prompt_field, "has something that is nested too deep") from error
    except EngineDeadError as error:
        raise EngineGone(ENGINE_DIED) from error
    except EngineGenerateError as error:
        # Its own text is empty.
        raise _translate(error.__cause__ or error, prompt_field) from error
    except Exception as error:  # every kind is looked up, and the unknown ones go on
        translation = _translate(error, prompt_field)
        if translation is error:
            raise
        raise translation from error


def admit(llm: AsyncLLM, requests: int = 1) -> None:
    """Return where so many more requests may come; asked before anything is done for them.

    Raises:
        Overloaded: as many run or wait, or as many tokens wait, as are admitted.

    """
    limits = llm.vllm_config.scheduler_config
    try:
        llm.check_admission(requests)
    except QueueOverflowError as error:
        raise Overloaded(
            f"{limits.max_num_queued_reqs} requests run or wait, and no more are admitted (--max-waiting-requests);"
            " try again later"
        ) from error
    except MaxQueuedTokensError as error:
        raise Overloaded(
            f"{llm.get_num_queued_tokens()} prompt tokens wait for their prefill, and"
            f" {limits.max_num_queued_tokens} are admitted (--max-waiting-tokens); try again later"
        ) from error


def admit_together(llm: AsyncLLM, field: str, requests: int, tokens: int = 0) -> None:
    """As `admit`, for requests that one call makes of `field`, all of which are to be in the engine at once.

    `tokens` are those of all their prompts but the last: vLLM takes one more for as long as fewer wait than it admits.

    Raises:
        InvalidRequest: it is more than is ever admitted, so that trying again would not help.
        Overloaded: it is more than is admitted now.

    """
    limits = llm.vllm_config.scheduler_config
    for count, unit, most, flag in (
        (requests, "requests", limits.max_num_queued_reqs, "--max-waiting-requests"),
        (tokens + 1, "prompt tokens or more", limits.max_num_queued_tokens, "--max-waiting-tokens"),
    ):
        if count > most:
            raise InvalidRequest(field, f"would be {count} {unit} at a time; {most} are admitted ({flag})")
    admit(llm, requests)


def check_finish(reason: str | None) -> None:
    """Return where a request goes on, or has ended (`finish_reason`) with an answer.

    Raises:
        EngineGone: the engine was shut down meanwhile.
        RuntimeError: a bug, ours or vLLM's.

    """
    if reason == "abort":
        raise EngineGone(ENGINE_STOPPING)
    if reason == "error":
        raise RuntimeError(ENGINE_ERROR)


def _translate(error: BaseException, prompt_field: str) -> BaseException:
    if not isinstance(error, Exception):
        return error
    code = create_error_response(error).error.code
    if code in (400, 404, 422):
        return from_vllm(error, prompt_field)
    if code == 501:
        return Unsupported(str(error))
    if code == 503:
        return Overloaded(str(error))
    return error
