"""The servers that are measured: how each is started, and what a request is in its words."""

import contextlib
import json
import socket
import sys
import urllib.request
import uuid
from collections.abc import Mapping
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.bench.asks import EMBED, TOOL, TOOLS, Ask, Fleet, prompt_ids
from tests.bench.systems import LOAD_SECONDS, REPOSITORY, Player, Server, SystemFailedError, seconds

_PROBE_SECONDS = 1.0


class Ours(Server):
    """`run.sh`."""

    name = "ours"

    def argv(self) -> list[str]:
        return [str(REPOSITORY / "run.sh"), "--addr", f"127.0.0.1:{self.port}"]

    def wait_ready(self) -> None:
        self.wait_until(lambda: _open(self.port))
        parsers = self.fleet.parsers or ("none", "none")
        embeddings = self.fleet.engine.get("runner") == "pooling"
        options = pb.ModelOptions(
            Model=str(self.fleet.model),
            EngineArgs=json.dumps(dict(self.fleet.engine)),
            Options=[] if embeddings else [f"tool_parser:{parsers[0]}", f"reasoning_parser:{parsers[1]}"],
            Embeddings=embeddings,
        )
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            result = pb_grpc.BackendStub(channel).LoadModel(options, timeout=LOAD_SECONDS, wait_for_ready=True)
        if not result.success:
            raise SystemFailedError(f"{self.name}: {result.message}")

    def path(self, ask: Ask) -> str:
        return f"/backend.Backend/{'Embedding' if ask.scenario == EMBED else _OURS[ask.stream]}"

    def body(self, ask: Ask) -> bytes:
        if ask.scenario == EMBED:
            return pb.PredictOptions(Embeddings=ask.text).SerializeToString()
        return pb.PredictOptions(
            UseTokenizerTemplate=True,
            Messages=[pb.Message(**message) for message in ask.messages],
            Tokens=ask.tokens,
            IgnoreEOS=True,
            Tools=json.dumps([TOOL]) if ask.scenario == TOOLS else "",
            Metadata={"enable_thinking": "true" if ask.thinking else "false"},
        ).SerializeToString()

    def tokens(self, ask: Ask, last: bytes) -> tuple[int, int]:
        if ask.scenario == EMBED:
            result = pb.EmbeddingResult.FromString(last)
            return result.prompt_tokens, result.dim
        reply = pb.Reply.FromString(last)
        return reply.prompt_tokens, reply.tokens


_OURS = {True: "PredictStream", False: "Predict"}


class Frontends(Ours):
    """`run.sh --frontends N`; measured only where it is asked for by its name."""

    on_demand = True

    def __init__(self, fleet: Fleet, threads: int, player: Player, count: int) -> None:
        super().__init__(fleet, threads, player)
        self.name = f"ours, {count} frontends"
        self._count = count

    def argv(self) -> list[str]:
        return [*super().argv(), "--frontends", str(self._count)]

    def cpu(self) -> float:
        return sum(seconds(pid) for pid in (self.pid, *self._others()))

    def memory(self) -> tuple[int, int]:
        serving = [psutil.Process(pid).memory_info().rss for pid in (self.pid, *self._others())]
        return sum(serving), super().memory()[1]

    def _others(self) -> list[int]:
        children = psutil.Process(self.pid).children()
        return [child.pid for child in children if child.cmdline()[:1][0].startswith("backend: frontend")]


class VllmHttp(Server):
    """`vllm serve`: OpenAI's API over HTTP, streams as server-sent events."""

    name = "vllm serve"
    protocol = "http"

    def argv(self) -> list[str]:
        argv = [sys.executable, "-m", "backend.entry", "serve", str(self.fleet.model)]
        argv += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            "m",
            *_flags(self.fleet.engine),
        ]
        if self.fleet.parsers:
            tool, reasoning = self.fleet.parsers
            argv += ["--enable-auto-tool-choice", "--tool-call-parser", tool, "--reasoning-parser", reasoning]
        return argv

    def wait_ready(self) -> None:
        def is_healthy() -> bool:
            with contextlib.suppress(OSError):
                return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).status == 200)
            return False

        self.wait_until(is_healthy)

    def path(self, ask: Ask) -> str:
        return "/v1/embeddings" if ask.scenario == EMBED else "/v1/chat/completions"

    def body(self, ask: Ask) -> bytes:
        if ask.scenario == EMBED:
            return json.dumps({"model": "m", "input": ask.text}).encode()
        return json.dumps(
            {
                "model": "m",
                "messages": ask.messages,
                "max_completion_tokens": ask.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": ask.stream,
                "chat_template_kwargs": {"enable_thinking": ask.thinking},
                **({"stream_options": {"include_usage": True}} if ask.stream else {}),
                **({"tools": [TOOL]} if ask.scenario == TOOLS else {}),
            }
        ).encode()

    def tokens(self, ask: Ask, last: bytes) -> tuple[int, int]:
        answer = json.loads(last)
        usage = answer["usage"]
        if ask.scenario == EMBED:
            return usage["prompt_tokens"], len(answer["data"][0]["embedding"])
        return usage["prompt_tokens"], usage["completion_tokens"]


class VllmGrpc(Server):
    """`vllm serve --grpc`: token ids in, token ids out."""

    name = "vllm serve --grpc"

    def argv(self) -> list[str]:
        argv = [sys.executable, "-m", "backend.entry", "serve", str(self.fleet.model), "--grpc"]
        return [*argv, "--host", "127.0.0.1", "--port", str(self.port), *_flags(self.fleet.engine)]

    def wait_ready(self) -> None:
        # Its port is open, and requests are taken, while some hundreds of its own still warm the engine.
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            self.wait_until(lambda: _is_serving(channel))

    def path(self, ask: Ask) -> str:
        return f"/vllm.grpc.engine.VllmEngine/{'Embed' if ask.scenario == EMBED else 'Generate'}"

    def body(self, ask: Ask) -> bytes:
        from smg_grpc_proto import vllm_engine_pb2 as smg

        prompt = smg.TokenizedInput(input_ids=prompt_ids(self.fleet.model, ask))
        if ask.scenario == EMBED:
            request: Any = smg.EmbedRequest(request_id=uuid.uuid4().hex, tokenized=prompt)
            return bytes(request.SerializeToString())
        request = smg.GenerateRequest(
            request_id=uuid.uuid4().hex,
            tokenized=prompt,
            sampling_params=smg.SamplingParams(temperature=0, top_p=1, max_tokens=ask.tokens, ignore_eos=True, n=1),
            stream=ask.stream,
        )
        return bytes(request.SerializeToString())

    def tokens(self, ask: Ask, last: bytes) -> tuple[int, int]:
        from smg_grpc_proto import vllm_engine_pb2 as smg

        if ask.scenario == EMBED:
            result = smg.EmbedResponse.FromString(last)
            return result.prompt_tokens, result.embedding_dim
        complete = smg.GenerateResponse.FromString(last).complete
        # What it counts are the tokens of the last message.
        return complete.prompt_tokens, ask.tokens if complete.finish_reason == "length" else 0


def _flags(engine: Mapping[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line has them."""
    flags: list[str] = []
    for name, value in engine.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _is_serving(channel: grpc.Channel) -> bool:
    """By the standard health service; raises grpc.RpcError where there is a server that has none."""
    try:
        found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_SECONDS)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return False
        raise
    return bool(found.status == health_pb2.HealthCheckResponse.SERVING)


def _open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
