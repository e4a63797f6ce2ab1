"""Frozen layers in 8 bits: exact where they are whole, near float32 in both directions, and refused where they cannot be.

Here stands the same arithmetic in plain PyTorch: a row times 127 / its largest number, rounded; int32 products; scaled back.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from ptv2 import int8
from ptv2.backbone import DEFAULT_BACKBONE, load_tokenizer
from ptv2.bench import roofline
from ptv2.errors import InputError
from ptv2.int8 import Int8FeedForward, Int8JointLinear, Int8Linear, Int8Residual, freeze_in_int8, quantised
from ptv2.methods import build_model, count_parameters, load_model
from ptv2.prefix import PrefixConfig
from ptv2.squad import load_examples


def make_batch(model, B=4, S=24):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, model.backbone.config.vocab_size, (B, S), generator=generator)
    return {"input_ids": ids, "start_positions": torch.arange(B) + 2, "end_positions": torch.arange(B) + 5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def in_plain_torch(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [M, K] times weight [N, K] with the rounding of `ptv2.int8`, to float32 [M, N]."""
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)  # [M, 1]
    steps = (rows.double() * (127 / largest).double()).round().to(torch.int8)  # float64 rounds once, as a fused product does
    matrix, scale = quantised(weight)
    # torch's own product of whole numbers takes some shapes only; in float64 it is exact for all.
    exact = steps.double() @ matrix.double().t()
    if all(size % 8 == 0 and size > 16 for size in (*rows.shape, len(weight))):
        assert torch.equal(torch._int_mm(steps, matrix.t().contiguous()).double(), exact)
    scaled = exact.float() * (largest / 127 * scale)
    return scaled if bias is None else scaled + bias


