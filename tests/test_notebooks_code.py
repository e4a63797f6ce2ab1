"""What a notebook builds in the open computes what the package computes; later notebooks import the package's."""

import pytest
import torch
from test_attention import CLOSE, make_batch, make_model

from ptv2.answers import AnswerConfig, best_spans
from ptv2.backbone import load_backbone, load_tokenizer, resolve_backbone
from ptv2.features import WindowConfig, make_features
from ptv2.inside import attention_to_prefix
from ptv2.prefix import AttentionShape, PrefixConfig, PrefixEncoder, prefix_parameter_count, to_past_key_values, unflatten
from ptv2.squad import load_examples


@pytest.mark.parametrize("P", [1, 5])
@pytest.mark.parametrize("shape", [AttentionShape(3, 4, 8, 32), AttentionShape(2, 3, 16, 48)])
def test_01_the_prefix_encoder_in_both_forms(built, shape, P):
    notebook = built("01_prefix_encoder")
    L, E, M = shape.num_layers, shape.hidden_size, 12
    for projection, ours, count in (
        (False, notebook["EmbeddingPrefix"](P, L, E), notebook["embedding_count"](P, L, E)),
        (True, notebook["MLPPrefix"](P, L, E, M), notebook["mlp_count"](P, L, E, M)),
    ):
        config = PrefixConfig(P, prefix_projection=projection, prefix_hidden_size=M)
        package = PrefixEncoder(config, shape)
        ours.load_state_dict(package.state_dict())
        assert torch.equal(ours(), package.flat())
        assert torch.equal(notebook["cut"](ours(), L, shape.num_heads), package())
        assert count == prefix_parameter_count(config, shape)


def test_02_rows_to_pairs(built):
    shape, B, P = AttentionShape(3, 4, 8, 32), 2, 5
    rows = torch.randn(P, 2 * shape.num_layers * shape.hidden_size, generator=torch.Generator().manual_seed(0))
    pairs = built("02_past_key_values")["rows_to_pairs"](rows.expand(B, -1, -1), shape.num_layers, shape.num_heads)
    wanted = to_past_key_values(unflatten(rows, shape.num_layers, shape), B).layers
    assert len(pairs) == len(wanted) == shape.num_layers
    for (key, value), layer in zip(pairs, wanted, strict=True):
        assert torch.equal(key, layer.keys) and torch.equal(value, layer.values)


@pytest.mark.parametrize("lengths", [(12, 7, 4), (9, 9, 9)])
def test_02_attention_with_a_prefix(built, tiny_bert, lengths):
    notebook = built("02_past_key_values")
    model = make_model(tiny_bert, "sdpa")
    batch = make_batch(model.backbone.config, lengths)
    plain = load_backbone(model.source)
    alone = plain(**batch).last_hidden_state
    plain.set_attn_implementation("notebook_sdpa")
    assert torch.equal(plain(**batch).last_hidden_state, alone)  # without a prefix it is what it was
    leaf = model.prefix_encoder.flat().detach().clone().requires_grad_()
    notebook["prefix_of_layer"][:] = notebook["rows_to_pairs"](leaf.expand(len(lengths), -1, -1), 2, 4)
    ours = plain(**batch).last_hidden_state
    wanted = model.encode(batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], wanted[real], **CLOSE)
    assert (ours - alone)[real].abs().max() > 0.1
    gradients = [
        torch.autograd.grad(hidden[real].square().sum(), by)[0]
        for hidden, by in ((ours, leaf), (wanted, model.prefix_encoder.embedding.weight))
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


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
