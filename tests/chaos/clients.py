"""The clients: each kind makes one call in its own way, and says which statuses it may end with.

A kind gets a `Call`, which counts and judges whatever comes; see `KINDS`.
"""

import asyncio
import contextlib
import dataclasses
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.chaos.cutter import cutter
from tests.chaos.record import Code, Record
from tests.chaos.samples import Sampler
from tests.models.dialogue import Line
from tests.models.script import line, script
from tests.process.orchestrator import PROBE_SECONDS, REPOSITORY
from tests.process.wire import ENDLESS, calls, chat, check_shape, content, predict_options, raw, stream_calls

# Longer than anything takes here; who waits longer, hangs.
PATIENCE = 60.0
MESSAGE_LIMIT = 50 * 2**20
LINES = [line for line in script() if not line.reasoning]
_ENDLESS_TOKENS = 1500
UNREAD = "A sentence of 東京 👋🏽, for tokens and back."

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
)
OK = frozenset({Code.OK})


@dataclasses.dataclass
class Call:
    """One call of one client: where to, and who keeps the books."""

    kind: str
    addr: str
    record: Record
    sampler: Sampler
    generator: random.Random
    began: float = dataclasses.field(default_factory=time.monotonic)

    @contextlib.asynccontextmanager
    async def connection(self, addr: str = "") -> AsyncIterator[pb_grpc.BackendStub]:
        """A connection of its own, as the orchestrator has one for each call."""
        async with grpc.aio.insecure_channel(addr or self.addr, _OPTIONS) as channel:
            yield pb_grpc.BackendStub(channel)

    async def ends(self, awaited: Awaitable[Any], *expected: Code, probe: bool = False) -> Any:
        """What `awaited` gives, once its status is judged; None where that is not OK."""
        try:
            result, code, details = await awaited, Code.OK, ""
        except grpc.aio.AioRpcError as error:
            result, code, details = None, error.code(), error.details() or ""
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            result, code, details = None, Code.CANCELLED, ""
        self.record.end_of_call(self.kind, code, details, self.began, frozenset(expected) or OK, probe=probe)
        return result

    def is_right(self, asked: Line, text: str, made: Sequence[tuple[str, Any]]) -> None:
        """Judge an answer against the script."""
        expected = [(name, dict(arguments)) for name, arguments in asked.tool_calls]
        # Parsers differ in the line breaks that they keep about a tool call.
        said = text.strip() if expected else text
        if said == asked.content and list(made) == expected:
            self.record.good_answer(self.began)
        else:
            self.record.violation(f"{self.kind}: {asked.name} was answered {text!r} {made!r}")


async def unary(call: Call) -> None:
    """A line of the script, whole."""
    asked = call.generator.choice(LINES)
    async with call.connection() as stub:
        reply = await call.ends(stub.Predict(predict_options(asked), timeout=PATIENCE))
    if reply is not None:
        call.sampler.latency(time.monotonic() - call.began)
        (delta,) = reply.chat_deltas
        call.is_right(asked, reply.message.decode(), calls(delta.tool_calls))


async def stream(call: Call) -> None:
    """A line of the script, in chunks."""
    await _stream(call, call.generator.choice(LINES), 0.0)


async def slow_reader(call: Call) -> None:
    """As `stream`, with a pause after each chunk."""
    await _stream(call, line("long"), call.generator.uniform(0.002, 0.012))


async def _stream(call: Call, asked: Line, pause: float) -> None:
    async def read(stub: pb_grpc.BackendStub) -> list[pb.Reply]:
        replies = []
        async for reply in stub.PredictStream(predict_options(asked), timeout=PATIENCE):
            replies.append(reply)
            if pause:
                await asyncio.sleep(pause)
        return replies

    async with call.connection() as stub:
        replies = await call.ends(read(stub))
    if replies is not None:
        check_shape(replies)
        call.is_right(asked, content(replies), stream_calls(replies))


async def cancelling(call: Call) -> None:
    """Goes away at some chunk, or some time into a whole answer."""
    async with call.connection() as stub:
        if call.generator.random() < 0.3:
            future = stub.Predict(_endless(), timeout=PATIENCE)
            await asyncio.wait([asyncio.ensure_future(future.code())], timeout=call.generator.uniform(0, 1))
            future.cancel()
            await call.ends(future, Code.CANCELLED, Code.OK)
        else:
            flow = stub.PredictStream(_endless(), timeout=PATIENCE)

            async def read_some() -> None:
                for _ in range(call.generator.randrange(80)):
                    await flow.read()
                flow.cancel()
                await flow.read()

            await call.ends(read_some(), Code.CANCELLED, Code.OK)


async def disconnecting(call: Call) -> None:
    """Its TCP connection is cut in the middle of a stream, at some byte.

    At one that comes before the end also where a server that was stopped sends all tokens in one message: each has one
    byte at least.
    """
    async with (
        cutter(call.addr, call.generator.randrange(200, _ENDLESS_TOKENS)) as addr,
        call.connection(addr) as stub,
    ):

        async def read() -> None:
            async for _ in stub.PredictStream(_endless(), timeout=PATIENCE):
                pass

        await call.ends(read(), Code.UNAVAILABLE)


