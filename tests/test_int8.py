"""Frozen layers in 8 bits: near float32 in both directions, alone and in a model that learns; refused where it cannot be."""

import pytest
import torch
from torch import nn

from ptv2 import int8
from ptv2.backbone import DEFAULT_BACKBONE
from ptv2.errors import InputError
from ptv2.int8 import Int8Linear, product, quantised
from ptv2.methods import build_model, count_parameters, load_model
from ptv2.prefix import PrefixConfig
from ptv2.squad import load_examples


def make_batch(model, B=4, S=24):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, model.backbone.config.vocab_size, (B, S), generator=generator)
    return {"input_ids": ids, "start_positions": torch.arange(B) + 2, "end_positions": torch.arange(B) + 5}


def test_a_product_of_whole_numbers_is_exact():
    rows = torch.tensor([[127.0, -3.0, 0.0], [-127.0, 2.0, 5.0]])
    matrix = torch.tensor([[127.0, 1.0, 2.0], [-127.0, 0.0, 64.0], [3.0, 127.0, -9.0], [0.0, 0.0, 127.0]])  # [N, K]
    torch.testing.assert_close(product(rows, *quantised(matrix), None), rows @ matrix.T, rtol=1e-6, atol=0)


def test_rows_of_very_different_size_keep_their_own_precision():
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-8, 1e-3, 1.0, 1e4, 0.0])[:, None]
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    exact = rows @ matrix.T
    error = (product(rows, *quantised(matrix), None) - exact).norm(dim=1)
    assert (error <= 0.02 * exact.norm(dim=1)).all()  # rounding to 127 steps on both sides: about 1 %


def test_a_layer_is_near_its_float32_original_in_both_directions():
    torch.manual_seed(0)
    linear, inputs = nn.Linear(64, 48), torch.randn(3, 20, 64)
    outputs, gradients = [], []
    upstream = torch.randn(3, 20, 48)
    for layer in (linear, Int8Linear(linear)):
        given = inputs.clone().requires_grad_()
        outputs.append(layer(given))
        outputs[-1].backward(upstream)
        gradients.append(given.grad)
    for original, ours in (outputs, gradients):
        assert ((ours - original).norm() / original.norm()).item() < 0.02


def test_a_real_backbone_computes_nearly_the_same_loss_and_gradient():
    texts = sorted({example.context for example in load_examples("embedded", "dev")})[:4]
    losses, gradients = [], []
    for precision in ("fp32", "int8"):
        model = build_model("p-tuning-v2", DEFAULT_BACKBONE, PrefixConfig(prefix_length=8), texts=texts, precision=precision).train()
        loss = model(**make_batch(model)).loss
        loss.backward()
        losses.append(loss.item()), gradients.append(model.prefix_encoder.embedding.weight.grad.flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.97


@pytest.mark.parametrize("method", ["p-tuning-v2", "head-only", "prompt-tuning"])
def test_only_linear_layers_are_replaced_and_nothing_else_changes(method, tiny_bert, tmp_path):
    exact, model = (build_model(method, str(tiny_bert), PrefixConfig(prefix_length=3), precision=name) for name in ("fp32", "int8"))
    linears = [name for name, module in exact.backbone.named_modules() if type(module) is nn.Linear]
    assert linears == [name for name, module in model.backbone.named_modules() if isinstance(module, Int8Linear)]
    assert model.trained_names == exact.trained_names
    assert count_parameters(model) == count_parameters(exact)
    batch = make_batch(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step(), optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = load_model(tmp_path, precision="int8")
    assert torch.equal(again(**batch).start_logits, model(**batch).start_logits)


@pytest.mark.parametrize("method", ["fine-tuning", "bitfit", "lora"])
def test_a_method_that_trains_in_the_backbone_is_refused(method, tiny_bert):
    with pytest.raises(InputError, match="int8 is for a wholly frozen backbone"):
        build_model(method, str(tiny_bert), lora_rank=2, precision="int8")


def test_without_a_compiler_the_sentence_says_so(tiny_bert, monkeypatch):
    def none_found():
        raise int8.InvalidCxxCompiler

    monkeypatch.setattr(int8, "get_cpp_compiler", none_found)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        build_model("p-tuning-v2", str(tiny_bert), precision="int8")
