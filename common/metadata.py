"""ModelMetadata: what a client would want to know of the loaded model."""

from common.generation import Generator
from common.pb import backend_pb2 as pb


async def model_metadata(generator: Generator | None, options: pb.ModelOptions) -> pb.ModelMetadataResponse:
    """Computed from the loaded model, its tokenizer, template and parsers."""
    raise NotImplementedError
