"""What a reranker's files say of how it ranks: the head that vLLM has to give a language model, and its template.

Language models that rank answer with one token, such as "yes" or "no". sentence-transformers writes which tokens these
are into the model's folder (`modules.json`: a Transformer, then a LogitScore), and what the prompt looks like into its
chat template, whose roles are then `query` and `document`.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import get_model_cls
from vllm.model_executor.models.interfaces import supports_score_template
from vllm.renderers.hf import resolve_chat_template
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.config import get_pooling_config
from vllm.transformers_utils.repo_utils import file_or_path_exists, get_hf_file_to_dict

from common.errors import InvalidRequest

logger = logging.getLogger(__name__)

WRITES_TEXT = ("ForCausalLM", "ForConditionalGeneration")
# What a user says of such a model in `hf_overrides`.
_HEAD_KEYS = ("architectures", "classifier_from_token", "method", "is_original_qwen3_reranker")
_ROLES = {"query", "document"}
_QWEN3_TEMPLATE = Path(__file__).with_name("qwen3_reranker.jinja")


@dataclasses.dataclass(frozen=True)
class ScoreTemplate:
    """How a cross-encoder's prompt is put together."""

    text: str | None = None
    """Jinja over `messages` of the roles query and document; None: as vLLM does it for the model."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def head_overrides(config: ModelConfig, engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The `hf_overrides` that make a language model a reranker; {} for other models and where a user says how.

    Raises:
        InvalidRequest: a language model, and neither its files nor the user say how it ranks.

    """
    given = engine_args.get("hf_overrides") or {}
    if config.runner_type != "pooling" or engine_args.get("convert", "auto") != "auto":
        return {}
    if not config.architecture.endswith(WRITES_TEXT) or any(key in given for key in _HEAD_KEYS):
        return {}
    head = _module(config, "LogitScore")
    if head is None:
        if get_pooling_config(config.model, config.revision) is None:
            raise InvalidRequest("Reranking", _how_to_rank(config.architecture))
        return {}  # an embedding model
    tokenizer = cached_tokenizer_from_config(config)
    ids = [head[name] for name in ("false_token_id", "true_token_id") if head.get(name) is not None]
    overrides = {
        "architectures": [_classifier(config.architecture)],
        "classifier_from_token": tokenizer.convert_ids_to_tokens(ids),
        "method": "from_2_way_softmax" if len(ids) == 2 else "no_post_processing",
    }
    activation = (_file(config, "config_sentence_transformers.json") or {}).get("activation_fn")
    if activation:
        overrides["sentence_transformers"] = {"activation_fn": activation}
    logger.info("load: a language model that ranks, by its modules.json: hf_overrides %s", overrides)
    return {**overrides, **given}


def score_template(config: ModelConfig, tokenizer: Any, given: str | None) -> ScoreTemplate:
    """The user's template, or the model's own where it is one for ranking, or the one that the family is known for."""
    if given:
        return ScoreTemplate(given)
    if supports_score_template(get_model_cls(config)):
        return ScoreTemplate()  # vLLM's code for the model has it
    own = resolve_chat_template(tokenizer, None, tools=None, model_config=config)
    if own and is_score_template(own):
        settings = _file(config, "config_sentence_transformers.json") or {}
        if settings.get("default_prompt_name"):
            logger.warning("load: the model's default prompt %r is not used", settings["default_prompt_name"])
        processing = (_file(config, "sentence_bert_config.json") or {}).get("processing_kwargs", {})
        return ScoreTemplate(own, processing.get("chat_template", {}))
    if getattr(config.hf_config, "is_original_qwen3_reranker", False):
        logger.info("load: the prompts that Qwen3-Reranker is trained with, since its files have no template for them")
        return ScoreTemplate(_QWEN3_TEMPLATE.read_text(encoding="utf-8"))
    if config.convert_type == "classify":
        logger.warning(
            "load: the model's files have no template for query and document, which are joined as they are;"
            " if it was trained with one, set Options score_template:FILE"
        )
    return ScoreTemplate()


def is_score_template(text: str) -> bool:
    """Whether a template has roles for a query and a document; templates for chats print roles, but name others."""
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(text)  # noqa: S701  # parsed only
    except jinja2.TemplateSyntaxError:
        return False
    return {node.value for node in parsed.find_all(jinja2.nodes.Const)} >= _ROLES


def read_template(name: str, folder: str) -> str:
    """The template in a file, absolute or below `folder`.

    Raises:
        InvalidRequest: no such file, or no template in it.

    """
    path = Path(folder, name)
    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(text)  # noqa: S701  # parsed only
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise InvalidRequest("Options", f"score_template:{name} is no file with a Jinja template: {error}") from error
    return text


def _module(config: ModelConfig, kind: str) -> dict[str, Any] | None:
    """The settings of the first module of a kind, of those that sentence-transformers chains."""
    for module in _file(config, "modules.json") or []:
        if str(module.get("type", "")).rpartition(".")[2] == kind:
            return _file(config, f"{module['path']}/config.json") or {}
    return None


def _file(config: ModelConfig, name: str) -> Any:
    """A JSON file of the model; None: it has none of that name."""
    if not file_or_path_exists(config.model, name, config.revision):
        return None
    return get_hf_file_to_dict(name, config.model, config.revision)


def _classifier(architecture: str) -> str:
    for suffix in WRITES_TEXT:
        architecture = architecture.removesuffix(suffix)
    return f"{architecture}ForSequenceClassification"


def _how_to_rank(architecture: str) -> str:
    return (
        f"{architecture} writes text, and its files do not say how it ranks. For a model that answers with a token, set"
        f' EngineArgs {{"hf_overrides": {{"architectures": ["{_classifier(architecture)}"], "classifier_from_token":'
        ' ["no", "yes"], "method": "from_2_way_softmax"}}, with its own tokens; to compare embeddings, set'
        ' {"convert": "embed"}'
    )
