"""The table of methods: each builds, counts as its formula says, learns, and draws from its seed alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from ptv2.errors import InputError
from ptv2.methods import METHODS, build_model, count_parameters
from ptv2.prefix import PrefixConfig

NORMAL = PrefixConfig(prefix_length=5, init="normal")
E, L, INNER, P, RANK = 32, 2, 64, 5, 3  # of the tiny backbones
HEAD = 2 * E + 2
LAYER_BIASES = 4 * E + E + INNER + E + E  # query, key, value and output; norm; both of the feed-forward network; norm


def make_batch(path: Path, lengths=(12, 7, 4)) -> dict[str, torch.Tensor]:
    pad = json.loads((path / "config.json").read_text())["pad_token_id"]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 900, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}


def build(method: str, path: Path, prefix: PrefixConfig = NORMAL, seed: int = 0, **more):
    return build_model(method, str(path), prefix, lora_rank=RANK, seed=seed, precision="fp32", **more)


def numbers_in_file(path: Path) -> int:
    return sum(tensor.numel() for name, tensor in load_file(path / "model.safetensors").items() if not name.startswith("pooler."))


COUNTS = {
    "p-tuning-v2": lambda path: P * 2 * L * E,
    "fine-tuning": numbers_in_file,
    "head-only": lambda path: 0,
    "lora": lambda path: L * 2 * (RANK * E + E * RANK),  # query and value; A and B
    "prompt-tuning": lambda path: P * E,
    "bitfit": lambda path: L * LAYER_BIASES + E,  # the embeddings' norm has a bias too
}


def assert_counts(model, path: Path, formula: int) -> None:
    counted = count_parameters(model, stored_bytes=7)
    assert counted.method == model.method
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == formula + HEAD
    assert (counted.formula, counted.trained, counted.head) == (formula, formula + HEAD, HEAD)
    assert counted.backbone == numbers_in_file(path)
    assert counted.total == counted.backbone + HEAD + (formula if model.method in ("p-tuning-v2", "lora", "prompt-tuning") else 0)
    assert counted.share == pytest.approx((formula + HEAD) / numbers_in_file(path))
    assert counted.stored_bytes == 7


def test_the_table_and_this_test_know_the_same_methods():
    assert set(COUNTS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_trained_parameters_are_those_of_the_formula_and_the_head(tiny_backbone, method):
    assert_counts(build(method, tiny_backbone), tiny_backbone, COUNTS[method](tiny_backbone))


@pytest.mark.parametrize(
    ("prefix", "formula"),
    [
        (PrefixConfig(P, prefix_projection=True, prefix_hidden_size=9, init="normal"), P * E + (E + 1) * 9 + (9 + 1) * 2 * L * E),
        (PrefixConfig(P, layers=(1,), init="normal"), P * 2 * E),
        (PrefixConfig(7, prefix_projection=True, prefix_hidden_size=9, layers=(0,)), 7 * E + (E + 1) * 9 + (9 + 1) * 2 * E),
    ],
)
def test_a_prefix_of_another_form_counts_by_its_formula(tiny_backbone, prefix, formula):
    assert_counts(build("p-tuning-v2", tiny_backbone, prefix), tiny_backbone, formula)


@pytest.mark.parametrize("method", METHODS)
def test_some_steps_lower_the_loss(tiny_backbone, method):
    model = build(method, tiny_backbone)
    batch = {**make_batch(tiny_backbone), "start_positions": torch.tensor([2, 3, 1]), "end_positions": torch.tensor([8, 3, 2])}
    before = model.eval()(**batch).loss.item()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(25):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    assert model.eval()(**batch).loss.item() < before - 0.1


@pytest.mark.parametrize("init", ["normal", "activations"])
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_alone_decides_what_is_drawn(tiny_bert, method, init):
    def trained(seed: int, before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(before)  # what was drawn before must not matter
        texts = ["A harbour was dug in 1871 by two hundred men.", "They were paid in herring and copper."]
        return build(method, tiny_bert, PrefixConfig(P, init=init), seed, texts=texts).trained_state()

    first, again, other = trained(0, before=1), trained(0, before=2), trained(1, before=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    expected = {"p-tuning-v2": "prefix_encoder.embedding.weight", "prompt-tuning": "prompt.embedding.weight"}
    assert {"qa_outputs.weight", expected.get(method, "qa_outputs.weight")} <= drawn
    assert any("lora_A" in name for name in drawn) == (method == "lora")


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_method_that_adds_nothing_computes_what_the_plain_backbone_does(tiny_backbone, method):
    """True of all but those that put vectors before the text: LoRA's B starts at zero."""
    model, batch = build(method, tiny_backbone).eval(), make_batch(tiny_backbone)
    hidden = AutoModel.from_pretrained(tiny_backbone).eval()(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    same = torch.allclose(model(**batch).start_logits[real], model.qa_outputs(hidden)[..., 0][real], atol=1e-5)
    assert same == (method not in ("p-tuning-v2", "prompt-tuning"))


@pytest.mark.parametrize("segments", [False, True])
def test_prompt_tuning_equals_a_forward_written_by_hand(tiny_bert, segments):
    model, batch = build("prompt-tuning", tiny_bert).eval(), make_batch(tiny_bert)
    if segments:
        batch["token_type_ids"] = (torch.arange(12) > 3).long() * batch["attention_mask"]
    plain = AutoModel.from_pretrained(tiny_bert).eval()
    prompt = model.prompt.embedding.weight.expand(3, P, E)
    zeros, ones = torch.zeros(3, P, dtype=torch.long), torch.ones(3, P, dtype=torch.long)
    hidden = plain(
        inputs_embeds=torch.cat((prompt, plain.embeddings.word_embeddings(batch["input_ids"])), 1),
        attention_mask=torch.cat((ones, batch["attention_mask"]), 1),
        token_type_ids=torch.cat((zeros, batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))), 1),
    ).last_hidden_state
    by_hand = model.qa_outputs(hidden)[:, P:]
    output = model(**batch)
    assert output.start_logits.shape == output.end_logits.shape == (3, 12)  # the prompt's places are cut off
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output.start_logits[real], by_hand[..., 0][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.end_logits[real], by_hand[..., 1][real], atol=1e-5, rtol=1e-5)


