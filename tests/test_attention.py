"""The prefix in the attention layers: equal to the paper's way, to PEFT and to a loop in plain PyTorch; no layer, no text mixed up."""

import threading
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

from ptv2.attention import LayerPrefix, open_to_prefix, prefix_for_forward, sample_activations, shifted_position_ids
from ptv2.backbone import Backbone
from ptv2.errors import InputError
from ptv2.model import PrefixModelForQuestionAnswering
from ptv2.prefix import PrefixConfig, to_past_key_values, unflatten

P = 5
PADDED, EVEN = (12, 7, 4), (9, 9, 9)  # lengths in a batch
STARTS, ENDS = torch.tensor([2, 3, 1]), torch.tensor([8, 3, 2])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_batch(config, lengths=PADDED, segments=True, seed=1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, config.vocab_size, (B, S), generator=generator)
    batch = {"input_ids": ids.masked_fill(~mask, config.pad_token_id or 0), "attention_mask": mask.long()}
    if segments:
        batch["token_type_ids"] = (torch.arange(S) >= 3).long().expand(B, S) * mask * (config.type_vocab_size > 1)
    return batch


def make_model(path: Path, attention: str | None = None, **prefix) -> PrefixModelForQuestionAnswering:
    """With a head whose logits are of the order of 1, so that the tolerance means something."""
    config = PrefixConfig(**{"prefix_length": P, "init": "normal", **prefix})
    model = PrefixModelForQuestionAnswering.from_backbone(str(path), config, precision="fp32", attn_implementation=attention)
    torch.manual_seed(2)
    torch.nn.init.normal_(model.qa_outputs.weight, std=0.3)
    torch.nn.init.normal_(model.qa_outputs.bias)
    return model


def own_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """logits [B, S, 2]: both cross-entropies by hand, padding aside."""
    chances = logits.masked_fill(mask[:, :, None] == 0, float("-inf")).softmax(dim=1)
    rows = torch.arange(len(logits))
    return -(chances[rows, STARTS, 0].log().mean() + chances[rows, ENDS, 1].log().mean()) / 2


def assert_same(model, batch, logits: Tensor, parameters: list[Tensor]) -> None:
    """Logits at real tokens, the loss, and its gradients by the prefix and the head's weight (a bias moves no softmax)."""
    output = model(**batch, start_positions=STARTS, end_positions=ENDS)
    ours = torch.stack((output.start_logits, output.end_logits), -1)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], logits[real], **CLOSE)
    loss = own_loss(logits, batch["attention_mask"])
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    mine = [model.prefix_encoder.embedding.weight, model.qa_outputs.weight]
    for our, their in zip(torch.autograd.grad(output.loss, mine), torch.autograd.grad(loss, parameters), strict=True):
        assert our.abs().max() > 1e-3
        torch.testing.assert_close(our, their, **CLOSE)


def leaves(model) -> list[Tensor]:
    parts = (model.prefix_encoder.flat(), model.qa_outputs.weight, model.qa_outputs.bias)
    return [part.detach().clone().requires_grad_() for part in parts]


@pytest.mark.parametrize("lengths", [PADDED, EVEN])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_equal_the_papers_past_key_values(tiny_backbone, attention, lengths):
    model = make_model(tiny_backbone, attention, shift_positions=True)
    plain = AutoModel.from_pretrained(tiny_backbone, attn_implementation=attention).eval()
    batch = make_batch(plain.config, lengths)
    flat, weight, bias = leaves(model)
    widened = {**batch, "attention_mask": F.pad(batch["attention_mask"], (P, 0), value=1)}
    cache = to_past_key_values(unflatten(flat, 2, model.prefix_encoder.shape), len(lengths))
    hidden = plain(**widened, past_key_values=cache).last_hidden_state
    assert_same(model, batch, F.linear(hidden, weight, bias), [flat, weight])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_equal_pefts(tiny_backbone, attention):
    model = make_model(tiny_backbone, attention, shift_positions=True)
    plain = AutoModelForQuestionAnswering.from_pretrained(tiny_backbone, attn_implementation=attention)
    plain.qa_outputs.load_state_dict(model.qa_outputs.state_dict())
    peft = get_peft_model(plain, PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=P)).eval()
    prompt = peft.prompt_encoder["default"].embedding
    prompt.load_state_dict({"weight": model.prefix_encoder.flat().detach()})
    batch = make_batch(plain.config, segments=False)  # PEFT's forward takes token_type_ids and drops them
    output = peft(**batch)
    head = peft.base_model.qa_outputs.modules_to_save["default"]
    logits = torch.stack((output.start_logits, output.end_logits), -1)
    assert_same(model, batch, logits, [prompt.weight, head.weight])


