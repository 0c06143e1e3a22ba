"""What the process does that converts a GGUF file: a Hugging Face folder, by transformers, in place when complete."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gguf

from common import gguf_file, gguf_words, rotary
from common.gguf_file import GGUFFile, Unconvertible

STAGE, WARNING, PROBLEM = "stage", "warning", "problem"
_SOURCE_FILE = "source.json"
_STEPS = 4  # in which progress is told
_SHARD = "2GB"

Say = Callable[..., None]


def beside(folder: Path) -> tuple[Path, Path]:
    """The lock and the unfinished form of a folder that is being made."""
    return folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.partial")


def run(source: str, folder: str, stored_as: str | None, channel: Connection) -> None:
    """Make `folder` of the file `source` unless it is there; `stored_as` None: without weights.

    Through `channel` go (STAGE, what is done now), (WARNING, one sentence), and (PROBLEM, one sentence) where it fails.
    """
    # Nothing is fetched, and stderr is the server's log.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

    def say(text: str, kind: str = STAGE) -> None:
        channel.send((kind, text))

    try:
        _make(source, Path(folder), stored_as, say)
    except (Unconvertible, gguf_file.BrokenGGUF) as problem:
        channel.send((PROBLEM, str(problem)))
    except MemoryError:
        channel.send((PROBLEM, "there is not enough memory"))
    except OSError as error:
        channel.send((PROBLEM, f"{error.filename or folder}: {error.strerror or error}"))
    except BaseException as error:  # noqa: BLE001  # a panic in the library of tokenizers is no Exception
        channel.send((PROBLEM, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))


def _make(source: str, folder: Path, stored_as: str | None, say: Say) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, partial = beside(folder)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that converts the same file")
            fcntl.flock(file, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _convert(source, partial, stored_as, say)
        (partial / _SOURCE_FILE).write_text(json.dumps({"source": os.path.realpath(source)}), encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes for its user alone
            _to_disk(path)
        partial.rename(folder)
        _to_disk(folder.parent)
    _remove_older(folder)


def _convert(source: str, into: Path, stored_as: str | None, say: Say) -> None:
    say("importing transformers")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES

    file = gguf_file.read(source, with_words=True)
    # Alone in a folder: beside it may lie the configuration or the tokenizer of another model.
    with tempfile.TemporaryDirectory(prefix="gguf-") as alone:
        name = "model.gguf"
        Path(alone, name).symlink_to(os.path.abspath(source))
        say("reading the vocabulary")
        if file.metadata.get("tokenizer.ggml.model") in GGUF_TOKENIZER_TYPES:
            if doubt := gguf_words.warning(file):
                say(doubt, WARNING)
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=name)
            gguf_words.complete(tokenizer, file)
            tokenizer.save_pretrained(into)
        config = AutoConfig.from_pretrained(alone, gguf_file=name)
        rotary.complete(config, file, source)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        _check_names(empty, file)
        config.architectures = [type(empty).__name__]
        if stored_as is not None:
            with _progress(file.elements, say):
                model, found = AutoModelForCausalLM.from_pretrained(
                    alone,
                    config=config,
                    gguf_file=name,
                    dtype=getattr(torch, stored_as),
                    quantization_config=GgufConfig(dequantize=True),
                    output_loading_info=True,
                )
            if missing := sorted(found["missing_keys"]):
                raise Unconvertible(f"it has no weights for {_some(missing)}")
            # transformers compares no shapes where there is a quantizer.
            shapes = {name: weight.shape for name, weight in empty.state_dict().items()}
            if other := sorted(name for name, weight in model.state_dict().items() if weight.shape != shapes[name]):
                raise Unconvertible(f"its metadata describe another shape for {_some(other)}")
            if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
                raise Unconvertible(f"some of its weights are no numbers, or beyond what {stored_as} holds")
            say("writing the weights")
            # transformers saves no model that has a quantizer, and experts stacked unless it looks up how they were.
            model.hf_quantizer = model._weight_conversions = None
            with contextlib.suppress(AttributeError):
                del model.config.quantization_config
            model.save_pretrained(into, max_shard_size=_SHARD)
    # What dtype auto goes by. Models made for bfloat16 overflow in float16, whatever their weights are stored as.
    config.dtype = torch.float32 if stored_as == "float32" else torch.bfloat16
    config.save_pretrained(into)
    ends = gguf_words.ends(file)
    bos, pad = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding"))
    GenerationConfig(bos_token_id=bos, pad_token_id=pad, eos_token_id=ends or None).save_pretrained(into)


def _check_names(model: Any, file: GGUFFile) -> None:
    """Raise Unconvertible where the file has weights that transformers would drop without a word."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.integrations.gguf import GGUF_ARCHS

    if file.architecture in GGUF_ARCHS:
        return
    processor = legacy.TENSOR_PROCESSORS.get(file.architecture, legacy.TensorProcessor)(config=model.config.to_dict())
    known = legacy.get_gguf_hf_weights_map(model, processor)
    lost = [
        tensor.name
        for tensor in file.tensors
        if tensor.name not in known
        and tensor.name.removesuffix(".weight") not in known  # stacked experts
        and not rotary.is_about(tensor.name)
    ]
    if lost:
        raise Unconvertible(f"transformers has no place in {type(model).__name__} for {_some(lost)}")


@contextlib.contextmanager
def _progress(elements: int, say: Say) -> Iterator[None]:
    """Say how many of the weights are unpacked. transformers does it by `gguf.dequantize`, one tensor a call."""
    plain, done, step = gguf.dequantize, 0, 0
    say("unpacking the weights")

    def counting(*args: Any) -> Any:
        nonlocal done, step
        weights = plain(*args)
        done += weights.size
        while step < _STEPS - 1 and done * _STEPS >= elements * (step + 1):
            step += 1
            say(f"unpacking the weights, {step * 100 // _STEPS} % done")
        return weights

    gguf.dequantize = counting
    try:
        yield
    finally:
        gguf.dequantize = plain


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_older(folder: Path) -> None:
    """Remove what was made of earlier versions of the same file, and is not in use, and what killed processes left."""
    for partial in folder.parent.glob(".*.partial"):
        with contextlib.suppress(OSError), partial.with_suffix(".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial)
    mine = json.loads((folder / _SOURCE_FILE).read_text(encoding="utf-8"))
    for other in folder.parent.glob(f"*/{_SOURCE_FILE}"):
        with contextlib.suppress(OSError, ValueError):
            if other.parent == folder or json.loads(other.read_text(encoding="utf-8")) != mine:
                continue
            held = os.open(other.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other.parent)
                beside(other.parent)[0].unlink(missing_ok=True)
            finally:
                os.close(held)
