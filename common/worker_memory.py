"""Inside the engine's workers: the bytes of weights and KV cache, by the tensors that hold them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

EXTENSION = f"{__name__}.MemoryReport"
METHOD = "backend_memory"


class MemoryReport:
    """Joined to vLLM's worker class by `worker_extension_cls`, so that `collective_rpc` finds its method by name."""

    model_runner: Any

    def backend_memory(self) -> dict[str, int]:
        """Bytes of this worker by what they are for. A KV cache is reserved whole, whatever of it is in use."""
        models = [self.model_runner.get_model(), self.model_runner.get_draft_model()]
        weights = sum(_bytes_of_model(model) for model in models if model is not None)
        return {"weights": weights, "KV cache": _bytes(_flat(self.model_runner.kv_caches))}


def _bytes_of_model(model: Any) -> int:
    packed = 0
    for layer in model.modules():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.numel() == 0 and hasattr(layer, "output_size"):
            # A kernel for CPUs has taken the weights into memory of its own, and left an empty tensor.
            rows = getattr(layer, "output_size_per_partition", layer.output_size)
            columns = getattr(layer, "input_size_per_partition", layer.input_size)
            packed += rows * columns * weight.element_size()
    return packed + _bytes(itertools.chain(model.parameters(), model.buffers()))


def _bytes(tensors: Iterable[Any]) -> int:
    """Of all storages; layers may share one."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _flat(caches: Any) -> Iterator[Any]:
    """Tensors out of lists of tensors: a layer with state of several kinds has a list."""
    if isinstance(caches, list | tuple):
        for cache in caches:
            yield from _flat(cache)
    elif caches is not None:
        yield caches