def bert_by_hand(path: Path, batch, prefix: dict[int, Tensor], first_position: int) -> Tensor:
    """BERT from its weights alone; prefix: layer -> key and value, [2, H, P, D]. Hidden states [B, S, E]."""
    w = load_file(path / "model.safetensors")
    B, S, H, D = *batch["input_ids"].shape, 4, 8
    visible = batch["attention_mask"].bool()[:, None, None]  # [B, 1, 1, S]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][batch["input_ids"]]
    x = x + w["embeddings.token_type_embeddings.weight"][batch["token_type_ids"]]
    x = norm(x + w["embeddings.position_embeddings.weight"][first_position : first_position + S], "embeddings.LayerNorm")
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        names = [f"{at}.attention.self.{name}" for name in ("query", "key", "value")]
        query, key, value = (linear(x, name).view(B, S, H, D).transpose(1, 2) for name in names)
        seen = visible
        if layer in prefix:
            key, value = (torch.cat((before.expand(B, H, P, D), own), 2) for before, own in zip(prefix[layer], (key, value), strict=True))
            seen = torch.cat((torch.ones(B, 1, 1, P, dtype=torch.bool), visible), -1)
        scores = (query @ key.transpose(2, 3) / D**0.5).masked_fill(~seen, float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(B, S, H * D)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = linear(x, f"{at}.intermediate.dense")
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_equal_a_loop_in_plain_pytorch(tiny_bert, attention, shift, layers):
    model = make_model(tiny_bert, attention, shift_positions=shift, layers=layers)
    flat, weight, bias = leaves(model)
    prefix = dict(zip(layers, unflatten(flat, len(layers), model.prefix_encoder.shape), strict=True))
    batch = make_batch(model.backbone.config)
    hidden = bert_by_hand(tiny_bert, batch, prefix, P if shift else 0)
    assert_same(model, batch, F.linear(hidden, weight, bias), [flat, weight])


SMALL = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3,
    "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "bert": {},
    "albert": {"embedding_size": 16},  # one module for all layers
    "distilbert": {"hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "modernbert": {"local_attention": 8},  # layer 0 sees everything, layers 1 and 2 four tokens to each side
    "eurobert": {"num_key_value_heads": 2},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 16, "initializer_range": 0.1},
}
REFUSED = {  # without the interface, with a decoder, causal
    "mpnet": {},
    "deberta-v2": {},
    "t5": {"d_kv": 8, "d_ff": 64},
    "bart": {"decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "gpt2": {},
}


def make_encoder(family: str, **settings):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_reached_once_and_shows_its_prefix_to_every_token(family):
    encoder = make_encoder(family, **FAMILIES[family]).eval()
    batch = make_batch(encoder.config, (20, 13), segments=False)
    real = batch["attention_mask"].bool()
    plain = encoder(**batch).last_hidden_state
    model = PrefixModelForQuestionAnswering(Backbone(family, Path(), ""), encoder, PrefixConfig(prefix_length=P, init="normal"))
    with prefix_for_forward({}) as forward:
        torch.testing.assert_close(encoder(**batch).last_hidden_state[real], plain[real], **CLOSE)
    assert forward.calls == 3
    prefix = model.prefix_encoder().detach().requires_grad_()
    for layers in ((0,), (1,), (2,), (0, 1, 2)):
        with prefix_for_forward({layer: LayerPrefix(*prefix[layer]) for layer in layers}):
            hidden = encoder(**batch).last_hidden_state
        changed = (hidden - plain).abs().amax(-1)
        assert changed[real].min() > 1e-5, f"the prefix of layers {layers} does not reach every token"
        norms = torch.autograd.grad(hidden[real].square().sum(), prefix)[0].flatten(2).norm(dim=-1)  # [L, 2]
        assert torch.equal(norms > 0, torch.tensor([[layer in layers] * 2 for layer in range(3)]))


@torch.no_grad()
def test_layers_with_masks_of_their_own_keep_them():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    encoder = make_encoder("modernbert", local_attention=8, layer_types=kinds).eval()
    open_to_prefix(encoder)
    batch = make_batch(encoder.config, (20, 13), segments=False)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 19] = 4  # beyond the window of token 0
    prefix = {layer: LayerPrefix(*pair) for layer, pair in enumerate(torch.randn(3, 2, 4, P, 8))}
    states = []
    for inputs in (batch, other):
        with prefix_for_forward(prefix):
            states.append(encoder(**inputs, output_hidden_states=True).hidden_states)
    same = [torch.equal(one[0, 0], two[0, 0]) for one, two in zip(*states, strict=True)]
    assert same == [True, True, False, False]  # embeddings, then the three layers


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_no_prefix_can_reach_is_refused_each_time(family):
    encoder = make_encoder(family, **REFUSED[family])
    for _ in range(2):
        with pytest.raises(InputError, match=rf"family \({family}, .* cannot reach it; choose another backbone, such as a BERT"):
            open_to_prefix(encoder)
    assert encoder.training


def opened(path: Path):
    encoder = AutoModel.from_pretrained(path).eval()
    open_to_prefix(encoder)
    return encoder


def random_prefix(seed: int, *shape: int) -> dict[int, LayerPrefix]:
    numbers = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(seed))
    return {layer: LayerPrefix(*pair) for layer, pair in enumerate(numbers)}


