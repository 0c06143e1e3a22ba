"""The commands of the deployment files, read as those read them that they are for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from backend.settings import Settings, parse_settings
from backend.worker_settings import parse_worker_settings
from common.engine_args import plan_load
from common.pb import backend_pb2 as pb
from tests.unit.test_layout_args import SHARED

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"


def server(words: Sequence[str], environ: dict[str, str] | None = None) -> Settings:
    """Of `run.sh`, or of an image whose entry point that is."""
    return parse_settings(words, environ or {})


def follower(words: Sequence[str]) -> AsyncEngineArgs:
    """What vLLM makes of what `run.sh worker` starts it with."""
    assert words[0] == "worker"
    return serve(parse_worker_settings(words[1:], {}).rank_argv)


def serve(words: Sequence[str]) -> AsyncEngineArgs:
    """What vLLM makes of `run.sh serve`."""
    assert words[0] == "serve"
    flags = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words[1:]))
    validate_parsed_serve_args(flags)
    assert flags.headless
    flags.model = flags.model_tag
    return AsyncEngineArgs.from_cli_args(flags)


def load(words: Sequence[str]) -> tuple[str, AsyncEngineArgs]:
    """Of grpcurl: where it sends the load, and what vLLM makes of that."""
    words = list(words)
    data = words[words.index("-d") + 1]
    address, method = words[-2:]
    assert method == "backend.Backend/LoadModel"
    assert "-plaintext" in words
    options = json_format.ParseDict(json.loads(data), pb.ModelOptions())
    given: dict[str, Any] = json.loads(options.EngineArgs)
    plan_load(pb.ModelOptions(Model="org/model", EngineArgs=options.EngineArgs))
    return address, AsyncEngineArgs(model=options.Model, **given)


def agree(head: AsyncEngineArgs, others: Sequence[AsyncEngineArgs]) -> None:
    """All are one cluster: the same sizes, and every rank once."""
    ranks = list(range(head.data_parallel_size_local or head.data_parallel_size))
    for each in others:
        assert {name: getattr(each, name) for name in SHARED} == {name: getattr(head, name) for name in SHARED}
        assert each.model == head.model
        assert each.data_parallel_start_rank is not None
        assert each.data_parallel_size_local is not None
        ranks += range(each.data_parallel_start_rank, each.data_parallel_start_rank + each.data_parallel_size_local)
    assert ranks == list(range(head.data_parallel_size))
