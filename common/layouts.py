"""How a model is split over GPUs and machines, and whether it fits: tensor, pipeline, data and expert parallelism.

Pure functions. What is allowed follows vLLM (`ModelConfig.verify_with_parallel_config`, `QKVParallelLinear`,
`FusedMoEParallelConfig`, `ParallelConfig`); what is chosen follows its guide to parallelism: no split across machines
while a copy of the model fits into one, and as many copies as there is room for.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from common.errors import BackendError
from common.model_shape import ModelShape, kv_bytes
from common.weight_sizes import Weights

GIB = 1024**3
# Of what is left to weights and cache: less for the cache, and a GPU waits for memory more than it computes.
_ENOUGH_CACHE = 0.25
_MOST_NODES = 256


class NoFit(BackendError):
    """The model can't be loaded on these machines; the text says what would do."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines of one kind. Memory in bytes."""

    nodes: int
    gpus: int
    """Of each machine."""
    memory: int
    """Of each GPU."""
    utilization: float = 0.92
    """vLLM's `gpu_memory_utilization`."""
    overhead: int = 2 * GIB
    """What a GPU needs beside weights and cache: activations, CUDA graphs, NCCL. vLLM measures it at the load."""

    @property
    def usable(self) -> int:
        """Bytes of a GPU for weights and cache."""
        return max(0, int(self.memory * self.utilization) - self.overhead)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is to be loaded."""

    shape: ModelShape
    weights: Weights
    context: int
    """Tokens of the longest request."""
    element: int = 2
    """Bytes of a number in the KV cache."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One head's split. The GPUs that it takes are tensor x pipeline x data."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    local: int = 1
    """Data-parallel ranks of a machine."""
    nodes: int = 1
    """Machines that one data-parallel rank spans."""
    experts: bool = False
    """Experts are handed out whole, not cut."""

    @property
    def machines(self) -> int:
        """All that it takes."""
        return self.nodes * self.data // self.local


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a layout comes to. Bytes are those of the fullest GPU."""

    layout: Layout
    weights: int
    room: int
    """For the KV cache."""
    concurrency: float
    """Requests of the longest context that a data-parallel rank can hold at a time; infinite without a cache."""
    refused: str = ""
    """Why vLLM would not load it; "" where it would, if `fits`."""

    @property
    def fits(self) -> bool:
        """Whether vLLM would start: it wants room for one request of the longest context."""
        return not self.refused and self.room > 0 and self.concurrency >= 1

    @property
    def roomy(self) -> bool:
        """Whether the cache gets a good part of the memory."""
        return self.fits and self.room >= _ENOUGH_CACHE * (self.weights + self.room)


def layouts(shape: ModelShape, cluster: Cluster) -> Iterator[Layout]:
    """All that use the machines evenly, preferred ones first: within a machine, least split first; then across."""
    sizes = [size for size in range(1, cluster.gpus + 1) if not _uneven(shape, size)]
    stages = [(size, 1) for size in sizes]
    stages += [(size, cluster.gpus // size) for size in sizes if cluster.gpus // size > 1]
    for tensor, pipeline in stages:
        local = cluster.gpus // (tensor * pipeline)
        data = cluster.nodes * local
        whole = shape.experts > 0 and data > 1 and tensor * data <= shape.experts
        yield Layout(tensor, pipeline, data, local, experts=whole)
    for nodes in range(2, cluster.nodes + 1):
        largest = sizes[-1]
        yield Layout(largest, nodes * (cluster.gpus // largest), nodes=nodes)
        if not _uneven(shape, nodes * cluster.gpus):
            yield Layout(nodes * cluster.gpus, nodes=nodes)


def estimate(load: Load, cluster: Cluster, layout: Layout) -> Estimate:
    """What the layout comes to.

    A layer's weights are divided by the tensor parallel size, and layers by the pipeline's; routed experts by the data
    parallel size too, cut or whole (vLLM's docs on expert parallel deployment). The fullest pipeline stage is counted
    with everything that is in no layer.
    """
    shape, weights = load.shape, load.weights
    stage = math.ceil(shape.layers / layout.pipeline) / shape.layers
    ranks = layout.tensor * layout.data
    share = math.ceil(shape.experts / ranks) / shape.experts if layout.experts else 1 / ranks
    taken = int((weights.layers * stage + weights.rest) / layout.tensor + weights.experts * stage * share)
    room = cluster.usable - taken
    request = kv_bytes(shape, load.context, tensor=layout.tensor, pipeline=layout.pipeline, element=load.element)
    concurrency = 0.0 if room <= 0 else room / request if request else math.inf
    return Estimate(layout, taken, room, concurrency, refused(shape, layout))


def choose(estimates: list[Estimate], *, latency: bool = False) -> Estimate | None:
    """The layout to take, None where none fits.

    Within one machine before across: the least split one (with `latency`: the most split one) that leaves a good part
    of the memory to the cache, else the one that leaves the most. Across machines: the fewest, in a pipeline.
    """
    inside = [each for each in estimates if each.layout.nodes == 1]
    plain = [each for each in inside if each.layout.pipeline == 1]
    across = [each for each in estimates if each.layout.nodes > 1]
    for group in (plain[::-1] if latency else plain, [each for each in inside if each not in plain]):
        if found := next((each for each in group if each.roomy), None):
            return found
    if fitting := [each for each in inside if each.fits]:
        return max(fitting, key=lambda each: each.concurrency)
    return next((each for each in across if each.roomy), None) or next((each for each in across if each.fits), None)


def refused(shape: ModelShape, layout: Layout) -> str:
    """Why vLLM would not load this layout; "" where it would."""
    if problem := _uneven(shape, layout.tensor):
        return problem
    if layout.pipeline > shape.layers:
        return f"{shape.layers} layers are fewer than {layout.pipeline} stages"
    if shape.experts and not layout.experts:
        ranks = layout.tensor * layout.data
        if ranks > 1 and shape.expert_width % (ranks * shape.block):
            return _cut("experts", shape.expert_width, ranks, shape.block)
    return ""


def shortfall(load: Load, cluster: Cluster, wanted: Callable[[Layout], bool]) -> NoFit:
    """What to say where no layout that is `wanted` fits: a shorter context that would, or more machines."""

    def best(nodes: int) -> Estimate | None:
        more = dataclasses.replace(cluster, nodes=nodes)
        found = [estimate(load, more, each) for each in layouts(load.shape, more) if wanted(each)]
        return max(found, key=lambda each: (not each.refused, each.concurrency, each.room), default=None)

    def enough(nodes: int) -> bool:
        return bool((found := best(nodes)) and found.fits)

    now = best(cluster.nodes)
    if now is None:
        return NoFit("no layout that uses these machines evenly has the sizes that were asked for")
    if now.refused:
        return NoFit(now.refused)
    needs = f"the weights take {now.weights / GIB:.1f} GiB of a GPU, of which {cluster.usable / GIB:.1f} are usable"
    if now.concurrency > 0:
        shorter = int(now.concurrency * load.context)
        return NoFit(f"{needs}: no room for one request of {load.context} tokens; --max-model-len {shorter} would fit")
    nodes = cluster.nodes
    while nodes < _MOST_NODES:
        nodes *= 2
        if enough(nodes):
            low = next(each for each in range(nodes // 2 + 1, nodes + 1) if enough(each))
            return NoFit(f"{needs}; {low} machines of this kind would do")
    return NoFit(f"{needs}; no number of machines of this kind would do")


def _uneven(shape: ModelShape, tensor: int) -> str:
    """Why a tensor parallel size does not divide the model."""
    if shape.heads % tensor:
        return f"{shape.heads} heads are not divisible by {tensor}"
    if not shape.latent and shape.kv_heads % tensor and tensor % shape.kv_heads:
        return f"{shape.kv_heads} KV heads can't be shared by {tensor}"
    for width in shape.widths:
        if tensor > 1 and width % (tensor * shape.block):
            return _cut("layers", width, tensor, shape.block)
    return ""


def _cut(what: str, width: int, parts: int, block: int) -> str:
    scale = f" at multiples of {block}, which share a scale" if block > 1 else ""
    return f"{what} of width {width} can't be cut into {parts}{scale}"