async def crashing(call: Call) -> None:
    """A process with several streams, which gets SIGKILL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.crasher", call.addr, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        # The first chunk of each of its streams, or their end where the server is gone.
        await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        await asyncio.sleep(call.generator.uniform(0, 0.5))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    call.record.end_of_call(call.kind, Code.CANCELLED, "", call.began, frozenset({Code.CANCELLED}), probe=False)


async def impatient(call: Call) -> None:
    """A deadline of a millisecond."""
    async with call.connection() as stub:
        await call.ends(stub.Predict(_endless(), timeout=0.001), Code.DEADLINE_EXCEEDED)


async def oversize(call: Call) -> None:
    """A message over the limit."""
    async with call.connection() as stub:
        await call.ends(stub.Predict(raw("x" * (MESSAGE_LIMIT + 1)), timeout=PATIENCE), Code.RESOURCE_EXHAUSTED)


_BAD: tuple[tuple[pb.PredictOptions, Code], ...] = (
    (chat("a", Temperature=-1), Code.INVALID_ARGUMENT),
    (chat("a", TopP=math.nan), Code.INVALID_ARGUMENT),
    (chat("a", Tools="{broken"), Code.INVALID_ARGUMENT),
    (chat("a", Grammar="root ::= ("), Code.INVALID_ARGUMENT),
    (chat("a", LogitBias='{"99999999": 1}'), Code.INVALID_ARGUMENT),
    (pb.PredictOptions(), Code.INVALID_ARGUMENT),
    (raw("fox " * 5000), Code.INVALID_ARGUMENT),
    (chat("a", Images=["no base64"]), Code.INVALID_ARGUMENT),
    (chat("a", ModelIdentity="another model"), Code.NOT_FOUND),
)


async def bad_request(call: Call) -> None:
    """A value that can't be used."""
    request, code = call.generator.choice(_BAD)
    async with call.connection() as stub:
        await call.ends(stub.Predict(request, timeout=PATIENCE), code)


_WRONG: tuple[tuple[str, Any], ...] = (
    ("Embedding", pb.PredictOptions(Embeddings="a")),
    ("Rerank", pb.RerankRequest(query="a", documents=["b"])),
    ("TokenClassify", pb.TokenClassifyRequest(text="a")),
    ("AudioTranscription", pb.TranscriptRequest()),
)


async def wrong_rpc(call: Call) -> None:
    """What a model that generates text can't do."""
    rpc, request = call.generator.choice(_WRONG)
    async with call.connection() as stub:
        await call.ends(getattr(stub, rpc)(request, timeout=PATIENCE), Code.UNIMPLEMENTED)


async def prober(call: Call) -> None:
    """Health and Status, each with the orchestrator's deadline."""
    async with call.connection() as stub:
        reply = await call.ends(stub.Health(pb.HealthMessage(), timeout=PROBE_SECONDS), probe=True)
    if reply is not None and reply.message != b"OK":
        call.record.violation(f"Health said {reply.message!r}")
    call.began = time.monotonic()
    async with call.connection() as stub:
        await call.ends(stub.Status(pb.HealthMessage(), timeout=PROBE_SECONDS), probe=True)


async def tokenizer(call: Call) -> None:
    """Tokens and back."""
    async with call.connection() as stub:
        tokens = await call.ends(stub.TokenizeString(raw(UNREAD), timeout=PATIENCE))
        if tokens is None:
            return
        call.began = time.monotonic()
        text = await call.ends(stub.Detokenize(pb.DetokenizeRequest(tokens=tokens.tokens), timeout=PATIENCE))
    if text is not None and text.content != UNREAD:
        call.record.violation(f"tokens and back: {text.content!r}")


def _endless() -> pb.PredictOptions:
    # Fits into the smallest context that is loaded here.
    return predict_options(line("long"), **(ENDLESS | {"Tokens": _ENDLESS_TOKENS}))


@dataclasses.dataclass(frozen=True)
class Kind:
    """How often a client comes, and whether it is one that must be served."""

    act: Callable[[Call], Awaitable[None]]
    weight: int
    normal: bool = False


KINDS = {
    "unary": Kind(unary, 20, normal=True),
    "stream": Kind(stream, 20, normal=True),
    "slow reader": Kind(slow_reader, 4, normal=True),
    "tokenizer": Kind(tokenizer, 6, normal=True),
    "prober": Kind(prober, 10),
    "cancelling": Kind(cancelling, 12),
    "disconnecting": Kind(disconnecting, 8),
    "crashing": Kind(crashing, 1),
    "deadline 1 ms": Kind(impatient, 6),
    "oversize": Kind(oversize, 1),
    "bad request": Kind(bad_request, 8),
    "wrong RPC": Kind(wrong_rpc, 4),
}


def chosen(names: str) -> dict[str, Kind]:
    """The kinds in a list with commas; all where it is empty. ValueError for a name that is none."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := set(wanted) - set(KINDS):
        raise ValueError(f"CHAOS_CLIENTS: {', '.join(sorted(unknown))}: use some of {', '.join(KINDS)}")
    return {name: kind for name, kind in KINDS.items() if not wanted or name in wanted}
