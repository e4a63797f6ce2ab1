"""Attention in one pass over prefix and text: torch's own numbers and gradients, in every shape, and only where it may be used."""

import subprocess

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from ptv2 import attention, fused_attention, native
from ptv2.backbone import DEFAULT_BACKBONE
from ptv2.fused_attention import Seen, attend, fits, text_seen
from ptv2.methods import build_model
from ptv2.prefix import PrefixConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def test_the_machine_that_tests_has_a_compiler():
    assert native.library("fused_attention") is not None  # or nothing below would test what it says


def make_inputs(B, H, S, P, D, shared, text_learns=True):
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(B, S, H * D, generator=generator).view(B, S, H, D).transpose(1, 2).requires_grad_(text_learns) for _ in range(3)]
    shape = (H, P, D) if shared else (B, H, P, D)
    return text, [torch.randn(shape, generator=generator).requires_grad_() for _ in range(2)]


def by_torch(text, prefix, seen: Seen, scale: float):
    """[B, S, H, D] from joined keys and values, and a mask over both."""
    query, key, value = text
    (B, H, S, D), P = query.shape, prefix[0].shape[-2]
    key, value = (torch.cat((before.expand(B, H, P, D), own), 2) for before, own in zip(prefix, (key, value), strict=True))
    places = torch.arange(S)
    of_text = (places >= seen.first[:, None]) & (places < seen.last[:, None])
    mask = torch.cat((torch.arange(P) < seen.prefix[:, None], of_text), 1)[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("D", fused_attention.HEAD_SIZES)
@pytest.mark.parametrize(("S", "P", "shared"), [(1, 1, True), (16, 16, True), (37, 5, False), (40, 0, True), (129, 130, True)])
@pytest.mark.parametrize("whole", [True, False], ids=["all seen", "parts seen"])
def test_outputs_and_gradients_are_those_of_torch(D, S, P, shared, whole):
    B, H, scale = 3, 2, 0.3
    text, prefix = make_inputs(B, H, S, P, D, shared)
    seen = Seen(torch.full((B,), P), torch.zeros(B, dtype=torch.long), torch.full((B,), S))
    if not whole:
        seen = Seen(torch.tensor([P, P // 2, P]), torch.tensor([0, 0, S // 3]), torch.tensor([(S + 1) // 2, S, S]))
    expected, output = by_torch(text, prefix, seen, scale), attend(*text, tuple(prefix), seen, scale)
    torch.testing.assert_close(output, expected, **CLOSE)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    learned = [*text, *(prefix if P else [])]
    for own, torchs in zip(*(torch.autograd.grad(out, learned, upstream) for out in (output, expected)), strict=True):
        torch.testing.assert_close(own, torchs, **CLOSE)


def test_where_only_the_prefix_learns_its_gradient_is_the_same():
    text, prefix = make_inputs(2, 3, 21, 6, 32, True, text_learns=False)
    seen = Seen(torch.tensor([6, 6]), torch.tensor([0, 4]), torch.tensor([21, 15]))
    outputs = attend(*text, tuple(prefix), seen, 0.2), by_torch(text, prefix, seen, 0.2)
    for own, torchs in zip(*(torch.autograd.grad(out.square().sum(), prefix) for out in outputs), strict=True):
        torch.testing.assert_close(own, torchs, **CLOSE)


def test_scores_of_any_size_neither_overflow_nor_vanish():
    text, prefix = make_inputs(2, 1, 20, 3, 32, True)
    large = [(part * 50).detach().requires_grad_() for part in text]
    seen = Seen(torch.tensor([3, 3]), torch.tensor([0, 0]), torch.tensor([20, 7]))
    output, expected = attend(*large, tuple(prefix), seen, 1.0), by_torch(large, prefix, seen, 1.0)
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), [*large, *prefix]))


def test_the_same_bits_again_and_with_any_number_of_threads():
    text, prefix = make_inputs(4, 3, 50, 9, 32, True)
    seen = Seen(torch.full((4,), 9), torch.zeros(4, dtype=torch.long), torch.tensor([50, 40, 30, 20]))

    def run():
        output = attend(*text, tuple(prefix), seen, 0.2)
        return [output, *torch.autograd.grad(output.square().sum(), [*text, *prefix])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(3)
        for _ in range(3):
            assert all(map(torch.equal, one, run()))
    finally:
        torch.set_num_threads(before)


def test_inputs_whose_numbers_lie_apart_are_taken():
    text, prefix = make_inputs(2, 2, 10, 4, 32, True)
    seen = Seen(torch.tensor([4, 4]), torch.tensor([0, 0]), torch.tensor([10, 10]))
    apart = [part.detach().transpose(2, 3).contiguous().transpose(2, 3) for part in text]
    assert apart[0].stride(3) != 1
    torch.testing.assert_close(attend(*apart, tuple(prefix), seen, 0.2), by_torch(text, prefix, seen, 0.2), **CLOSE)


def test_a_gradient_whose_numbers_lie_apart_is_taken():
    text, prefix = make_inputs(8, 12, 400, 4, 32, True)
    seen = Seen(torch.full((8,), 4), torch.zeros(8, dtype=torch.long), torch.full((8,), 400))
    upstream = torch.randn(8, 12, 400, 32, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    learned = [*text, *prefix]
    outputs = attend(*text, tuple(prefix), seen, 0.2), by_torch(text, prefix, seen, 0.2)
    for own, torchs in zip(*(torch.autograd.grad(out, learned, upstream) for out in outputs), strict=True):
        torch.testing.assert_close(own, torchs, atol=1e-4, rtol=1e-4)


def test_the_places_that_a_mask_shows_are_read_from_it():
    assert [part.tolist() for part in text_seen(None, 2, 3)] == [[0, 0], [3, 3]]
    right_and_left = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()[:, None, None]
    for mask in (right_and_left, right_and_left.expand(2, 1, 4, 4)):
        assert [part.tolist() for part in text_seen(mask, 2, 4)] == [[0, 1], [2, 4]]


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[True, False, True]])[:, None, None],  # a gap
        torch.tensor([[False, False, False]])[:, None, None],
        torch.ones(3, 3).tril().bool()[None, None],  # tokens see different places
        torch.zeros(1, 1, 1, 3),  # added to the scores
        torch.ones(1, 2, 3, 3).bool(),  # heads see different places
    ],
)
def test_other_masks_are_left_to_torch(mask):
    assert text_seen(mask, 1, 3) is None


