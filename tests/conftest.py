"""What the tests share: tiny random backbones laid out like a hub snapshot, handwritten questions, real data where it is.

Nothing is downloaded: the hub is switched off, and caches go to a temporary folder.
"""

import os
import tempfile

_CACHE = tempfile.mkdtemp(prefix="ptv2-tests-")
os.environ.update(HF_HOME=_CACHE, HF_DATASETS_CACHE=f"{_CACHE}/datasets", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from ptv2.squad import load_examples

REPOSITORY = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SHARED_DATA = Path(os.environ.get("PTV2_DATA", REPOSITORY.parent / "shared" / "data"))
SHARED_FILES = sorted(SHARED_DATA.glob("*_v1.*.json.gz")) if SHARED_DATA.is_dir() else []
# What tests on real questions run on: the embedded corpus always, the data in PTV2_DATA where it exists.
QUESTION_FILES = [file for file in SHARED_FILES if "predictions" not in file.name]
REAL_SOURCES = ["embedded", *map(str, QUESTION_FILES)]


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


def _sentences() -> list[str]:
    examples = load_examples("embedded", "dev")
    return [example.context for example in examples] + [example.question for example in examples]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A random BERT (2 layers, 4 heads, E = 32) and a WordPiece vocabulary of 2,000, in a directory."""
    path = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(_sentences(), trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False))
    vocabulary = path / "vocab.txt"
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    vocabulary.write_text("\n".join(word for word, _ in words), encoding="utf-8")
    BertTokenizerFast(vocab=dict(words), model_max_length=512).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory) -> Path:
    """A random RoBERTa (2 layers, 4 heads, E = 32) and a byte-level BPE vocabulary of 1,000, in a directory."""
    path = tmp_path_factory.mktemp("tiny-roberta")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=512, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=514, type_vocab_size=1, initializer_range=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(path)
    return path


@pytest.fixture(params=["tiny_bert", "tiny_roberta"])
def tiny_backbone(request) -> Path:
    """Both tiny backbones, in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def displayed(monkeypatch) -> list[tuple[dict, dict]]:
    """What the test displays as a notebook would, as (data by MIME type, metadata)."""
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata=None: outputs.append((data, metadata)))
    return outputs


@pytest.fixture
def built():
    """A function from a notebook's name to the namespace that its cells tagged `builds` leave, in order.

    Names that they use must come from such cells, too, or be given.
    """

    def build(notebook: str, **given) -> dict:
        cells = nbformat.read(REPOSITORY / "notebooks" / f"{notebook}.ipynb", 4).cells
        sources = [cell.source for cell in cells if cell.cell_type == "code" and "builds" in cell.metadata.get("tags", ())]
        assert sources, f"{notebook} has no cell tagged builds"
        namespace = {"__name__": notebook, **given}
        for source in sources:
            exec(source, namespace)
        return namespace

    return build