def test_a_prompt_that_leaves_too_few_positions_is_refused(tiny_backbone):
    model = build("prompt-tuning", tiny_backbone).eval()
    model(**make_batch(tiny_backbone, (512 - P,)))  # RoBERTa's 514 positions hold 512 tokens
    with pytest.raises(InputError, match="5 prompt and 508 text tokens exceed the backbone's 512 positions; lower max_length"):
        model(**make_batch(tiny_backbone, (513 - P,)))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("electra", {"embedding_size": 16}), ("albert", {"embedding_size": 16}), ("modernbert", {"cls_token_id": 1, "sep_token_id": 2})],
)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "lora"])
def test_other_families_count_and_run_too(tmp_path, family, sizes, method):
    config = AutoConfig.for_model(
        family, vocab_size=900, hidden_size=E, num_hidden_layers=L, num_attention_heads=4, intermediate_size=INNER, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model = build(method, tmp_path).eval()
    counted = count_parameters(model)
    assert counted.trained == counted.formula + counted.head
    assert model(**make_batch(tmp_path)).start_logits.shape == (3, 12)


def test_lora_without_known_targets_is_refused(tmp_path):
    sizes = {"vocab_size": 100, "hidden_size": E, "num_hidden_layers": L, "num_attention_heads": 4, "intermediate_size": INNER}
    AutoModel.from_config(AutoConfig.for_model("nomic_bert", **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="PEFT has no LoRA targets for nomic_bert"):
        build("lora", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "p-tuning-v3"}, 'The method "p-tuning-v3" is unknown; choose one of p-tuning-v2, fine-tuning, head-only'),
        ({"method": "lora", "lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"method": "lora", "precision": "fp8"}, 'precision is "fp8"; it must be "auto", "fp32", "bf16" or "int8"'),
        ({"method": "p-tuning-v2", "prefix": PrefixConfig(layers=(2,))}, "layers names layer 2; the backbone has layers 0 to 1"),
    ],
)
def test_bad_options_are_refused(tiny_bert, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        build_model(backbone=str(tiny_bert), **arguments)
