"""What a rerank refuses, how it orders, and what a model's files say of how it ranks."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment
from transformers import AutoTokenizer
from vllm.config import ModelConfig

from common.engine_args import plan_load
from common.engine_config import configure
from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.ranking import best_first, check, input_fields
from common.reranker_files import is_score_template, read_template, score_template
from tests.models import ensure, judge
from tests.models.judge import CHAT_TEMPLATE

CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"query": "", "documents": ["a"]}, "query: is empty"),
        ({"query": "q"}, "documents: is empty"),
        ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n: -1 is negative"),
        ({"query": "q", "documents": ["a"] * 4}, "documents: has 4; at most 3"),
        ({"query": " " * 2_000_001, "documents": ["a"]}, "query: has 2000001 characters"),
        ({"query": "q", "documents": ["a", " " * 2_000_001]}, r"documents\[1\]: has 2000001 characters"),
    ],
)
def test_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        check(pb.RerankRequest(**fields), most=3)


def test_more_than_is_read_in_pairs() -> None:
    request = pb.RerankRequest(query="q" * 1_999_999, documents=["a"] * 10)
    check(request, 11, reads_pairs=True)
    request.documents.append("b")
    check(request, 11)
    with pytest.raises(InvalidRequest, match=r"^documents: have, each with the query, 22000000 characters together; "):
        check(request, 11, reads_pairs=True)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1e30])))
def test_order(scores: list[float]) -> None:
    order = best_first(scores)
    assert sorted(order) == list(range(len(scores)))
    for first, second in itertools.pairwise(order):
        assert scores[first] > scores[second] or (scores[first] == scores[second] and first < second)


def test_names_of_inputs() -> None:
    assert input_fields(3, 2) == ["query", "documents[0]", "documents[1]"]
    assert input_fields(2, 2) == ["query with documents[0]", "query with documents[1]"]
    assert input_fields(1, 2) == ["query with documents"]


def loaded(model: Path, **fields: Any) -> ModelConfig:
    """The configuration that a load for ranking comes to."""
    wire = pb.ModelOptions(Model=str(model), DType="float32", **{"Reranking": True} | fields)
    config, _ = configure(plan_load(wire))
    return config.model_config


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the judge whose files a test changes."""
    return Path(shutil.copytree(ensure("judge"), tmp_path / "judge"))


def test_the_files_say_how_a_language_model_ranks() -> None:
    config = loaded(ensure("judge"))
    assert config.architecture == "LlamaForSequenceClassification"
    assert config.hf_config.classifier_from_token == [judge.NO, judge.YES]
    assert config.hf_config.method == "from_2_way_softmax"
    assert config.hf_config.num_labels == 1
    assert config.hf_config.sentence_transformers == {"activation_fn": "torch.nn.modules.linear.Identity"}


def test_a_head_of_one_token(changed: Path) -> None:
    head = json.loads((changed / "1_Score/config.json").read_text())
    (changed / "1_Score/config.json").write_text(json.dumps(head | {"false_token_id": None}))
    config = loaded(changed)
    assert config.hf_config.classifier_from_token == [judge.YES]
    assert config.hf_config.method == "no_post_processing"


def test_other_overrides_stay() -> None:
    config = loaded(ensure("judge"), EngineArgs='{"hf_overrides": {"rms_norm_eps": 0.25}}')
    assert config.hf_config.rms_norm_eps == 0.25
    assert config.hf_config.classifier_from_token == [judge.NO, judge.YES]


def test_a_user_knows_better() -> None:
    overrides = {
        "architectures": ["LlamaForSequenceClassification"],
        "classifier_from_token": ["yes", "no"],
        "method": "from_2_way_softmax",
    }
    config = loaded(ensure("judge"), EngineArgs=json.dumps({"hf_overrides": overrides}))
    assert config.hf_config.classifier_from_token == ["yes", "no"]
    assert loaded(ensure("judge"), EngineArgs='{"convert": "embed"}').convert_type == "embed"


