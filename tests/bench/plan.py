"""What is measured: the fleets, the cells, and in which order."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.bench.asks import EMBED, PLAIN, REASONING, TOOLS, Fleet
from tests.bench.figures import IDLE, MIB, UNARY, Cell
from tests.bench.servers import Frontends, Ours, VllmGrpc, VllmHttp
from tests.bench.systems import InProcess, Player, System
from tests.models import ensure

GIB = 1024 * MIB
STREAMS = (1, 8, 32, 64, 128, 256)
SHORT, LONG = 128, 1024
# One stream is over soon: so many one after the other make a turn.
TURNS_OF_ONE = 8
# SmolLM2 takes minutes for more tokens than these.
MANY_TOKENS = 4096
ROUNDS = 3
FEW_ROUNDS = 2
ENGINE: Mapping[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
}
WORDS = "Say as many words as you can."


@dataclasses.dataclass(frozen=True)
class Described:
    """A fleet before it is made.

    Attributes:
        about: for the report.
        model: a key of `tests.models.RECIPES`.
        engine: arguments beside `ENGINE`.
        parsers: see `Fleet`.
        grpc: whether `vllm serve --grpc` can do what is asked.

    """

    about: str
    model: str
    engine: Mapping[str, Any]
    parsers: tuple[str, str] | None = None
    grpc: bool = True


FLEETS: Mapping[str, Described] = {
    "toy": Described(
        "A model of 2 layers (hidden 64, vocabulary 49,152), so that what serves it is what is measured.",
        "chain",
        {"kv_cache_memory_bytes": 2 * GIB},
    ),
    "parsers": Described(
        "The same model, its answers parsed for tool calls (hermes) and reasoning (qwen3).",
        "chain",
        {"kv_cache_memory_bytes": 2 * GIB},
        parsers=("hermes", "qwen3"),
        grpc=False,
    ),
    # 256 requests of six blocks (of 32 tokens, 45 KiB each) fit into the cache, and all systems into 24 GiB.
    "smollm2": Described(
        "SmolLM2-135M in float32.", "smollm2", {"block_size": 32, "kv_cache_memory_bytes": 9 * GIB // 4}
    ),
    "embeddings": Described(
        "all-MiniLM-L6-v2: one vector for each request.",
        "minilm",
        # It has no cache; but without a size vLLM wants most of the memory free, and others are loaded, too.
        {"runner": "pooling", "max_model_len": 256, "kv_cache_memory_bytes": GIB // 4},
    ),
}

QUICK: Sequence[Cell] = [Cell("toy", PLAIN, streams, SHORT) for streams in (1, 32, 128)]
# One after the other, since the machine has better and worse hours.
_COMPARED: Sequence[Cell] = [
    Cell("toy", PLAIN, 128, SHORT),
    *(Cell("toy", PLAIN, 128, SHORT, connections) for connections in (1, 8)),
    Cell("toy", PLAIN, 128, SHORT, idle=IDLE),
    Cell("toy", PLAIN, 128, LONG),
]
FULL: Sequence[Cell] = [
    *_COMPARED,
    *(Cell("toy", PLAIN, streams, tokens) for tokens in (SHORT, LONG) for streams in STREAMS if streams != 128),
    *(Cell("parsers", scenario, streams, SHORT) for scenario in (TOOLS, REASONING) for streams in (1, 32, 128)),
    *(Cell("smollm2", PLAIN, streams, SHORT) for streams in STREAMS),
    *(Cell("smollm2", PLAIN, streams, LONG) for streams in (1, 8)),
    *(Cell("embeddings", EMBED, streams, 0) for streams in STREAMS),
]


def systems(name: str, player: Player) -> list[System]:
    """The systems of a fleet, not yet started."""
    described = FLEETS[name]
    fleet = Fleet(ensure(described.model), {**ENGINE, **described.engine}, described.parsers)
    # One core for those who serve, and whoever asks them.
    threads = max((os.cpu_count() or 2) - 1, 1)
    found: list[System] = [Ours(fleet, threads, player), InProcess(fleet, threads), VllmHttp(fleet, threads, player)]
    found += [Frontends(fleet, threads, player, count) for count in (2, 3)]
    return [*found, VllmGrpc(fleet, threads, player)] if described.grpc else found


def contenders(cell: Cell, running: Sequence[System]) -> Iterator[tuple[str, System, bool]]:
    """Name, system, and whether it streams; nobody streams embeddings, and one at a time whole is no other work.

    Where the engine takes minutes, how its answers are sent makes no difference. HTTP/1.1 has no two requests at once
    on a connection.
    """
    for system in running:
        if cell.connections and isinstance(system, VllmHttp):
            continue
        yield system.name, system, cell.scenario != EMBED
        whole_too = cell.scenario != EMBED and cell.streams > 1 and not _takes_minutes(cell)
        if whole_too and not isinstance(system, VllmGrpc):
            yield system.name + UNARY, system, False


def rounds(cell: Cell) -> int:
    """How often each system has its turn."""
    return FEW_ROUNDS if _takes_minutes(cell) else ROUNDS


def repeats(cell: Cell) -> int:
    """How often all streams ask in one turn."""
    soon_over = cell.streams == 1 and cell.tokens <= SHORT and cell.fleet != "smollm2"
    return TURNS_OF_ONE if soon_over else 1


def _takes_minutes(cell: Cell) -> bool:
    return cell.fleet == "smollm2" and cell.streams * cell.tokens > MANY_TOKENS


def in_order(round_number: int, names: Sequence[Any]) -> list[Any]:
    """Whoever comes second finds the machine as the first one left it: each is first, and last, now and then."""
    start = round_number // 2 % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if round_number % 2 else turned
