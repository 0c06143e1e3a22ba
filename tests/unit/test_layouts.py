"""Which layouts there are, what they come to, and which is chosen."""

import math

import pytest

from common.layouts import GIB, Cluster, Estimate, Layout, Load, choose, estimate, layouts, refused, shortfall
from common.model_shape import kv_bytes, shape_of
from common.weight_sizes import Weights
from tests.unit.test_model_shape import DEEPSEEK_V3, LLAMA_70B

LLAMA_405B = LLAMA_70B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
}
QWEN3_30B_FP8 = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def gib(number: float) -> int:
    return int(number * GIB)


LOADS = {
    "70B": Load(shape_of(LLAMA_70B), Weights(gib(127), 0, gib(4)), 8192),
    "405B": Load(shape_of(LLAMA_405B), Weights(gib(750), 0, gib(8)), 32768),
    "DeepSeek": Load(shape_of(DEEPSEEK_V3), Weights(gib(17), gib(610), gib(3)), 32768),
    "Qwen3 MoE": Load(shape_of(QWEN3_30B_FP8), Weights(gib(2), gib(27), gib(1)), 32768),
}


def all_of(load: Load, cluster: Cluster) -> list[Estimate]:
    return [estimate(load, cluster, each) for each in layouts(load.shape, cluster)]


