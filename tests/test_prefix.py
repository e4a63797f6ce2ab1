"""The prefix encoder against the official layout, PEFT's encoder and the closed formula."""

import numpy as np
import pytest
import torch
from peft import PrefixEncoder as PeftPrefixEncoder
from peft import PrefixTuningConfig
from torch import nn

from ptv2.errors import InputError
from ptv2.prefix import (
    AttentionShape,
    PrefixConfig,
    PrefixEncoder,
    flatten,
    prefix_parameter_count,
    to_past_key_values,
    unflatten,
)

SHAPE = AttentionShape(num_layers=3, num_heads=4, head_dim=8, hidden_size=32)
P = 5


def official_layout(flat: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """`get_prompt` of the official model/question_answering.py: one [2, B, H, P, D] a layer."""
    past = flat[None].expand(batch_size, -1, -1)
    past = past.reshape(batch_size, flat.shape[0], SHAPE.num_layers * 2, SHAPE.num_heads, SHAPE.head_dim)
    return past.permute([2, 0, 3, 1, 4]).split(2)


def peft_encoder(config: PrefixConfig) -> PeftPrefixEncoder:
    return PeftPrefixEncoder(
        PrefixTuningConfig(
            num_virtual_tokens=config.prefix_length,
            num_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_heads,
            token_dim=SHAPE.hidden_size,
            num_transformer_submodules=1,
            encoder_hidden_size=config.prefix_hidden_size,
            prefix_projection=config.prefix_projection,
        )
    )


def test_the_prefix_has_a_key_and_a_value_for_every_layer_and_head():
    encoder = PrefixEncoder(PrefixConfig(prefix_length=P), SHAPE)
    assert encoder().shape == (3, 2, 4, P, 8)
    assert encoder(batch_size=6).shape == (3, 2, 4, P, 8)


def test_with_dropout_in_training_every_example_has_its_own_prefix():
    encoder = PrefixEncoder(PrefixConfig(prefix_length=P, prefix_dropout=0.1), SHAPE)
    assert encoder.train()(batch_size=6).shape == (3, 2, 6, 4, P, 8)
    assert encoder.eval()(batch_size=6).shape == (3, 2, 4, P, 8)


def test_flatten_and_unflatten_are_inverse():
    flat = torch.arange(P * 3 * 2 * 32.0).view(P, -1)
    assert torch.equal(flatten(unflatten(flat, 3, SHAPE)), flat)
    prefix = torch.arange(3 * 2 * 4 * P * 8.0).view(3, 2, 4, P, 8)
    assert torch.equal(unflatten(flatten(prefix), 3, SHAPE), prefix)


def test_the_layout_is_that_of_the_official_code():
    flat = torch.arange(P * 3 * 2 * 32.0).view(P, -1)
    prefix = unflatten(flat, 3, SHAPE)
    cache = to_past_key_values(prefix, batch_size=2)
    for layer, official in enumerate(official_layout(flat, batch_size=2)):
        for example in range(2):
            assert torch.equal(prefix[layer], official[:, example])
        assert torch.equal(torch.stack((cache.layers[layer].keys, cache.layers[layer].values)), official)


@pytest.mark.parametrize("projection", [False, True])
def test_the_prefix_equals_pefts_with_the_same_weights(projection):
    config = PrefixConfig(prefix_length=P, prefix_projection=projection, prefix_hidden_size=12)
    ours, peft = PrefixEncoder(config, SHAPE), peft_encoder(config)
    peft.load_state_dict(ours.state_dict())
    theirs = peft(torch.arange(P))
    torch.testing.assert_close(ours.flat(), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours(), torch.stack([layer[:, 0] for layer in official_layout(theirs, 1)]), atol=1e-6, rtol=0)


def test_the_projection_is_a_tanh_network_of_the_embedding():
    encoder = PrefixEncoder(PrefixConfig(prefix_length=P, prefix_projection=True, prefix_hidden_size=12), SHAPE)
    w = {name: weight.detach().numpy() for name, weight in encoder.named_parameters()}
    hidden = np.tanh(w["embedding.weight"] @ w["transform.0.weight"].T + w["transform.0.bias"])
    by_hand = hidden @ w["transform.2.weight"].T + w["transform.2.bias"]
    np.testing.assert_allclose(encoder.flat().detach().numpy(), by_hand, atol=1e-6)


@pytest.mark.parametrize(("projection", "hidden"), [(False, 512), (True, P), (True, 64)])
def test_set_prefix_starts_from_the_given_prefix(projection, hidden):
    config = PrefixConfig(prefix_length=P, prefix_projection=projection, prefix_hidden_size=hidden)
    torch.manual_seed(0)
    encoder = PrefixEncoder(config, SHAPE)
    wanted = torch.randn(3, 2, 4, P, 8)
    assert (encoder() - wanted).abs().max() > 0.5
    encoder.set_prefix(wanted)
    torch.testing.assert_close(encoder(), wanted, atol=1e-4 if projection else 0, rtol=0)


def test_set_prefix_of_a_too_narrow_projection_is_the_nearest_it_can_make():
    torch.manual_seed(0)
    encoder = PrefixEncoder(PrefixConfig(prefix_length=8, prefix_projection=True, prefix_hidden_size=3), SHAPE)
    wanted = torch.randn(3, 2, 4, 8, 8)
    encoder.set_prefix(wanted)
    nearest = (encoder() - wanted).norm()
    for _ in range(20):  # any other last layer is farther away
        with torch.no_grad():
            change = torch.randn_like(encoder.transform[2].weight) * 0.01
            encoder.transform[2].weight += change
            assert (encoder() - wanted).norm() > nearest
            encoder.transform[2].weight -= change


@pytest.mark.parametrize("layers", [None, (0, 2), (1,)])
@pytest.mark.parametrize("shape", [SHAPE, AttentionShape(num_layers=3, num_heads=2, head_dim=8, hidden_size=32)])
def test_the_parameter_count_follows_the_formula(layers, shape):
    M, E, flat = 12, shape.hidden_size, 2 * len(layers or range(3)) * shape.num_heads * shape.head_dim
    for projection, by_formula in ((False, P * flat), (True, P * E + (E * M + M) + (M * flat + flat))):
        config = PrefixConfig(prefix_length=P, prefix_projection=projection, prefix_hidden_size=M, layers=layers)
        encoder = PrefixEncoder(config, shape)
        assert sum(parameter.numel() for parameter in encoder.parameters()) == by_formula
        assert prefix_parameter_count(config, shape) == by_formula
        assert encoder().shape == (len(layers or range(3)), 2, shape.num_heads, P, shape.head_dim)


def test_dropout_zeroes_its_share_differs_per_example_and_keeps_the_mean():
    torch.manual_seed(0)
    encoder = PrefixEncoder(PrefixConfig(prefix_length=16, prefix_dropout=0.3), SHAPE).train()
    plain = encoder()
    dropped = encoder(batch_size=16).transpose(1, 2).transpose(0, 1)  # [B, L, 2, H, P, D]
    zero = dropped == 0
    assert abs(zero.float().mean().item() - 0.3) < 0.01  # 50,000 numbers: a standard deviation of 0.002
    assert not any(torch.equal(zero[0], zero[i]) for i in range(1, 16))
    torch.testing.assert_close(dropped[~zero], (plain / 0.7).expand_as(dropped)[~zero])
    assert torch.equal(encoder.eval()(batch_size=16), plain)


def test_the_normal_initialisation_is_standard_and_seeded():
    def draw(seed: int) -> torch.Tensor:
        encoder = PrefixEncoder(PrefixConfig(prefix_length=64), SHAPE)
        nn.init.zeros_(encoder.embedding.weight)
        torch.manual_seed(seed)
        encoder.set_normal()
        return encoder.flat().detach()

    numbers = draw(0)  # 12,288 of them
    assert abs(numbers.mean().item()) < 0.04
    assert abs(numbers.std().item() - 1) < 0.03
    assert torch.equal(numbers, draw(0))
    assert not torch.equal(numbers, draw(1))


@pytest.mark.parametrize("projection", [False, True])
def test_the_zero_initialisation_makes_every_number_zero_and_leaves_it_a_gradient(projection):
    encoder = PrefixEncoder(PrefixConfig(prefix_length=P, prefix_projection=projection, init="zero"), SHAPE)
    encoder.set_zero()
    assert not encoder().any()
    encoder.flat().sum().backward()
    assert all(parameter.grad.any() for parameter in ([encoder.transform[2].weight] if projection else [encoder.embedding.weight]))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("prefix_length", 0, "prefix_length is 0; it must be at least 1"),
        ("prefix_length", 2.5, "prefix_length is 2.5; it must be at least 1, a whole number"),
        ("prefix_hidden_size", 0, "prefix_hidden_size is 0; it must be at least 1"),
        ("prefix_dropout", -0.1, "prefix_dropout is -0.1; it must be at least 0 and below 1"),
        ("prefix_dropout", 1.0, "prefix_dropout is 1.0; it must be at least 0 and below 1"),
        ("prefix_dropout", float("nan"), "prefix_dropout is nan"),
        ("init", "zeros", 'init is "zeros"; it must be "normal", "zero" or "activations"'),
        ("layers", (), r"layers is \[\]; it must be different layer indices in ascending order"),
        ("layers", (1, 1), r"layers is \[1, 1\]"),
        ("layers", (2, 1), r"layers is \[2, 1\]"),
        ("layers", (-1, 1), r"layers is \[-1, 1\]"),
    ],
)
def test_a_value_out_of_range_is_refused(field, value, sentence):
    with pytest.raises(InputError, match=sentence):
        PrefixConfig(**{field: value})


def test_a_layer_that_the_backbone_lacks_is_refused():
    with pytest.raises(InputError, match="layers names layer 3; the backbone has layers 0 to 2"):
        PrefixEncoder(PrefixConfig(layers=(0, 3)), SHAPE)


def test_a_config_survives_its_dictionary():
    config = PrefixConfig(prefix_length=7, prefix_dropout=0.2, init="normal", layers=[0, 2], shift_positions=True)
    assert config.layers == (0, 2)
    assert config.to_dict()["layers"] == [0, 2]
    assert PrefixConfig(**config.to_dict()) == config
