"""What a notebook builds in the open computes what the package computes; later notebooks import the package's."""

import pytest
import torch
from test_attention import CLOSE, make_batch, make_model

from ptv2.answers import AnswerConfig, best_spans
from ptv2.backbone import load_tokenizer, resolve_backbone
from ptv2.features import WindowConfig, make_features
from ptv2.inside import attention_to_prefix
from ptv2.squad import load_examples


@pytest.mark.parametrize(("max_length", "stride"), [(80, 0), (96, 32), (384, 128)])
def test_03_windows_and_labels(built, tiny_bert, max_length, stride):
    windows_by_hand = built("03_train_on_squad")["windows_by_hand"]
    tokenizer = load_tokenizer(resolve_backbone(str(tiny_bert)))
    examples = load_examples("embedded", "dev")
    features = make_features(examples, tokenizer, WindowConfig(max_length, stride, 40), cache=False)
    labels = zip(features["start_positions"], features["end_positions"], strict=True)
    wanted = list(zip(features["input_ids"], labels, strict=True))
    assert [window for example in examples for window in windows_by_hand(example, tokenizer, max_length, stride)] == wanted
    assert any(label == (0, 0) for _, label in wanted) and any(label != (0, 0) for _, label in wanted)


@pytest.mark.parametrize(("n", "longest"), [(1, 30), (20, 5), (7, 1)])
def test_03_n_best(built, n, longest):
    n_best_by_hand = built("03_train_on_squad")["n_best_by_hand"]
    generator = torch.Generator().manual_seed(n)
    start, end = torch.randn(2, 40, generator=generator)  # [S] each
    is_context = torch.arange(40) > 11
    found = best_spans(start[None], end[None], is_context[None], AnswerConfig(max_answer_length=longest, n_best=n))
    logits, first, last = (part[0].tolist() for part in found)
    assert n_best_by_hand(start, end, is_context, n, longest) == list(zip(logits, first, last, strict=True))


def test_07_attention_to_the_prefix(built, tiny_bert):
    shares_by_hand = built("07_inside_the_prefix")["shares_by_hand"]
    model = make_model(tiny_bert)
    batch = make_batch(model.backbone.config)
    found = attention_to_prefix(model, batch)
    wanted = shares_by_hand(tiny_bert, model.prefix_encoder().detach(), batch)
    assert wanted.std() > 0.05
    real = found.real
    torch.testing.assert_close(found.shares.transpose(2, 3)[:, real], wanted.transpose(2, 3)[:, real], **CLOSE)
