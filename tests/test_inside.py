"""Looking inside: attention as transformers itself reports it, a layer's prefix taken out, keys by hand."""

import pytest
import torch
from safetensors.torch import load_file
from test_attention import CLOSE, EVEN, PADDED, P, make_batch, make_model
from torch.nn import functional as F
from transformers import AutoModel

from ptv2.attention import LayerPrefix, prefix_for_forward
from ptv2.backbone import load_tokenizer
from ptv2.errors import InputError
from ptv2.inside import attention_to_prefix, nearest, text_keys, token_keys, without_layer
from ptv2.model import PrefixModelForQuestionAnswering
from ptv2.prefix import PrefixConfig, to_past_key_values


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    return torch.stack((output.start_logits, output.end_logits), -1)


@pytest.mark.parametrize("lengths", [PADDED, EVEN])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shares_are_those_of_transformers_own_attentions(tiny_backbone, attention, lengths):
    model = make_model(tiny_backbone, attention, shift_positions=True)
    plain = AutoModel.from_pretrained(tiny_backbone, attn_implementation="eager").eval()
    batch = make_batch(plain.config, lengths)
    widened = {**batch, "attention_mask": F.pad(batch["attention_mask"], (P, 0), value=1)}
    with torch.no_grad():
        cache = to_past_key_values(model.prefix_encoder(), len(lengths))
        weights = torch.stack(plain(**widened, past_key_values=cache, output_attentions=True).attentions)  # [N, B, H, S, P + S]
    found = attention_to_prefix(model, batch)
    real = batch["attention_mask"].bool()
    assert found.shares.shape == (2, len(lengths), 4, max(lengths)) and torch.equal(found.real, real)
    wanted = weights[..., :P].sum(-1)
    assert wanted.std() > 0.05
    torch.testing.assert_close(found.shares.transpose(2, 3)[:, real], wanted.transpose(2, 3)[:, real], **CLOSE)


def test_means_leave_padding_out(tiny_bert):
    model = make_model(tiny_bert)
    batch = make_batch(model.backbone.config)
    found = attention_to_prefix(model, batch)
    alone = [attention_to_prefix(model, {name: part[i : i + 1, :n] for name, part in batch.items()}) for i, n in enumerate(PADDED)]
    weighted = sum(n * one.by_head() for n, one in zip(PADDED, alone, strict=True)) / sum(PADDED)
    torch.testing.assert_close(found.by_head(), weighted, **CLOSE)
    for i, n in enumerate(PADDED):
        assert found.along_text(i).shape == (2, n)
        torch.testing.assert_close(found.along_text(i), alone[i].along_text(), **CLOSE)


def test_a_layer_without_a_prefix_gives_it_nothing(tiny_bert):
    model = make_model(tiny_bert, layers=(1,))
    shares = attention_to_prefix(model, make_batch(model.backbone.config)).shares
    assert (shares[0] == 0).all() and (shares[1] > 0).all()


def test_looking_changes_nothing_and_ends(tiny_backbone):
    model = make_model(tiny_backbone)
    batch = make_batch(model.backbone.config)
    before = logits(model, batch)
    labelled = {**batch, "start_positions": torch.zeros(3, dtype=torch.long), "end_positions": torch.zeros(3, dtype=torch.long)}
    first = attention_to_prefix(model, labelled)
    assert torch.equal(logits(model, batch), before)
    assert first.shares.shape[0] == 2  # no layer seen twice, none of the last call
    assert torch.equal(attention_to_prefix(model, batch).shares, first.shares)


@pytest.mark.parametrize("removed", [0, 1])
@pytest.mark.parametrize("projection", [False, True])
def test_without_a_layer_the_others_stay(tiny_backbone, removed, projection):
    model = make_model(tiny_backbone, prefix_projection=projection, prefix_hidden_size=16)
    batch = make_batch(model.backbone.config)
    before = logits(model, batch)
    prefix = model.prefix_encoder().detach()
    with prefix_for_forward({1 - removed: LayerPrefix(*prefix[1 - removed])}), torch.no_grad():
        wanted = model.qa_outputs(model.backbone(**batch).last_hidden_state)  # [B, S, 2]
    smaller = without_layer(model, removed)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(smaller, batch)[real], wanted[real], **CLOSE)
    assert (wanted[real] - before[real]).abs().max() > 0.1
    assert torch.equal(logits(model, batch), before)
    assert smaller.prefix_encoder.layers == (1 - removed,) and smaller.backbone is model.backbone


def test_a_layer_that_has_no_prefix_or_the_last_one_cannot_be_removed(tiny_bert):
    with pytest.raises(InputError, match=r"The prefix of layer 0 cannot be removed: layers \[1\] have one"):
        without_layer(make_model(tiny_bert, layers=(1,)), 0)
    with pytest.raises(InputError, match="one must remain"):
        without_layer(make_model(tiny_bert, layers=(1,)), 1)


def test_a_tokens_key_in_the_first_layer_is_the_projected_embedding(tiny_bert):
    model = make_model(tiny_bert)
    tokenizer = load_tokenizer(model.source)
    ids = [7, 300, 41, 7]
    keys = token_keys(model, tokenizer, ids, batch_size=3)
    assert keys.shape == (2, 4, len(ids), 8)  # [N, H, V, D]
    w = load_file(tiny_bert / "model.safetensors")
    embedded = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    embedded = embedded + w["embeddings.position_embeddings.weight"][1]  # [CLS] stands at 0
    normal = F.layer_norm(embedded, (32,), w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"], 1e-12)
    at = "encoder.layer.0.attention.self.key"
    wanted = (normal @ w[f"{at}.weight"].T + w[f"{at}.bias"]).view(len(ids), 4, 8).transpose(0, 1)  # [H, V, D]
    torch.testing.assert_close(keys[0], wanted, **CLOSE)
    torch.testing.assert_close(keys[:, :, 0], keys[:, :, 3], **CLOSE)


def test_an_untrained_prefixs_keys_are_found_in_the_text_that_they_were_taken_from(tiny_backbone):
    text = "The harbour was dug by two hundred men from the islands."
    model = PrefixModelForQuestionAnswering.from_backbone(str(tiny_backbone), PrefixConfig(prefix_length=4), texts=[text], precision="fp32")
    batch = dict(load_tokenizer(model.source)(text, return_tensors="pt"))
    keys = text_keys(model, batch)[:, 0]  # [N, H, S, D]
    similarity, index = nearest(model.prefix_encoder()[:, 0].detach(), keys)
    assert index.shape == (2, 4, 4, 1)
    assert (similarity[0] > 1 - 1e-5).all()  # above the first layer the prefix has changed the text's keys
    assert (index[0] == index[0, :1]).all()  # the same token in every head


def test_nearest_goes_by_direction_alone_and_is_sorted():
    candidates = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [2.0, 2.0]])[None, None]  # [1, 1, V, D]
    keys = torch.tensor([[0.1, 0.0], [0.0, 9.0], [7.0, 6.9]])[None, None]
    similarity, index = nearest(keys, candidates, k=2)
    assert index[0, 0].tolist() == [[0, 3], [1, 3], [3, 0]]
    assert similarity[0, 0, :, 0].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert (similarity[..., 0] >= similarity[..., 1]).all()