def both_ways(module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and gradients of the inputs for the same gradient behind."""
    inputs = [part.clone().requires_grad_() for part in inputs]
    output = module(*inputs)
    output.backward(normal(*output.shape, seed=9))
    return [output.detach(), *(part.grad for part in inputs)]


def distance(ours: Tensor, other: Tensor) -> float:
    return ((ours - other).norm() / other.norm()).item()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (7, 30, 65), (49, 100, 70), (48, 64, 128), (97, 130, 33), (200, 384, 1536)])
def test_a_layer_of_any_shape_computes_the_same_integers_as_plain_torch(shape):
    M, K, N = shape
    torch.manual_seed(0)
    linear = frozen(nn.Linear(K, N, bias=N != 33))
    inputs = normal(M, K)
    output, gradient = both_ways(Int8Linear(linear), (inputs,))
    torch.testing.assert_close(output, in_plain_torch(inputs, linear.weight, linear.bias), rtol=1e-5, atol=1e-5)
    upstream = normal(M, N, seed=9)
    torch.testing.assert_close(gradient, in_plain_torch(upstream, linear.weight.t()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_product_of_whole_numbers_is_exact():
    rows = torch.tensor([[127.0, -3.0, 0.0], [-127.0, 2.0, 5.0]])
    linear = frozen(nn.Linear(3, 4, bias=False))
    linear.weight.copy_(torch.tensor([[127.0, 1.0, 2.0], [-127.0, 0.0, 64.0], [3.0, 127.0, -9.0], [0.0, 0.0, 127.0]]))
    torch.testing.assert_close(Int8Linear(linear)(rows), rows @ linear.weight.T, rtol=1e-6, atol=0)


def test_rows_of_very_different_size_keep_their_own_precision():
    rows = normal(5, 64) * torch.tensor([1e-8, 1e-3, 1.0, 1e4, 0.0])[:, None]
    linear = frozen(nn.Linear(64, 32, bias=False))
    exact = linear(rows)
    error = (Int8Linear(linear)(rows) - exact).norm(dim=1)
    assert (error <= 0.02 * exact.norm(dim=1)).all()  # rounding to 127 steps on both sides: about 1 %


def test_a_layer_is_near_its_float32_original_in_both_directions():
    torch.manual_seed(0)
    linear = frozen(nn.Linear(64, 48))
    for original, ours in zip(*(both_ways(layer, (normal(3, 20, 64),)) for layer in (linear, Int8Linear(linear))), strict=True):
        assert distance(ours, original) < 0.02


def test_a_number_that_is_none_is_not_hidden():
    assert Int8Linear(frozen(nn.Linear(8, 8)))(torch.full((1, 8), torch.nan)).isnan().all()


@pytest.fixture(params=[(32, 64), (312, 1200), (20, 70)], ids=str)
def layer(request, tiny_bert):
    """A BERT layer of some widths E and I, random and frozen."""
    E, inner = request.param
    torch.manual_seed(1)
    sizes = {"hidden_size": E, "intermediate_size": inner, "num_attention_heads": 2, "num_hidden_layers": 1, "initializer_range": 0.2}
    return frozen(AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=50, **sizes)).encoder.layer[0])


def test_residual_and_norm_in_one_are_as_one_by_one(layer):
    """Gradients go through a bf16 copy of the normalised rows: 0.4 % each, and less on their sum."""
    output = layer.attention.output
    nn.init.normal_(output.LayerNorm.weight), nn.init.normal_(output.LayerNorm.bias)
    linear, (E, K) = Int8Linear(output.dense), output.dense.weight.shape
    inputs = normal(3, 21, K), normal(3, 21, E, seed=1)
    exact = both_ways(lambda hidden, residual: output.LayerNorm(linear(hidden) + residual), inputs)
    ours = both_ways(Int8Residual(linear, output.LayerNorm), inputs)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-5)
    assert distance(ours[1], exact[1]) < 5e-3 and distance(ours[2], exact[2]) < 2e-3
    one_only = inputs[0].clone().requires_grad_()
    Int8Residual(linear, output.LayerNorm)(one_only, inputs[1]).backward(normal(3, 21, E, seed=9))
    assert torch.equal(one_only.grad, ours[1])


def test_a_feed_forward_block_in_one_is_as_one_by_one(layer):
    """GELU's slope is kept in steps of 1/200, and rounding may fall to the other side: far less than the 8 bits cost anyway."""
    up, down, norm = Int8Linear(layer.intermediate.dense), Int8Linear(layer.output.dense), layer.output.LayerNorm
    inputs = (normal(3, 37, layer.intermediate.dense.in_features),)
    exact = both_ways(layer.feed_forward_chunk, inputs)
    apart = both_ways(lambda rows: norm(down(F.gelu(up(rows))) + rows), inputs)
    block = Int8FeedForward(up, down, norm)
    ours = both_ways(lambda rows: block(rows, rows), inputs)
    for together, one_by_one, original in zip(ours, apart, exact, strict=True):
        assert distance(together, one_by_one) < 0.01 and distance(together, original) < 0.03
    with torch.no_grad():
        assert torch.equal(block(*inputs, *inputs), ours[0])
    elsewhere = block(inputs[0], inputs[0].clone())  # not known to be the same: one by one
    assert distance(elsewhere, ours[0]) < 1e-3


def test_gelu_and_its_slope_hold_over_their_whole_range():
    """A row with one number other than 0 is rounded without error, so what is left is GELU's own."""
    up, down, norm = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False), nn.LayerNorm(2, eps=1e4)
    with torch.no_grad():
        up.weight.copy_(torch.tensor([[1.0, 0.0]])), down.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    block = Int8FeedForward(*(Int8Linear(frozen(linear)) for linear in (up, down)), frozen(norm))
    inputs = F.pad(torch.linspace(-12, 12, 2401)[:, None], (0, 1))  # [2401, 2]
    output, gradient = both_ways(lambda rows: block(rows, rows), (inputs,))
    for module in (up, down, norm):
        module.double()
    exact, exact_gradient = both_ways(lambda rows: norm(down(F.gelu(up(rows))) + rows), (inputs.double(),))
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=0.01 * exact_gradient.abs().max().item())


@pytest.fixture
def joint(tiny_bert):
    backbone = frozen(AutoModel.from_pretrained(tiny_bert))
    attention = backbone.encoder.layer[0].attention.self
    single = [Int8Linear(getattr(attention, name)) for name in ("query", "key", "value")]
    freeze_in_int8(backbone)
    return single, [getattr(attention, name) for name in ("query", "key", "value")]


def held(layers) -> object:
    return layers[0].joint.taken


def test_joint_layers_compute_what_single_ones_do(joint):
    single, layers = joint
    assert all(isinstance(layer, Int8JointLinear) for layer in layers)

    def last_two(rows, of):
        outputs = [layer(rows) for layer in of]
        return outputs[1] * 2 + outputs[2]  # the first gets no gradient

    results = (both_ways(lambda rows, of=of: last_two(rows, of), (normal(2, 9, 32),)) for of in (layers, single))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    assert held(layers) is None


