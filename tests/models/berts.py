"""Toy BERTs (2 layers) of random weights: one for each thing that an encoder is asked for.

Their tokenizer folds case and strips accents, so that the characters of a token are not those of the text.
"""

import json
from pathlib import Path
from typing import Any

from tests.models import MakeError, toy

CONTEXT = 128
DIMENSION = 32  # of late interaction's vectors
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC", "B-A-B"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = """\
The capital of France is Paris, and Angela Merkel was born in Hamburg.
Die Straße führt über die Brücke nach Zürich; Jürgen Groß wohnt in Köln am Rhein.
北京是中国的首都。李明住在上海。東京は日本の首都です。
Ein Emoji 🎉 oder zwei 👩‍👩‍👧 und ein é aus zwei Zeichen, naïve café.
"""


def make(into: Path) -> None:
    """Fill `into` with a folder for each model: float32 safetensors, 1 MB in all."""
    try:
        from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = _tokenizer()

    def save(name: str, model_class: Any, **fields: Any) -> Path:
        folder = into / name
        folder.mkdir()
        tokenizer.save_pretrained(folder)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=toy.SPREAD,
            pad_token_id=tokenizer.pad_token_id,
            **fields,
        )
        toy.save(model_class, config, folder)
        return folder

    save("cross_encoder", BertForSequenceClassification, num_labels=1)
    save("bi_encoder", BertModel)
    _add_projection(save("late_interaction", BertModel))
    labels = dict(enumerate(LABELS))
    ids = {label: index for index, label in labels.items()}
    save("token_classifier", BertForTokenClassification, id2label=labels, label2id=ids)


def _tokenizer() -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    words.train_from_iterator(TEXT.splitlines(), trainer)
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def _add_projection(folder: Path) -> None:
    """Make a BERT ColBERT's: a linear layer over each token's vector."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["HF_ColBERT"]  # without "dim", with which vLLM can't load it
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(toy.SEED)
    weights["linear.weight"] = torch.randn(DIMENSION, config["hidden_size"], generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
