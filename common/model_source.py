"""Which folder, file or hub id `ModelOptions` name as the model."""

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from common import gguf_file
from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb


def resolve_model(options: pb.ModelOptions) -> str:
    """The folder, GGUF file or hub id to load: ModelFile where it exists, else Model, also below ModelPath.

    Raises:
        InvalidRequest: neither names a folder or a file that can be loaded, or could be a hub id.

    """
    name = options.Model.strip()
    candidates = [options.ModelFile, name]
    if options.ModelPath and name:
        candidates.append(os.path.join(options.ModelPath, name))
    for candidate in candidates:
        if candidate and os.path.isdir(candidate):
            return str(_in_folder(Path(candidate)).absolute())
        if candidate and os.path.isfile(candidate):
            return str(_gguf_file(Path(candidate)).absolute())
    if not name:
        raise InvalidRequest("Model", "is empty; give a model folder, a GGUF file or a hub id")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InvalidRequest(
            "Model", f"{name!r} is neither an existing folder nor a hub id such as Qwen/Qwen3-0.6B"
        ) from None
    return name


def _in_folder(folder: Path) -> Path:
    """The folder, or the GGUF file that is all it has."""
    if any((folder / name).exists() for name in ("config.json", "params.json")):
        return folder
    files = sorted(path for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    if len(files) == 1:
        return _gguf_file(files[0])
    if files:
        names = ", ".join(path.name for path in files)
        raise InvalidRequest("Model", f"{folder} has no config.json and several GGUF files; give one of {names}")
    raise InvalidRequest("Model", f"{folder} has no config.json; a Hugging Face model folder has one")


def _gguf_file(path: Path) -> Path:
    try:
        if gguf_file.is_gguf(path):
            return path
    except OSError as error:
        raise InvalidRequest("Model", f"{path}: {error.strerror}") from error
    raise InvalidRequest("Model", f"{path} is a file; give a Hugging Face model folder, a GGUF file or a hub id")
