from types import SimpleNamespace
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker.gpu_worker import Worker

from common.worker_memory import EXTENSION, METHOD, MemoryReport


def tied() -> Any:
    """Two layers that share their weights, and a buffer: 264 bytes."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.zeros(4, dtype=torch.float16))
    return model


def report(model: Any, draft: Any, caches: Any) -> dict[str, int]:
    worker = MemoryReport()
    worker.model_runner = SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: draft, kv_caches=caches)
    return worker.backend_memory()


def test_what_is_shared_counts_once() -> None:
    cache = torch.zeros(2, 16, dtype=torch.bfloat16)
    nested = [torch.zeros(8, dtype=torch.int8), torch.zeros(8, dtype=torch.int8)]
    # A layer that uses another one's cache, one whose state is in two tensors, one without.
    found = report(tied(), None, [cache, cache.view(4, 8), nested, None])
    assert found == {"weights": 264, "KV cache": 2 * 16 * 2 + 16}


def test_a_draft_model_counts() -> None:
    assert report(tied(), torch.nn.Linear(2, 2, bias=False), []) == {"weights": 264 + 16, "KV cache": 0}


def test_weights_that_a_kernel_has_packed_count_by_their_shape() -> None:
    column, row = (torch.nn.Linear(8, 4, bias=True, dtype=torch.bfloat16) for _ in range(2))
    for layer in (column, row):
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        layer.input_size, layer.output_size = 8, 4
    column.output_size_per_partition = 2  # of two ranks
    assert report(torch.nn.Sequential(column, row), None, []) == {
        "weights": (8 * 2 + 4) * 2 + (8 * 4 + 4) * 2,
        "KV cache": 0,
    }


def test_vllm_can_join_it_to_its_worker() -> None:
    assert resolve_obj_by_qualname(EXTENSION) is MemoryReport
    assert hasattr(MemoryReport, METHOD)
    # vLLM refuses an extension that would hide something of its own.
    assert not [name for name in vars(MemoryReport) if not name.startswith("__") and hasattr(Worker, name)]