def test_what_it_is_not_made_for_does_not_fit():
    query = torch.zeros(2, 2, 5, 32)
    assert fits(query, query)
    assert not fits(query.double(), query.double())
    assert not fits(query[..., :16], query[..., :16])
    assert not fits(query, query[:, :1])  # fewer heads of keys than of queries
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(query, query)


def test_without_a_compiler_torch_attends(monkeypatch):
    query = torch.zeros(2, 2, 5, 32)
    monkeypatch.setattr(fused_attention, "library", lambda name: None)
    assert not fits(query, query)


@pytest.fixture
def wide_bert(tiny_bert, tmp_path):
    """A random BERT whose heads are as wide as a real one's, with the tiny one's tokenizer."""
    for file in tiny_bert.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_bert)
    config.update({"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3})
    BertModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def loss_and_gradient(model, batch):
    torch.manual_seed(3)  # of the prefix's dropout
    loss = model(**batch).loss
    return loss, *torch.autograd.grad(loss, list(model.prefix_encoder.parameters()))


def assert_the_same_either_way(monkeypatch, model, batch):
    """Loss and gradients, by fused attention in every layer and by torch's."""
    calls = []
    own = fused_attention.attend
    with monkeypatch.context() as patch:
        patch.setattr(fused_attention, "attend", lambda *inputs: calls.append(1) or own(*inputs))
        fused = loss_and_gradient(model, batch)
        assert len(calls) == model.backbone.config.num_hidden_layers
        patch.setattr(attention, "fits", lambda query, key: False)
        by_torch = loss_and_gradient(model, batch)
        assert len(calls) == model.backbone.config.num_hidden_layers
    for ours, theirs in zip(fused, by_torch, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def make_batch(vocabulary, lengths, left=False):
    S = max(lengths)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, vocabulary, (len(lengths), S), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": (mask.flip(1) if left else mask).long()}
    labels = torch.full((len(lengths),), S - 1 if left else 0)
    return {**batch, "start_positions": labels, "end_positions": labels}


@pytest.mark.parametrize(
    "prefix", [{}, {"layers": (1,)}, {"prefix_projection": True}, {"shift_positions": True}, {"prefix_dropout": 0.5}], ids=str
)
@pytest.mark.parametrize("left", [False, True], ids=["padding right", "padding left"])
def test_a_model_learns_the_same_either_way(monkeypatch, wide_bert, prefix, left):
    model = build_model("p-tuning-v2", wide_bert, PrefixConfig(prefix_length=5, init="normal", **prefix), precision="fp32").train()
    batch = make_batch(model.backbone.config.vocab_size, (33, 20, 7), left)
    assert_the_same_either_way(monkeypatch, model, batch)


def test_the_real_backbone_learns_the_same_either_way(monkeypatch):
    model = build_model("p-tuning-v2", DEFAULT_BACKBONE, PrefixConfig(prefix_length=16), precision="fp32").train()
    assert_the_same_either_way(monkeypatch, model, make_batch(30000, (150, 96, 33)))


def test_a_source_that_no_compiler_takes_makes_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        monkeypatch.setenv("CXX", "false")
        assert native.library("fused_attention") is None
        native.library.cache_clear()
        monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
        assert native.library("fused_attention") is None
        native.library.cache_clear()
        monkeypatch.delenv("CXX")
        assert native.library("fused_attention") is not None
        native.library.cache_clear()
        monkeypatch.setattr(subprocess, "run", _only_versions(subprocess.run))
        assert native.library("fused_attention") is not None  # made before: not compiled again
    finally:
        native.library.cache_clear()


def _only_versions(run):
    def checked(words, **options):
        assert words[1:] == ("--version",)
        return run(words, **options)

    return checked