def test_joint_layers_share_only_what_is_the_same(joint):
    single, layers = joint
    rows = normal(2, 9, 32)

    def check(order, inputs):
        for n, given in zip(order, inputs, strict=True):
            torch.testing.assert_close(layers[n](given), single[n](given), rtol=1e-5, atol=1e-5)

    check((2, 0, 1), (rows,) * 3)
    assert held(layers) is None
    check((0, 1, 2), (rows, rows + 1, rows + 2))  # as in attention to another text
    check((0, 0, 1, 1, 2), (rows,) * 5)
    layers[0](rows)
    rows += 1  # the same tensor, no longer the same numbers
    check((1, 2), (rows, rows))
    with torch.no_grad():
        layers[0](rows)
    asked = rows.requires_grad_()
    assert not layers[0](asked.detach()).requires_grad and layers[1](asked).requires_grad
    with torch.no_grad():
        layers[0](asked)
    assert layers[1](asked).requires_grad  # what was computed without a graph does not serve where one is wanted
    with torch.inference_mode():
        check((0, 1, 2), (normal(2, 9, 32),) * 3)


def test_joint_layers_keep_nothing_alive(joint):
    _, layers = joint
    rows = normal(2, 9, 32).requires_grad_() * 1
    query, key = layers[0](rows), layers[1](rows)
    value = weakref.ref(next(iter(held(layers).outputs.values())))
    assert value() is not None
    del rows, query, key
    gc.collect()
    assert value() is None
    copy.deepcopy(nn.ModuleList(layers))


def test_a_real_backbone_computes_nearly_the_same_loss_and_gradient():
    texts = sorted({example.context for example in load_examples("embedded", "dev")})[:4]
    losses, gradients = [], []
    for precision in ("fp32", "int8"):
        model = build_model("p-tuning-v2", DEFAULT_BACKBONE, PrefixConfig(prefix_length=8), texts=texts, precision=precision).train()
        batch = dict(load_tokenizer(model.source)(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
        loss = model(**batch, start_positions=torch.arange(4) + 2, end_positions=torch.arange(4) + 5).loss
        loss.backward()
        losses.append(loss.item()), gradients.append(model.prefix_encoder.embedding.weight.grad.flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_results_do_not_depend_on_the_number_of_threads(tiny_bert):
    model = build_model("p-tuning-v2", str(tiny_bert), PrefixConfig(prefix_length=3), precision="int8").train()
    block, layers = model.backbone.encoder.layer[0].output, model.backbone.encoder.layer[1].attention
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        ours = both_ways(lambda rows: layers.output(layers.self.query(block(rows, rows)), rows), (normal(5, 61, 32),))
        results.append(ours)
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))


def test_least_work_counts_blocks_as_the_layers_they_stand_for(tiny_bert):
    exact, model = (build_model("p-tuning-v2", str(tiny_bert), PrefixConfig(prefix_length=3), precision=name) for name in ("fp32", "int8"))
    batch = make_batch(model)
    assert roofline.linear_layers(model, batch) == roofline.linear_layers(exact, batch)


@pytest.mark.parametrize("method", ["p-tuning-v2", "head-only", "prompt-tuning"])
def test_only_linear_layers_are_replaced_and_nothing_else_changes(method, tiny_backbone, tmp_path):
    exact, model = (build_model(method, str(tiny_backbone), PrefixConfig(prefix_length=3), precision=name) for name in ("fp32", "int8"))
    linears = [name for name, module in exact.backbone.named_modules() if type(module) is nn.Linear]
    assert linears == [name for name, module in model.backbone.named_modules() if isinstance(module, Int8Linear)]
    blocks = [type(module) for module in model.backbone.encoder.modules()]
    assert blocks.count(Int8FeedForward) == blocks.count(Int8Residual) == 2 and blocks.count(Int8JointLinear) == 6
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


@pytest.mark.parametrize("family", ["distilbert", "mpnet", "bert with relu"])
def test_what_is_not_bert_shaped_is_replaced_layer_by_layer(family):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    kind, _, activation = family.partition(" with ")
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50}
    backbone = frozen(AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **({"hidden_act": activation} if activation else {}))))
    ids = torch.arange(5, 29).view(2, 12)
    exact = backbone(input_ids=ids).last_hidden_state
    freeze_in_int8(backbone)
    assert any(isinstance(module, Int8Linear) for module in backbone.modules())
    assert any(isinstance(module, Int8FeedForward) for module in backbone.modules()) == (kind == "mpnet")
    assert distance(backbone(input_ids=ids).last_hidden_state, exact) < 0.03


@pytest.mark.parametrize("method", ["fine-tuning", "bitfit", "lora"])
def test_a_method_that_trains_in_the_backbone_is_refused(method, tiny_bert):
    with pytest.raises(InputError, match="int8 is for a wholly frozen backbone"):
        build_model(method, str(tiny_bert), lora_rank=2, precision="int8")


def test_without_a_compiler_the_sentence_says_so(tiny_bert, monkeypatch):
    monkeypatch.setattr(int8, "library", lambda name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        build_model("p-tuning-v2", str(tiny_bert), precision="int8")
