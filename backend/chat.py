"""`run.sh chat`: a terminal client that spawns the server as the orchestrator would, asks one question and frees.

It is also the shortest example of a client: Health until it answers, LoadModel, PredictStream, Free, SIGTERM.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import grpc

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc

RUN_SH = Path(__file__).resolve().parent.parent / "run.sh"
START_SECONDS = 30.0
STOP_SECONDS = 15.0


class ChatError(Exception):
    """What went wrong, in words for the terminal."""


def main(argv: Sequence[str]) -> int:
    """Run the client; returns the exit status."""
    args = _arguments(argv)
    try:
        with contextlib.ExitStack() as stack:
            addr = args.addr or stack.enter_context(_server())
            _chat(pb_grpc.BackendStub(stack.enter_context(grpc.insecure_channel(addr))), args)
    except ChatError as error:
        print(f"chat: {error}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"chat: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh chat", description="Load a model, stream one answer, free it.")
    parser.add_argument("prompt", help="the user's message")
    parser.add_argument("--model", required=True, help="a model folder, a GGUF file or a hub id")
    parser.add_argument("--addr", help="a server that runs already; otherwise one is started and stopped")
    parser.add_argument("--option", action="append", default=[], help="an entry of ModelOptions.Options; repeatable")
    parser.add_argument("--tokens", type=int, default=512, help="most tokens to generate; 0 fills the context")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    return parser.parse_args(argv)


def _chat(backend: pb_grpc.BackendStub, args: argparse.Namespace) -> None:
    model = os.path.abspath(args.model) if os.path.exists(args.model) else args.model
    started = time.monotonic()
    with _progress(backend):
        result = backend.LoadModel(pb.ModelOptions(Model=model, Options=args.option))
    if not result.success:
        raise ChatError(f"{args.model} can't be loaded: {result.message}")
    _note(f"loaded in {time.monotonic() - started:.1f} s\n")
    request = pb.PredictOptions(
        UseTokenizerTemplate=True,
        Messages=[pb.Message(role="user", content=args.prompt)],
        Tokens=args.tokens,
        Temperature=args.temperature,
        TopK=-1,
    )
    started = time.monotonic()
    first = tokens = 0.0
    for reply in backend.PredictStream(request):
        first = first or time.monotonic()
        tokens = reply.tokens
        sys.stdout.write(reply.message.decode())
        sys.stdout.flush()
    decode = time.monotonic() - first
    sys.stdout.write("\n")
    rate = f", then {(tokens - 1) / decode:.1f} tokens/s" if tokens > 1 and decode > 0 else ""
    _note(f"\n{tokens:.0f} tokens: first after {(first - started) * 1000:.0f} ms{rate}")
    backend.Free(pb.HealthMessage())


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """A server of our own on a free port, in its own process group; stopped on every way out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        addr = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(RUN_SH), "--addr", addr], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(addr, process, log)
            yield addr
        finally:
            _stop(process)


def _wait_for(addr: str, process: "subprocess.Popen[bytes]", log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with grpc.insecure_channel(addr) as channel:
            try:
                pb_grpc.BackendStub(channel).Health(pb.HealthMessage(), timeout=2)
                return
            except grpc.RpcError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["it wrote nothing"])[-1]
                    raise ChatError(f"the server did not start: {last}") from error
        time.sleep(0.1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            return


@contextlib.contextmanager
def _progress(backend: pb_grpc.BackendStub) -> Iterator[None]:
    """Shows the stage of the load while the body waits for it, where stderr is a terminal."""
    done = threading.Event()

    def show() -> None:
        while not done.wait(0.5):
            with contextlib.suppress(grpc.RpcError):
                breakdown = backend.Status(pb.HealthMessage(), timeout=2).memory.breakdown
                stage = next((name for name in breakdown if name.startswith("loading, ")), None)
                if stage:
                    shown = stage.removeprefix("loading, ").removesuffix(" (seconds)")
                    sys.stderr.write(f"\r\033[Kloading: {shown}, {breakdown[stage]} s")
                    sys.stderr.flush()
        sys.stderr.write("\r\033[K")

    if not sys.stderr.isatty():
        yield
        return
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _note(text: str) -> None:
    print(text, file=sys.stderr)
