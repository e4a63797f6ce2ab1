"""Backbones of known sizes with random weights: how fast they are does not depend on what they know, and no hub is needed."""

from pathlib import Path

import torch
from transformers import AutoModel, BertConfig, RobertaConfig

from ptv2.backbone import DEFAULT_BACKBONE, load_tokenizer, resolve_backbone

# BertConfig's own defaults are BERT-base's (Devlin et al., NAACL 2019); RoBERTa-large has BERT-large's shape (Liu et al., 2019).
# Words and segments are the default tokenizer's, RoBERTa's or not.
SHAPES = {
    "bert-base": BertConfig(),
    "roberta-large": RobertaConfig(
        vocab_size=30522, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=2,
    ),
}  # fmt: skip


def write_backbone(shape: str, folder: Path) -> None:
    """Write a backbone of a shape in SHAPES, with random weights and the default backbone's tokenizer, as a hub snapshot is laid out."""
    config = SHAPES[shape]
    tokenizer = load_tokenizer(resolve_backbone(DEFAULT_BACKBONE))
    config.update({"pad_token_id": tokenizer.pad_token_id})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
