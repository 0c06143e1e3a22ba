"""Labels of tokens -> entities of a text, as Hugging Face's pipeline makes them of the same logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy

from common.token_classification import Token, classified, entities, on_the_wire
from tests.models import ensure, toy
from tests.models.berts import LABELS, TEXT

PLAIN = ["O", "PER", "LOC", "I-LOC", "B-", "-", "X-O", "O-X"]
TEXTS = [
    "Angela Merkel wohnt in Zürich, Jürgen Groß in Köln.",
    "李明住在上海。東京は日本の首都です。",
    "🎉 oder 👩‍👩‍👧 und 🇩🇪!",
    "e\u0301te\u0301 und n\u0303, cafe\u0301\u0323",
    "  vorn und hinten\t\n  ",
    "[SEP] geschrieben [CLS]",
    "İstanbul ǅ ﬁx ½ ẞ",
    "   ",
    "a",
]


def tokenizers() -> dict[str, Any]:
    """One that folds case and strips accents, and one whose tokens are pieces of UTF-8."""
    special = ["<pad>", "<s>", "</s>"]
    return {
        "wordpiece": AutoTokenizer.from_pretrained(ensure("berts") / "token_classifier"),
        "bytes": toy.tokenizer(special, "", TEXT[:80], {}),
    }


TOKENIZERS = tokenizers()


def pipeline(tokenizer: Any, labels: list[str]) -> Any:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=2,
        num_attention_heads=1,
        num_hidden_layers=1,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return TokenClassificationPipeline(model=BertForTokenClassification(config), tokenizer=tokenizer)


PIPELINES = {
    (name, labels is PLAIN): pipeline(tokenizer, labels)
    for name, tokenizer in TOKENIZERS.items()
    for labels in (LABELS, PLAIN)
}


def compare(text: str, name: str, plain: bool, seed: int, spread: float) -> None:
    reference, labels = PIPELINES[name, plain], PLAIN if plain else LABELS
    encoding = TOKENIZERS[name](text, return_offsets_mapping=True, return_special_tokens_mask=True)
    if not encoding["input_ids"]:
        return
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(encoding["input_ids"]), len(labels), generator=generator) * spread
    expected = reference.postprocess(
        [
            {
                "logits": logits[None],
                "sentence": text,
                **{
                    key: torch.tensor(encoding[key])[None]
                    for key in ("input_ids", "offset_mapping", "special_tokens_mask")
                },
            }
        ],
        aggregation_strategy=AggregationStrategy.SIMPLE,
    )
    tokens = classified(logits, dict(enumerate(labels)), encoding["offset_mapping"], encoding["special_tokens_mask"])
    found = on_the_wire(text, entities(tokens))
    assert [(entity.entity_group, entity.start, entity.end) for entity in found] == [
        (entity["entity_group"], len(text[: entity["start"]].encode()), len(text[: entity["end"]].encode()))
        for entity in expected
    ]
    assert [entity.score for entity in found] == pytest.approx([entity["score"] for entity in expected], abs=1e-6)
    for entity in found:
        assert entity.text.encode() == text.encode()[entity.start : entity.end]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("plain", [False, True], ids=["BIO", "plain"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_agrees_with_the_pipeline(text: str, name: str, plain: bool) -> None:
    for seed in range(5):
        compare(text, name, plain, seed, spread=3.0)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1),
    name=st.sampled_from(sorted(TOKENIZERS)),
    plain=st.booleans(),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_agrees_on_any_text(text: str, name: str, plain: bool, seed: int, spread: float) -> None:
    compare(text, name, plain, seed, spread)


@given(
    data=st.data(),
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"])),
)
def test_bytes_are_those_of_the_characters(data: st.DataObject, text: str) -> None:
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)))
    found = on_the_wire(text, [Token("PER", 1.0, start, end) for start, end in spans])
    whole = text.encode()
    assert [whole[entity.start : entity.end].decode() for entity in found] == [text[start:end] for start, end in spans]
    assert [entity.text for entity in found] == [text[start:end] for start, end in spans]


def tokens(*labels: str) -> list[Token]:
    return [Token(label, 0.5, index, index + 1) for index, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], []),
        (["O", "O"], []),
        (["B-PER", "I-PER", "O"], [("PER", 0, 2)]),
        (["B-PER", "B-PER"], [("PER", 0, 1), ("PER", 1, 2)]),
        (["I-PER", "I-PER"], [("PER", 0, 2)]),
        (["I-PER", "I-LOC"], [("PER", 0, 1), ("LOC", 1, 2)]),
        (["PER", "PER", "O", "PER"], [("PER", 0, 2), ("PER", 3, 4)]),
        (["B-PER", "PER"], [("PER", 0, 2)]),
    ],
)
def test_runs(labels: list[str], expected: list[tuple[str, int, int]]) -> None:
    assert [(entity.label, entity.start, entity.end) for entity in entities(tokens(*labels))] == expected


def test_scores_are_means() -> None:
    (entity,) = entities([Token("B-PER", 0.5, 0, 1), Token("I-PER", 1.0, 1, 2)])
    assert entity.score == 0.75


def test_what_is_no_number_is_no_answer() -> None:
    logits = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="not numbers"):
        list(classified(logits, {0: "O", 1: "PER"}, [(0, 1)], [0]))
