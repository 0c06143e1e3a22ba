"""Sends cases to a server, many at a time, and says what should not have happened.

What may be answered to a call is small: a result, or a status that says what is wrong with it. INTERNAL and UNKNOWN are
bugs, DEADLINE_EXCEEDED is an RPC that hangs, UNAVAILABLE a server or an engine that is gone.
"""

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from common.pb import backend_pb2 as pb
from tests.fuzz.cases import Call, Case, Wire, shown
from tests.fuzz.messages import METHODS
from tests.process.orchestrator import Backend

DEADLINE = 30.0
AT_ONCE = 48
_CHANNELS = 4
_PAUSE = 0.02  # between the parts of a case
_LISTEN = 0.25  # for what a server says to what needs no answer

REFUSED = "refused"
_Code = grpc.StatusCode
ALLOWED = frozenset(
    (
        _Code.OK,
        _Code.INVALID_ARGUMENT,
        _Code.NOT_FOUND,
        _Code.FAILED_PRECONDITION,
        _Code.UNIMPLEMENTED,
        _Code.RESOURCE_EXHAUSTED,
    )
)
# Ours and the engine's. gRPC and asyncio log what a client's bytes did to them.
_LOUD = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?(?:ERROR|CRITICAL) (?!\S+ \S+ \[(?:grpc\._cython\.cygrpc|asyncio)\]).*", re.MULTILINE
)
# What gRPC's client makes of a message that it writes after the server has answered.
_ANSWERED_EARLY = "Internal error from Core"


@dataclass
class Outcome:
    """What became of the cases so far.

    Attributes:
        codes: how often each status came, with the kind of the case.
        findings: (name of the case, what is wrong), each of them a failure.
        slowest: (seconds, name) of the call that took longest.

    """

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[tuple[str, Case, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


class Runner:
    """A client with bad intentions. An asynchronous context manager."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._host, _, port = backend.addr.rpartition(":")
        self._port = int(port)
        self._engines = {process.pid for process in backend.engine_cores()}
        self._read = len(backend.stderr)
        self.outcome = Outcome()

    async def __aenter__(self) -> Self:
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_metadata_size", 1 << 20),
        )
        self._channels = [grpc.aio.insecure_channel(self._backend.addr, options) for _ in range(_CHANNELS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def run(self, cases: Iterable[tuple[str, Case]]) -> None:
        """Send them all, `AT_ONCE` at a time, and look at the server afterwards."""
        source = iter(cases)
        last: dict[str, Case] = {}

        async def client(channel: grpc.aio.Channel) -> None:
            for name, case in source:
                last[name] = case
                await self._send(channel, name, case)
                await asyncio.sleep(0)

        await asyncio.gather(*(client(self._channels[index % _CHANNELS]) for index in range(AT_ONCE)))
        if last:
            self._look(last)

    async def _send(self, channel: grpc.aio.Channel, name: str, case: Case) -> None:
        started = time.monotonic()
        if isinstance(case, Wire):
            said = await _write(self._host, self._port, case)
            if said == REFUSED:
                self.outcome.findings.append((name, case, "the port takes no connection"))
        else:
            code, text = await _call(channel, case)
            said = code.name
            left = case.leaves_after is not None and code in (_Code.CANCELLED, _Code.DEADLINE_EXCEEDED)
            left = left or text == _ANSWERED_EARLY
            if code not in ALLOWED and not left:
                self.outcome.findings.append((name, case, f"{code.name}: {text[:300]}"))
            self.outcome.slowest = max(self.outcome.slowest, (time.monotonic() - started, name))
        self.outcome.codes[name.partition(":")[0], said] += 1

    def _look(self, cases: dict[str, Case]) -> None:
        """Findings of the server that no answer shows."""
        names = f"{next(iter(cases))} to {next(reversed(cases))}"
        case = next(reversed(cases.values()))
        found = self.outcome.findings
        if self._backend.exit_status is not None:
            found.append((names, case, f"exit status {self._backend.exit_status}: {self._backend.last_stderr_line}"))
            return
        if {process.pid for process in self._backend.engine_cores()} != self._engines:
            found.append((names, case, "the engine is another one"))
        text = self._backend.stderr
        new, self._read = text[self._read :], len(text)
        for offence in dict.fromkeys(_LOUD.findall(new)):
            found.append((names, case, f"stderr: {offence}\n{new[new.index(offence) :][:3000]}"))


async def _call(channel: grpc.aio.Channel, case: Call) -> tuple[grpc.StatusCode, str]:
    method = METHODS.get(case.method)
    streams = (method.client_streaming, method.server_streaming) if method is not None else (False, False)
    factory: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[streams]
    options: Any = {"timeout": DEADLINE if case.leaves_after is None else case.leaves_after, "metadata": case.metadata}
    try:
        call: Any = factory(case.method)(iter(case.requests) if streams[0] else case.requests[0], **options)
        if streams[1]:
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return await call.code(), await call.details()


async def _write(host: str, port: int, case: Wire) -> str:
    """What the server said in the end: `answer`, `nothing`, or `refused` where it let nobody in."""
    loop = asyncio.get_running_loop()
    said = b""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, (host, port))
        except ConnectionError:
            return REFUSED
        with contextlib.suppress(OSError, TimeoutError):
            for index, part in enumerate(case.parts):
                if index:
                    await asyncio.sleep(_PAUSE)
                async with asyncio.timeout(_LISTEN * 4):
                    await loop.sock_sendall(connection, part)
            if case.end == "half":
                connection.shutdown(socket.SHUT_WR)
            if case.end in ("half", "wait"):
                async with asyncio.timeout(_LISTEN):
                    said = await loop.sock_recv(connection, 1 << 16)
        if case.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "answer" if said else "nothing"


def report(outcome: Outcome) -> str:
    """The outcome in some lines."""
    lines = [
        f"{kind}: " + ", ".join(f"{count} {code}" for (of, code), count in outcome.codes.most_common() if of == kind)
        for kind in dict.fromkeys(kind for kind, _ in outcome.codes)
    ]
    seconds, name = outcome.slowest
    lines.append(f"slowest: {seconds:.1f} s, {name}")
    lines += [f"FOUND {name}: {what}\n  {shown(case)}" for name, case, what in outcome.findings[:40]]
    return "\n".join(lines)


HEALTH = Call("/backend.Backend/Health", (pb.HealthMessage().SerializeToString(),))
