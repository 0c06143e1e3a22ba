"""`run.sh plan MODEL`: how to split a model over GPUs and machines, and what to type to load it so.

It reads the model's `config.json` and the headers of its weights; no vLLM, no GPU and no server is needed.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import BackendError, InvalidRequest

if TYPE_CHECKING:
    from common.planning import Plan, Question

GIB = 1024**3
_UNITS = {"G": GIB, "GIB": GIB, "M": 1024**2, "MIB": 1024**2, "T": 1024**4, "TIB": 1024**4, "GB": 10**9, "MB": 10**6}
_UTILIZATION = 0.92
# Layouts over more machines than these have a row only where they have to be that large.
_SPANS = 4
_EPILOG = """\
SIZE is a number with G or GiB, GB, M or MiB. Prints the layouts that use the machines evenly, the chosen one marked,
the EngineArgs of its LoadModel and a line for each other machine. It is an estimate: vLLM measures at the load.
exit status: 0 when the model fits, 1 when it does not or can't be read, 2 for flags. docs/planning.md has the formulas.
"""


def main(argv: Sequence[str]) -> int:
    """Run the planner; returns the exit status."""
    flags = _parser().parse_args(argv)
    from common.planning import make_plan

    try:
        plan = make_plan(_question(flags))
    except InvalidRequest as error:
        print(f"plan: {str(error).removeprefix('MODEL: ')}", file=sys.stderr)
        return 1
    except BackendError as error:
        print(f"plan: {flags.model} does not fit: {error}", file=sys.stderr)
        return 1
    print(json.dumps(plan.as_json(), indent=2) if flags.json else as_text(plan, _question(flags)))
    return 0


def as_text(plan: "Plan", question: "Question") -> str:
    """The plan for a terminal."""
    lines = [f"{name + ':':<14}{value}" for name, value in _about(plan, question)]
    lines += ["", *_table(plan), ""]
    if plan.ray:
        lines += ["Ray first, the head's machine before the others:"]
        lines += [f"  {shlex.join(each)}" for each in plan.ray]
    lines += ["LoadModel on the head, EngineArgs:", f"  {json.dumps(plan.engine_args)}"]
    if plan.followers:
        lines += ["on the other machines, supervised:"]
        lines += [f"  {shlex.join(each.worker)}" for each in plan.followers]
        lines += ["or as vLLM alone does it:"]
        lines += [f"  {shlex.join(each.serve)}" for each in plan.followers]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _about(plan: "Plan", question: "Question") -> list[tuple[str, str]]:
    shape, weights, cluster = plan.load.shape, plan.load.weights, question.cluster
    heads = f"{shape.heads} heads, {'a latent cache' if shape.latent else f'{shape.kv_heads} KV heads'}"
    experts = f", {shape.experts} experts a layer" if shape.experts else ""
    shared = f", {_gib(weights.experts)} of them in experts" if weights.experts else ""
    gpus = f"{cluster.nodes} of {cluster.gpus} GPUs with {_gib(cluster.memory)}"
    return [
        ("model", f"{question.target.model}: {shape.architecture}, {shape.layers} layers, {heads}{experts}"),
        ("weights", f"{_gib(weights.total)}, {shape.quantization or plan.dtype}{shared}"),
        ("KV cache", f"{_gib(plan.request_bytes)} for a request of {plan.load.context} tokens, before it is split"),
        ("machines", f"{gpus}, of which {_gib(cluster.usable)} are for weights and KV cache"),
    ]


def _table(plan: "Plan") -> list[str]:
    requests = f"requests of {plan.load.context}/rank"
    rows: list[tuple[str, ...]] = [("", "TP", "PP", "DP", "EP", "machines", "weights/GPU", "cache/GPU", requests, "")]
    shown = [each for each in plan.estimates if each.layout.nodes <= max(_SPANS, plan.chosen.layout.nodes)]
    for each in shown:
        layout = each.layout
        rows.append(
            (
                "*" if each is plan.chosen else "",
                *map(str, (layout.tensor, layout.pipeline, layout.data)),
                "yes" if layout.experts else "",
                f"{layout.machines}, a rank on {layout.nodes}" if layout.nodes > 1 else str(layout.machines),
                _gib(each.weights),
                _gib(max(0, each.room)),
                "any number" if math.isinf(each.concurrency) else f"{each.concurrency:.1f}",
                "" if each.fits else each.refused or "does not fit",
            )
        )
    if len(shown) < len(plan.estimates):
        rows.append(("", "…", *[""] * (len(rows[0]) - 2)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _question(flags: argparse.Namespace) -> "Question":
    from common.layout_args import Target
    from common.layouts import Cluster
    from common.planning import Question

    extra = {
        name: value
        for name in ("max_model_len", "dtype", "kv_cache_dtype", "trust_remote_code")
        if (value := getattr(flags, name))
    }
    if flags.gpu_memory_utilization != _UTILIZATION:
        extra["gpu_memory_utilization"] = flags.gpu_memory_utilization
    return Question(
        target=Target(flags.model, flags.head, flags.port, extra),
        cluster=Cluster(
            flags.nodes,
            flags.gpus_per_node,
            flags.gpu_memory,
            utilization=flags.gpu_memory_utilization,
            overhead=flags.overhead,
        ),
        context=flags.max_model_len,
        dtype=flags.dtype or "",
        kv_dtype=flags.kv_cache_dtype or "",
        tensor=flags.tensor_parallel_size,
        pipeline=flags.pipeline_parallel_size,
        data=flags.data_parallel_size,
        latency=flags.latency,
        ray=flags.ray,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh plan",
        description="Compute how to split a model over GPUs and machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, the same on all machines, or a hub id")
    add("--gpu-memory", type=_size, required=True, metavar="SIZE", help="memory of one GPU, such as 80GiB")
    add("--nodes", type=_count, default=1, metavar="N", help="machines (default 1)")
    add("--gpus-per-node", type=_count, default=1, metavar="G", help="GPUs of each (default 1)")
    add("--gpu-memory-utilization", type=_share, default=_UTILIZATION, metavar="SHARE", help="default 0.92, as vLLM's")
    what = "memory of a GPU for what is neither weights nor KV cache (default 2GiB)"
    add("--overhead", type=_size, default=2 * GIB, metavar="SIZE", help=what)
    add("--max-model-len", type=_tokens, metavar="TOKENS", help="longest context (default: the model's)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: 16 bits, the model's own")
    add("--kv-cache-dtype", choices=("bfloat16", "float16", "fp8"), help="default: as --dtype")
    for name in ("tensor", "pipeline", "data"):
        add(f"--{name}-parallel-size", type=_count, metavar="K", help="look at layouts with this size only")
    add("--latency", action="store_true", help="prefer fewer, faster copies of the model to more of them")
    add("--head", default="HEAD", metavar="HOST", help="the head's address, as the other machines reach it")
    add("--port", type=_port, help="where they find it (default 29550, or 29501 where a copy spans machines)")
    add("--ray", action="store_true", help="for a Ray cluster, instead of vLLM's own followers")
    add("--trust-remote-code", action="store_true", help="hand it on")
    add("--json", action="store_true", help="print the chosen layout as JSON")
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]{1,3})", text)
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use a number with GiB, GB or MiB, such as 80GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _count(text: str) -> int:
    return _whole(text, 1024)


def _tokens(text: str) -> int:
    return _whole(text, 10**8)


def _port(text: str) -> int:
    return _whole(text, 65535)


def _whole(text: str, most: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from 1 to {most}")
    return int(text)


def _share(text: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,6}|1(\.0{1,6})?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r}: use a number above 0 and at most 1")
    return float(text)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 1024**2:.1f} MiB"