def test_a_language_model_that_does_not_say_is_refused(changed: Path) -> None:
    (changed / "modules.json").unlink()
    with pytest.raises(InvalidRequest, match=r"Reranking: .*LlamaForSequenceClassification.*convert"):
        loaded(changed)
    assert loaded(changed, Reranking=False, Embeddings=True).convert_type == "embed"


def test_a_language_model_that_embeds_is_not(changed: Path) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (changed / "modules.json").write_text(json.dumps(modules))
    (changed / "1_Pooling").mkdir()
    (changed / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    assert loaded(changed).convert_type == "embed"


def test_an_encoder_is_left_alone() -> None:
    assert loaded(ensure("berts") / "cross_encoder").architecture == "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (CHAT_TEMPLATE, True),
        (CHAT, False),
        ('{% for m in messages if m.role == "query" %}{{ m.content }}{% endfor %}', False),
        ("query and document", False),
        ("{{ broken", False),
    ],
)
def test_templates_for_ranking_name_both_roles(text: str, is_one: bool) -> None:
    assert is_score_template(text) == is_one


def tokenizer(template: str) -> Any:
    found = AutoTokenizer.from_pretrained(ensure("judge"))
    found.chat_template = template
    return found


def test_the_template_of_a_reranker() -> None:
    config = loaded(ensure("judge"))
    own = score_template(config, tokenizer(CHAT_TEMPLATE), None)
    assert own.text == CHAT_TEMPLATE
    assert own.kwargs == {"add_generation_prompt": True}
    assert score_template(config, tokenizer(CHAT_TEMPLATE), CHAT).text == CHAT


def test_a_prompt_that_vllm_does_not_add(changed: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"prompts": {"web": "Search the web."}, "default_prompt_name": "web"}
    (changed / "config_sentence_transformers.json").write_text(json.dumps(settings))
    score_template(loaded(changed), tokenizer(CHAT_TEMPLATE), None)
    assert "default prompt 'web' is not used" in caplog.text


def test_a_template_for_chats_is_none(caplog: pytest.LogCaptureFixture) -> None:
    assert score_template(loaded(ensure("judge")), tokenizer(CHAT), None).text is None
    assert "score_template:FILE" in caplog.text


def test_the_prompt_of_qwen3_reranker() -> None:
    overrides = {
        "architectures": ["LlamaForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "method": "from_2_way_softmax",
        "is_original_qwen3_reranker": True,
    }
    config = loaded(ensure("judge"), EngineArgs=json.dumps({"hf_overrides": overrides}))
    text = score_template(config, tokenizer(CHAT), None).text
    assert text is not None
    messages = [{"role": "query", "content": "Who <b>?"}, {"role": "document", "content": "Me.\n"}]
    assert Environment(autoescape=False).from_string(text).render(messages=messages) == (  # noqa: S701  # no page
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
        ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a'
        " web search query, retrieve relevant passages that answer the query\n<Query>: Who <b>?\n<Document>: Me.\n"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_file_with_a_template(tmp_path: Path) -> None:
    (tmp_path / "score.jinja").write_text(CHAT_TEMPLATE)
    assert read_template("score.jinja", str(tmp_path)) == CHAT_TEMPLATE
    assert read_template(str(tmp_path / "score.jinja"), "/elsewhere") == CHAT_TEMPLATE
    (tmp_path / "broken").write_text("{{ broken")
    for name in ("broken", "missing", "."):
        with pytest.raises(InvalidRequest, match=f"score_template:{name} "):
            read_template(name, str(tmp_path))


def test_a_template_is_for_models_that_rank(tmp_path: Path) -> None:
    (tmp_path / "score.jinja").write_text(CHAT_TEMPLATE)
    options: dict[str, Any] = {
        "Model": "org/name",
        "ModelPath": str(tmp_path),
        "Options": ["score_template:score.jinja"],
    }
    assert plan_load(pb.ModelOptions(**options, Reranking=True)).score_template == CHAT_TEMPLATE
    with pytest.raises(InvalidRequest, match="Reranking"):
        plan_load(pb.ModelOptions(**options))
