"""LoRA adapters: those that are loaded with a model, and the one that a request is answered with."""

import dataclasses
import json
import logging
import math
import os
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from vllm.config import ModelConfig
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from common.errors import InvalidRequest, LoadFailed
from common.pb import backend_pb2 as pb
from common.wording import first_problem

logger = logging.getLogger(__name__)

# vLLM's CPU kernels take the last slot for "no adapter" in a batch of several requests: it must stay empty.
_SPARE = 1 if current_platform.is_cpu() else 0
CONFIG_FILE = "adapter_config.json"
NONE = "none"  # what a request calls the base model
REQUEST_FIELD = 'Metadata["lora"]'


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter to load."""

    name: str
    path: str
    """A folder with adapter_config.json."""
    rank: int
    scale: float = 1.0
    """What its weights are multiplied with, besides the alpha / rank that it was trained with."""


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """The adapters of a model."""

    adapters: tuple[Adapter, ...] = ()
    default: str = NONE
    """The name of the one for requests that name none."""

    @property
    def engine_args(self) -> dict[str, Any]:
        """The engine arguments with room for all of them in one batch."""
        if not self.adapters:
            return {}
        highest = max(adapter.rank for adapter in self.adapters)
        rank = min(rank for rank in typing.get_args(MaxLoRARanks) if rank >= highest)
        return {"enable_lora": True, "max_loras": len(self.adapters) + _SPARE, "max_lora_rank": rank}

    def check(self, engine_args: Mapping[str, Any]) -> None:
        """Raise InvalidRequest where a user's engine arguments would give answers by the wrong adapter."""
        least = len(self.adapters) + _SPARE
        if _SPARE and self.adapters and engine_args["max_loras"] < least:
            raise InvalidRequest("max_loras", f"use {least} or more with {len(self.adapters)} adapters on a CPU")

    def check_model(self, config: ModelConfig) -> None:
        """Raise InvalidRequest where the model is one that vLLM can't apply an adapter to as a whole."""
        # Its table of adapters has a row for each token of the decoder; what the encoder computes, and the decoder's
        # attention to that, has others. On a CPU the engine dies of it, on a GPU most rows go without.
        if self.adapters and config.is_encoder_decoder:
            raise InvalidRequest(
                "LoraAdapter, LoraAdapters",
                f"vLLM can't apply one to {config.architecture}, whose encoder is a part of its own; merge the adapter"
                " into the model's weights",
            )


NO_ADAPTERS = AdapterPlan()