@pytest.mark.parametrize(
    ("name", "machines", "throughput", "latency"),
    [
        # Copies of four GPUs, for two leave little to the cache; the largest that divides the heads.
        ("70B", (1, 8, 80), Layout(4, 1, 2, 2), Layout(8)),
        ("70B", (2, 8, 80), Layout(4, 1, 4, 2), Layout(8, 1, 2, 1)),
        # Two GPUs do, if barely: better than nothing, and than a second machine.
        ("70B", (1, 2, 80), Layout(2), Layout(2)),
        ("70B", (2, 2, 80), Layout(2, 1, 2, 1), Layout(2, 1, 2, 1)),
        # One GPU a machine: a pipeline.
        ("70B", (4, 1, 80), Layout(1, 3, nodes=3), Layout(1, 3, nodes=3)),
        # 64 heads are not divisible by six.
        ("70B", (1, 6, 80), Layout(4), Layout(4)),
        ("405B", (2, 8, 80), Layout(8, 2, nodes=2), Layout(8, 2, nodes=2)),
        ("405B", (4, 8, 80), Layout(8, 2, nodes=2), Layout(8, 2, nodes=2)),
        # Experts over all ranks; attention split no further than it must be.
        ("DeepSeek", (2, 8, 80), Layout(2, 1, 8, 4, experts=True), Layout(8, 1, 2, 1, experts=True)),
        ("DeepSeek", (2, 8, 141), Layout(1, 1, 16, 8, experts=True), Layout(8, 1, 2, 1, experts=True)),
        ("DeepSeek", (1, 8, 141), Layout(2, 1, 4, 4, experts=True), Layout(8)),
        # Experts 768 wide can't be cut in eight at multiples of 128, but six fit; whole ones can be handed out.
        ("Qwen3 MoE", (1, 8, 80), Layout(1, 1, 8, 8, experts=True), Layout(4, 1, 2, 2, experts=True)),
        ("Qwen3 MoE", (2, 1, 24), Layout(1, 1, 2, 1, experts=True), Layout(1, 1, 2, 1, experts=True)),
    ],
)
def test_the_choice(name: str, machines: tuple[int, int, int], throughput: Layout, latency: Layout) -> None:
    nodes, gpus, memory = machines
    found = all_of(LOADS[name], Cluster(nodes, gpus, gib(memory)))
    for chosen, wanted in ((choose(found), throughput), (choose(found, latency=True), latency)):
        assert chosen is not None
        assert chosen.layout == wanted
        assert chosen.fits


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("machines", [(1, 1), (1, 8), (2, 4), (3, 6), (4, 8)])
def test_no_layout_takes_more_than_there_is(name: str, machines: tuple[int, int]) -> None:
    cluster = Cluster(*machines, gib(80))
    found = list(layouts(LOADS[name].shape, cluster))
    assert len(set(found)) == len(found)
    for each in found:
        assert 1 <= each.machines <= cluster.nodes
        ranks = each.tensor * each.pipeline * each.data
        assert ranks % each.machines == 0
        assert ranks // each.machines <= cluster.gpus
        assert each.nodes == 1 or each.data == 1
        assert not each.experts or (LOADS[name].shape.experts and ranks // each.pipeline <= LOADS[name].shape.experts)


def test_weights_and_cache_of_a_dense_model() -> None:
    load, cluster = LOADS["70B"], Cluster(2, 8, gib(80))
    assert cluster.usable == int(gib(80) * 0.92) - gib(2)
    one = estimate(load, cluster, Layout(4, 2))
    assert one.weights == (gib(127) / 2 + gib(4)) / 4
    assert one.room == cluster.usable - one.weights
    assert one.concurrency == one.room / kv_bytes(load.shape, 8192, tensor=4, pipeline=2)
    # Copies don't make a copy smaller, and a stage of 27 of the 80 layers is the fullest of three.
    assert estimate(load, cluster, Layout(4, 2, 2, 1)).weights == one.weights
    assert estimate(load, cluster, Layout(1, 3)).weights == int(gib(127) * 27 / 80 + gib(4))


def test_experts_are_shared_by_all_ranks() -> None:
    load, cluster = LOADS["DeepSeek"], Cluster(2, 8, gib(80))
    assert estimate(load, cluster, Layout(2, 1, 8, 4, experts=True)).weights == gib(10) + gib(610) // 16
    # 256 experts on 24 ranks: some have eleven.
    many = estimate(load, cluster, Layout(1, 1, 24, 8, experts=True)).weights
    assert many == int(gib(20) + gib(610) * 11 / 256)
    # A latent cache is whole on each GPU.
    whole = kv_bytes(load.shape, 32768)
    assert kv_bytes(load.shape, 32768, tensor=8) == whole


def test_a_model_without_a_cache() -> None:
    raw = LLAMA_70B | {"model_type": "unknown", "layer_types": ["mamba"] * 80}
    load = Load(shape_of(raw), Weights(gib(10)), 8192)
    assert estimate(load, Cluster(1, 1, gib(80)), Layout()).concurrency == math.inf
    assert not estimate(load, Cluster(1, 1, gib(8)), Layout()).fits


@pytest.mark.parametrize(
    ("raw", "layout", "reason"),
    [
        (LLAMA_70B, Layout(8), ""),
        (LLAMA_70B, Layout(16), ""),
        (LLAMA_70B, Layout(3), "64 heads are not divisible by 3"),
        (LLAMA_70B | {"num_key_value_heads": 6}, Layout(4), "6 KV heads can't be shared by 4"),
        (LLAMA_70B | {"intermediate_size": 28674}, Layout(4), "layers of width 28674 can't be cut into 4"),
        (LLAMA_70B, Layout(1, 81), "80 layers are fewer than 81 stages"),
        (DEEPSEEK_V3, Layout(8), ""),
        (QWEN3_30B_FP8, Layout(1), ""),
        (QWEN3_30B_FP8, Layout(2), ""),
        (
            QWEN3_30B_FP8,
            Layout(8),
            "experts of width 768 can't be cut into 8 at multiples of 128, which share a scale",
        ),
        (QWEN3_30B_FP8, Layout(2, 1, 8, 8, experts=True), ""),
        (
            LLAMA_70B | {"quantization_config": {"quant_method": "gptq", "group_size": 2048}},
            Layout(8),
            "layers of width 28672 can't be cut into 8 at multiples of 2048, which share a scale",
        ),
    ],
)
def test_what_vllm_would_refuse(raw: dict[str, object], layout: Layout, reason: str) -> None:
    assert refused(shape_of(raw), layout) == reason


@pytest.mark.parametrize(
    ("name", "context", "machines", "words"),
    [
        ("405B", 32768, (1, 8, 80), "of which 71.6 are usable; 2 machines of this kind would do"),
        ("70B", 8192, (1, 1, 80), "the weights take 131.0 GiB of a GPU, of which 71.6 are usable; 2 machines"),
        ("70B", 131072, (1, 2, 80), "no room for one request of 131072 tokens; --max-model-len "),
        ("70B", 8192, (1, 8, 2), "of which 0.0 are usable; no number of machines of this kind would do"),
    ],
)
def test_what_would_do_where_nothing_fits(name: str, context: int, machines: tuple[int, int, int], words: str) -> None:
    nodes, gpus, memory = machines
    load = Load(LOADS[name].shape, LOADS[name].weights, context)
    cluster = Cluster(nodes, gpus, gib(memory))
    assert choose(all_of(load, cluster)) is None
    text = str(shortfall(load, cluster, lambda _: True))
    assert words in text
    if "--max-model-len" in text:
        shorter = int(text.partition("--max-model-len ")[2].partition(" ")[0])
        assert choose(all_of(Load(load.shape, load.weights, shorter), cluster))
        assert not choose(all_of(Load(load.shape, load.weights, shorter + 1), cluster))


def test_sizes_that_were_asked_for() -> None:
    load, cluster = LOADS["70B"], Cluster(1, 8, gib(80))
    assert "5" not in str(shortfall(load, cluster, lambda each: each.tensor == 5))
    assert "sizes that were asked for" in str(shortfall(load, cluster, lambda each: each.tensor == 5))
    assert "131.0 GiB" in str(shortfall(load, cluster, lambda each: each.tensor == each.pipeline == 1))
    moe = str(shortfall(LOADS["Qwen3 MoE"], cluster, lambda each: each.tensor == 8 and each.data == 1))
    assert "can't be cut into 8" in moe