@torch.no_grad()
def test_two_threads_with_different_prefixes_do_not_mix(tiny_bert):
    encoder = opened(tiny_bert)
    batch = make_batch(encoder.config)
    prefixes = [random_prefix(seed, 4, P + seed, 8) for seed in range(2)]

    def run(i: int) -> None:
        with torch.no_grad(), prefix_for_forward(prefixes[i]):
            results[i] = encoder(**batch).last_hidden_state

    results: dict[int, Tensor] = {}
    run(0), run(1)
    alone = dict(results)
    assert not torch.allclose(alone[0], alone[1])
    barrier = threading.Barrier(2, timeout=60)

    def meet(*_) -> None:  # both are between the layers at the same moment
        barrier.wait()

    hooks = [layer.register_forward_hook(meet) for layer in encoder.encoder.layer]
    results.clear()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    [hook.remove() for hook in hooks]
    assert all(torch.equal(results[i], alone[i]) for i in range(2))


@torch.no_grad()
def test_an_exception_inside_a_forward_leaves_no_prefix_behind(tiny_bert):
    model = make_model(tiny_bert)
    batch = make_batch(model.backbone.config)
    plain = model.backbone(**batch).last_hidden_state

    def stop(*_):
        raise RuntimeError("stopped between the layers")

    hook = model.backbone.encoder.layer[0].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        model(**batch)
    hook.remove()
    assert torch.equal(model.backbone(**batch).last_hidden_state, plain)


@torch.no_grad()
def test_a_prefix_per_example_equals_one_example_at_a_time(tiny_backbone):
    encoder = opened(tiny_backbone)
    batch = make_batch(encoder.config)
    prefix = random_prefix(0, 3, 4, P, 8)  # layer -> key, value: [B, H, P, D]
    with prefix_for_forward(prefix):
        together = encoder(**batch).last_hidden_state
    for i, length in enumerate(PADDED):
        with prefix_for_forward({layer: LayerPrefix(key[i], value[i]) for layer, (key, value, _) in prefix.items()}):
            alone = encoder(**{name: part[i : i + 1, :length] for name, part in batch.items()}).last_hidden_state
        torch.testing.assert_close(together[i, :length], alone[0], **CLOSE)


@torch.no_grad()
def test_sampled_activations_are_keys_and_values_of_real_tokens(tiny_bert):
    encoder = opened(tiny_bert)
    batches = [make_batch(encoder.config, seed=seed) for seed in range(3)]
    places = 20
    sampled = sample_activations(encoder, batches, places, torch.Generator().manual_seed(0))
    assert sampled.shape == (2, 2, 4, places, 8)
    caught = []  # outputs of the key and value projections themselves, in the order of layers
    for layer in encoder.encoder.layer:
        for projection in (layer.attention.self.key, layer.attention.self.value):
            projection.register_forward_hook(lambda module, inputs, output: caught.append(output))
    tokens = []  # [2L, E] of every real token
    for batch in batches:
        caught.clear()
        encoder(**batch)
        tokens.append(torch.stack(caught, 2)[batch["attention_mask"].bool()])
    tokens = torch.cat(tokens)  # [tokens, 2L, E]
    drawn = sampled.permute(3, 0, 1, 2, 4).reshape(places, 4, 32)
    found = (tokens[None] == drawn[:, None]).all(-1).all(-1)  # [places, tokens]
    assert found.any(1).all()
    assert len(set(found.int().argmax(1).tolist())) == places  # none twice while there are enough
    again = sample_activations(encoder, batches, places, torch.Generator().manual_seed(0))
    other = sample_activations(encoder, batches, places, torch.Generator().manual_seed(1))
    assert torch.equal(sampled, again)
    assert not torch.equal(sampled, other)


def test_a_short_text_is_sampled_again_and_again(tiny_bert):
    encoder = opened(tiny_bert)
    sampled = sample_activations(encoder, [make_batch(encoder.config, (3,))], 7, torch.Generator().manual_seed(0))
    assert torch.equal(sampled[:, :, :, :3], sampled[:, :, :, 3:6])
    assert len(torch.unique(sampled.permute(3, 0, 1, 2, 4).flatten(1), dim=0)) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shifted_positions_beyond_the_backbones_are_refused(tiny_backbone, attention):
    fits, too_many = (make_model(tiny_backbone, attention, prefix_length=length, shift_positions=True) for length in (2, 3))
    batch = make_batch(fits.backbone.config, (510,))
    fits(**batch)
    limit = fits.backbone.config.max_position_embeddings
    with pytest.raises(InputError, match=f"position {limit}; the backbone has {limit} positions: take a smaller max_length"):
        too_many(**batch)


def test_a_family_without_position_ids_is_not_shifted():
    encoder = make_encoder("xlnet", d_head=8, d_inner=64)
    with pytest.raises(InputError, match="a xlnet takes no position_ids; switch it off"):
        shifted_position_ids(encoder, torch.zeros(1, 4, dtype=torch.long), P)