def plan_adapters(options: pb.ModelOptions, model: str) -> AdapterPlan:
    """The adapters that `options` name, for the model in the folder `model`. Fetches those that are hub ids.

    LoraAdapter is the default of requests. Without it, LoraAdapters' only one is, and of several none.

    Raises:
        InvalidRequest: an adapter that can't be used, a name given twice, or a scale that belongs to none.

    """
    scales = list(options.LoraScales)
    if len(scales) > len(options.LoraAdapters):
        raise InvalidRequest("LoraScales", f"has {len(scales)} numbers for {len(options.LoraAdapters)} LoraAdapters")
    if options.LoraScale and not options.LoraAdapter:
        logger.warning("LoraScale: there is no LoraAdapter to scale; the value %g has no effect", options.LoraScale)
    scales += [0.0] * (len(options.LoraAdapters) - len(scales))
    folders = [folder for folder in (options.ModelPath, model, os.path.dirname(model)) if os.path.isdir(folder)]
    single = [_adapter("LoraAdapter", options.LoraAdapter, options.LoraScale, folders)] if options.LoraAdapter else []
    adapters = single + [
        _adapter(f"LoraAdapters[{index}]", entry, scale, folders)
        for index, (entry, scale) in enumerate(zip(options.LoraAdapters, scales, strict=True))
    ]
    names = [adapter.name for adapter in adapters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest("LoraAdapters", f"two adapters are called {twice!r}; write one as NAME={twice}")
    default = names[0] if single or len(names) == 1 else NONE
    return AdapterPlan(tuple(adapters), default)


class Adapters:
    """The adapters of a running engine."""

    def __init__(self, plan: AdapterPlan) -> None:
        self._plan = plan
        self._default = plan.default
        self._scaled: tempfile.TemporaryDirectory[str] | None = None
        self._requests = {
            adapter.name: LoRARequest(adapter.name, number, self._folder(adapter))
            for number, adapter in enumerate(plan.adapters, 1)
        }

    async def load(self, llm: AsyncLLM) -> None:
        """Have the engine load all of them, so that one which doesn't fit the model is heard of now.

        Raises:
            LoadFailed: an adapter doesn't fit the model.

        """
        for name, request in self._requests.items():
            try:
                await llm.add_lora(request)
            except Exception as error:
                msg = f"LoRA adapter {name!r} can't be loaded: {first_problem(error)}"
                raise LoadFailed(msg) from error
        if self._requests:
            logger.info("load: adapters %s; requests that name none get %s", ", ".join(self._requests), self._default)

    def pick(self, name: str) -> LoRARequest | None:
        """The adapter that a request asks for, or the default where `name` is empty; None for the base model.

        Raises:
            InvalidRequest: no adapter of that name is loaded.

        """
        name = name or self._default
        if name == NONE:
            return None
        if name not in self._requests:
            allowed = ", ".join([*self._requests, f"{NONE} for the base model"])
            raise InvalidRequest(REQUEST_FIELD, f"no adapter {name[:80]!r} is loaded; use {allowed}")
        return self._requests[name]

    @property
    def as_loaded(self) -> AdapterPlan:
        """The plan for another client of this engine: the same adapters, out of the folders that it has them from."""
        adapters = [
            dataclasses.replace(adapter, path=self._requests[adapter.name].lora_path, scale=1.0)
            for adapter in self._plan.adapters
        ]
        return dataclasses.replace(self._plan, adapters=tuple(adapters))

    def close(self) -> None:
        """Remove what was written for the engine, which has ended."""
        if self._scaled is not None:
            self._scaled.cleanup()

    def _folder(self, adapter: Adapter) -> str:
        """The adapter as vLLM takes it, which knows no scale: with the scale in its configuration's alpha."""
        if adapter.scale == 1.0:
            return adapter.path
        self._scaled = self._scaled or tempfile.TemporaryDirectory(prefix="lora-")
        folder = Path(tempfile.mkdtemp(dir=self._scaled.name))
        for file in Path(adapter.path).iterdir():
            if file.name != CONFIG_FILE:
                folder.joinpath(file.name).symlink_to(file)
        config = _config(adapter.path)
        config["lora_alpha"] *= adapter.scale
        patterns = config.get("alpha_pattern") or {}
        config["alpha_pattern"] = {module: alpha * adapter.scale for module, alpha in patterns.items()}
        folder.joinpath(CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        return str(folder)


def _adapter(field: str, entry: str, scale: float, folders: Sequence[str]) -> Adapter:
    """`NAME=PATH`, or a path whose last part is the name."""
    name, separator, path = entry.partition("=")
    if not separator:
        name, path = os.path.basename(entry.rstrip("/")), entry
    if name in ("", NONE):
        raise InvalidRequest(field, f"{entry!r} needs a name other than {NONE!r}: NAME=PATH")
    if not math.isfinite(scale):
        raise InvalidRequest(field.replace("Adapter", "Scale"), f"{scale} is not a number that can be used")
    path = _located(field, path, folders)
    try:
        # All that vLLM would refuse at the first use.
        helper = PEFTHelper.from_dict(_config(path))
        rank = max(helper.r, *helper.rank_pattern.values(), 1)
        helper.validate_legal(LoRAConfig(max_lora_rank=max(typing.get_args(MaxLoRARanks))))
    except (ValueError, TypeError, OSError) as error:
        raise InvalidRequest(field, f"{path}: {first_problem(error)}") from error
    # The wire carries 32-bit floats: 0.3 arrives as 0.30000001192092896.
    return Adapter(name, path, rank, float(f"{scale:.7g}") or 1.0)


def _located(field: str, path: str, folders: Sequence[str]) -> str:
    for folder in ("", *folders):
        candidate = os.path.join(folder, path)
        if os.path.isdir(candidate):
            if not os.path.isfile(os.path.join(candidate, CONFIG_FILE)):
                raise InvalidRequest(field, f"{candidate} has no {CONFIG_FILE}; an adapter's folder has one")
            return os.path.abspath(candidate)
    try:
        validate_repo_id(path)
        return str(snapshot_download(path))
    except HFValidationError:
        problem = "is neither a folder nor a hub id"
    except Exception as error:  # noqa: BLE001  # offline, unknown, private: the hub's client has many kinds
        problem = f"is no folder, and the hub has it not: {first_problem(error)}"
    raise InvalidRequest(field, f"{path} {problem}")


def _config(folder: str) -> dict[str, Any]:
    config = json.loads(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        msg = f"{CONFIG_FILE} is no JSON object"
        raise ValueError(msg)  # noqa: TRY004  # as for JSON that can't be read
    return config
