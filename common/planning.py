"""The plan of `run.sh plan`: a model's files and a description of machines in, a layout and its command lines out."""

import dataclasses
import math
from typing import Any

from common.errors import InvalidRequest
from common.layout_args import Follower, Target, engine_args, followers, ray_lines
from common.layouts import Cluster, Estimate, Layout, Load, choose, estimate, layouts, shortfall
from common.model_shape import DTYPES, KV_DTYPES, ModelShape, kv_bytes, read_config, shape_of
from common.weight_sizes import read_weights


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be planned."""

    target: Target
    cluster: Cluster
    context: int | None = None
    """Tokens of the longest request; None: the model's own."""
    dtype: str = ""
    """Of `DTYPES`; "": the model's own 16 bits."""
    kv_dtype: str = ""
    """Of `KV_DTYPES`; "": as the weights."""
    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None
    """Sizes that are settled; None: to be chosen."""
    latency: bool = False
    """Prefer fewer, faster copies of the model."""
    ray: bool = False
    """For a Ray cluster, instead of vLLM's own followers."""

    def wants(self, layout: Layout) -> bool:
        """Whether the layout has the sizes that are settled."""
        asked = ((self.tensor, layout.tensor), (self.pipeline, layout.pipeline), (self.data, layout.data))
        return all(size in (None, found) for size, found in asked)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer."""

    load: Load
    dtype: str
    estimates: list[Estimate]
    chosen: Estimate
    engine_args: dict[str, Any]
    followers: list[Follower]
    ray: list[tuple[str, ...]]
    notes: list[str]

    @property
    def request_bytes(self) -> int:
        """What a request of the longest context takes in the KV cache before it is split."""
        return kv_bytes(self.load.shape, self.load.context, element=self.load.element)

    def as_json(self) -> dict[str, Any]:
        """For programs; sizes in bytes, of one GPU."""
        return {
            "layout": dataclasses.asdict(self.chosen.layout),
            "weights": self.chosen.weights,
            "kv_cache": self.chosen.room,
            "max_model_len": self.load.context,
            "requests_per_rank": None if math.isinf(self.chosen.concurrency) else round(self.chosen.concurrency, 2),
            "engine_args": self.engine_args,
            "followers": [dataclasses.asdict(each) for each in self.followers],
            "ray": self.ray,
            "notes": self.notes,
        }


def make_plan(question: Question) -> Plan:
    """Read the model's files and choose a layout.

    Raises:
        InvalidRequest: the model can't be read.
        NoFit: it does not fit; the text says what would do.

    """
    cluster, target = question.cluster, question.target
    shape = shape_of(read_config(target.model))
    context = question.context or shape.context
    if not context:
        raise InvalidRequest("MODEL", "config.json does not say how long a context may be: give --max-model-len")
    dtype = question.dtype or loaded_dtype(shape)
    load = Load(shape, read_weights(target.model, shape, dtype), context, KV_DTYPES[question.kv_dtype or dtype])
    estimates = [estimate(load, cluster, each) for each in layouts(shape, cluster) if question.wants(each)]
    chosen = choose(estimates, latency=question.latency)
    if chosen is None:
        raise shortfall(load, cluster, question.wants)
    return Plan(
        load=load,
        dtype=dtype,
        estimates=estimates,
        chosen=chosen,
        engine_args=engine_args(chosen.layout, target, ray=question.ray),
        followers=[] if question.ray else followers(chosen.layout, target),
        ray=ray_lines(chosen.layout, target) if question.ray else [],
        notes=notes(load, cluster, chosen),
    )


def loaded_dtype(shape: ModelShape) -> str:
    """What vLLM's `--dtype auto` makes of a model on a GPU: 16 bits, where its files have 32 too."""
    return shape.dtype if DTYPES[shape.dtype] == 2 else "bfloat16"


def notes(load: Load, cluster: Cluster, chosen: Estimate) -> list[str]:
    """What a user of this layout should know."""
    layout = chosen.layout
    found = []
    if load.weights.guessed:
        found.append("only the size of the files is known, so experts are counted as if each rank had all of them")
    if not chosen.roomy:
        found.append("little is left for the KV cache: few requests run at a time")
    if (heads := cluster.nodes // layout.machines) > 1:
        found.append(f"the machines make {heads} such groups, each with a head of its own")
    if spare := cluster.nodes % layout.machines:
        found.append(f"{spare} of the machines are not used")
    if spare := cluster.gpus - layout.tensor * layout.pipeline * layout.local // layout.nodes:
        found.append(f"{spare} GPUs of each machine are not used")
    if layout.pipeline > 1:
        found.append("vLLM refuses a pipeline for models that don't implement it, and has none on a CPU")
    if layout.nodes > 1 and layout.tensor > cluster.gpus:
        found.append("tensor parallelism across machines needs InfiniBand or RoCE with GPUDirect")
    if load.shape.experts and layout.data > 1:
        found.append("the ranks of a model with experts run in step: all wait for the slowest")
    return found
