"""The models: padding and order change nothing, the frozen stays frozen, checkpoints hold what was trained and are checked when read."""

import contextlib
import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptv2.backbone import load_tokenizer, resolve_backbone
from ptv2.errors import InputError
from ptv2.features import MODEL_INPUTS, WindowConfig, collate, make_features
from ptv2.methods import METHODS, build_model, load_model
from ptv2.model import PrefixModelForQuestionAnswering, SpanModel
from ptv2.prefix import PrefixConfig
from ptv2.squad import load_examples

WINDOWS = WindowConfig(max_length=64, stride=16, max_question_length=16)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FROZEN = ("p-tuning-v2", "prompt-tuning", "head-only")


def make_model(path: Path, method: str = "p-tuning-v2", precision: str = "fp32", **prefix) -> SpanModel:
    """With a head whose logits are of the order of 1, so that tolerances mean something."""
    config = PrefixConfig(**{"prefix_length": 4, "init": "normal", **prefix})
    model = build_model(method, str(path), config, lora_rank=2, precision=precision)
    with torch.no_grad():
        model.qa_outputs.weight *= 15
    return model.eval()


@functools.cache
def make_batch(path: Path) -> dict[str, Tensor]:
    """Six windows of different lengths, labels included."""
    tokenizer = load_tokenizer(resolve_backbone(str(path)))
    features = make_features(load_examples(str(DATA / "squad_v1.json"), "dev"), tokenizer, WINDOWS, cache=False)
    rows = [{name: row[name] for name in MODEL_INPUTS if name in row} for row in features.select(range(6))]
    batch = collate(rows, tokenizer)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    return batch


def steps(model: SpanModel, batch, n: int = 2) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(n):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    model.eval()


@torch.no_grad()
def logits(model: SpanModel, batch) -> Tensor:
    output = model(**batch)
    return torch.stack((output.start_logits, output.end_logits))  # [2, B, S]


def backbone_sha256(model: SpanModel) -> str:
    """Of all its tensors, LoRA's own aside."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.backbone.state_dict().items()):
        if ".lora_" not in name:
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", FROZEN)
def test_padding_changes_neither_logits_nor_loss(tiny_backbone, method):
    model, batch = make_model(tiny_backbone, method), make_batch(tiny_backbone)
    S, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    wider = {name: part if part.ndim == 1 else torch.nn.functional.pad(part, (0, 9)) for name, part in batch.items()}
    wider["input_ids"][:, S:] = load_tokenizer(model.source).pad_token_id
    torch.testing.assert_close(logits(model, wider)[:, :, :S][:, real], logits(model, batch)[:, real], **CLOSE)
    torch.testing.assert_close(model(**wider).loss, model(**batch).loss, **CLOSE)
    for i, length in enumerate(real.sum(1).tolist()):  # and alone, without any padding
        alone = {name: part[i : i + 1] if part.ndim == 1 else part[i : i + 1, :length] for name, part in batch.items()}
        torch.testing.assert_close(logits(model, alone)[:, 0], logits(model, batch)[:, i, :length], **CLOSE)


@pytest.mark.parametrize("method", FROZEN)
def test_what_stands_in_padded_places_changes_nothing(tiny_backbone, method):
    model, batch = make_model(tiny_backbone, method), make_batch(tiny_backbone)
    garbage = torch.randint(5, 900, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], garbage)}
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    torch.testing.assert_close(logits(model, changed), logits(model, batch), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(**changed).loss, model(**batch).loss, atol=1e-6, rtol=0)


def test_logits_at_padding_take_no_share_of_a_softmax(tiny_backbone):
    model, batch = make_model(tiny_backbone), make_batch(tiny_backbone)
    padding = batch["attention_mask"] == 0
    assert (logits(model, batch).softmax(-1)[:, padding] == 0).all()


@pytest.mark.parametrize("method", FROZEN)
def test_the_order_of_a_batch_does_not_matter(tiny_backbone, method):
    model, batch = make_model(tiny_backbone, method), make_batch(tiny_backbone)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    turned = {name: part[order] for name, part in batch.items()}
    torch.testing.assert_close(logits(model, turned), logits(model, batch)[:, order], **CLOSE)
    torch.testing.assert_close(model(**turned).loss, model(**batch).loss, **CLOSE)


def test_without_a_mask_all_tokens_are_real(tiny_backbone):
    model, batch = make_model(tiny_backbone), make_batch(tiny_backbone)
    short = {"input_ids": batch["input_ids"][:, :10]}
    assert torch.equal(logits(model, short), logits(model, {**short, "attention_mask": torch.ones(6, 10, dtype=torch.long)}))


def test_the_loss_is_the_mean_of_both_cross_entropies_by_hand(tiny_backbone):
    model, batch = make_model(tiny_backbone), make_batch(tiny_backbone)
    total = 0.0
    for scores, labels in zip(logits(model, batch).double().numpy(), ("start_positions", "end_positions"), strict=True):
        for row, mask, label in zip(scores, batch["attention_mask"].numpy(), batch[labels].tolist(), strict=True):
            total -= row[label] - np.log(np.exp(row[mask == 1]).sum())
    output = model(**batch)
    assert output.loss.item() == pytest.approx(total / 12, abs=1e-5)
    assert output.start_logits.dtype == output.end_logits.dtype == torch.float32
    assert model(batch["input_ids"], batch["attention_mask"]).loss is None


@pytest.mark.parametrize("method", METHODS)
def test_only_trained_parameters_get_a_gradient_and_all_of_them_do(tiny_backbone, method):
    model, batch = make_model(tiny_backbone, method), make_batch(tiny_backbone)
    model.train()(**batch).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(model.trained_names)


@pytest.mark.parametrize("method", METHODS)
def test_steps_change_what_is_trained_and_nothing_else_of_the_backbone(tiny_bert, method):
    model, batch = make_model(tiny_bert, method), make_batch(tiny_bert)
    before = backbone_sha256(model)
    trained = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    steps(model, batch, 3)
    assert (backbone_sha256(model) != before) == (method in ("fine-tuning", "bitfit"))
    # Rows of an embedding that no text names may stay; each tensor as a whole must not.
    assert not [name for name, tensor in model.trained_state().items() if torch.equal(tensor, trained[name])]


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_backbone_stays_in_evaluation_mode(tiny_bert, method):
    model, batch = make_model(tiny_bert, method), make_batch(tiny_bert)
    model.train()
    assert model.training
    assert model.backbone.training == (method in ("fine-tuning", "bitfit"))
    assert torch.equal(logits(model, batch), logits(model, batch)) != model.backbone.training  # dropout acts or it does not
    model.eval()
    assert not model.training and not model.backbone.training


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_comes_back_bit_by_bit(tiny_backbone, tmp_path, method):
    model, batch = make_model(tiny_backbone, method), make_batch(tiny_backbone)
    steps(model, batch)
    model.save_pretrained(tmp_path, windows={"max_length": 64})
    loaded = load_model(tmp_path, precision="fp32")
    assert not loaded.training
    assert type(loaded) is type(model)
    assert loaded.trained_names == model.trained_names
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert json.loads((tmp_path / "ptv2.json").read_text())["windows"] == {"max_length": 64}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_was_trained_is_stored(tiny_bert, tmp_path, method):
    model = make_model(tiny_bert, method)
    model.save_pretrained(tmp_path)
    if method == "p-tuning-v2":
        files, names = {"ptv2.json", "adapter_config.json", "adapter_model.safetensors"}, ["prompt_embeddings"]
        names += ["base_model.qa_outputs.weight", "base_model.qa_outputs.bias"]
    else:
        files, names = {"ptv2.json", "model.safetensors"}, model.trained_names
    assert {file.name for file in tmp_path.iterdir()} == files
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert set(file.keys()) == set(names)
        numbers = sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)
    assert numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_setting_of_the_prefix_comes_back(tiny_backbone, tmp_path):
    model, batch = make_model(tiny_backbone, layers=(1,), shift_positions=True, prefix_dropout=0.1), make_batch(tiny_backbone)
    model.save_pretrained(tmp_path)
    loaded = PrefixModelForQuestionAnswering.from_pretrained(tmp_path, precision="fp32")
    assert loaded.prefix_encoder.config == model.prefix_encoder.config
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_the_projection_is_folded_when_saved(tiny_backbone, tmp_path):
    model, batch = make_model(tiny_backbone, prefix_projection=True, prefix_hidden_size=16), make_batch(tiny_backbone)
    steps(model, batch)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (4, 2 * 2 * 32)
    loaded = PrefixModelForQuestionAnswering.from_pretrained(tmp_path, precision="fp32")
    assert not loaded.prefix_encoder.config.prefix_projection
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_logits_are_near_trained_weights_stay_fp32_and_a_step_works(tiny_bert, tmp_path, method):
    model, exact, batch = make_model(tiny_bert, method, "bf16"), make_model(tiny_bert, method), make_batch(tiny_bert)
    learns = method in ("fine-tuning", "bitfit")
    autocast = torch.autocast("cpu", torch.bfloat16) if learns else contextlib.nullcontext()
    real = batch["attention_mask"].bool()
    with autocast:
        # bf16 keeps 8 bits, so that a number is off by up to 0.4 %; some ten roundings in a row, logits up to about 5.
        torch.testing.assert_close(logits(model, batch)[:, real], logits(exact, batch)[:, real], atol=0.15, rtol=0)
    trained = dict(model.named_parameters())
    assert {trained[name].dtype for name in model.trained_names} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.backbone.parameters() if not parameter.requires_grad}
    assert frozen == ({torch.float32} if method == "bitfit" else set() if learns else {torch.bfloat16})
    model.eval()
    before = model(**batch).loss.item()
    optimiser = torch.optim.AdamW([trained[name] for name in model.trained_names], lr=1e-3)
    for _ in range(5):
        optimiser.zero_grad()
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        optimiser.step()
    assert model(**batch).loss.item() < before
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(next(tmp_path.glob("*.safetensors"))).values()} == {torch.float32}


def weights_of(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def describe(path: Path, **changes) -> None:
    file = path / "ptv2.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pickle_instead(path: Path) -> None:
    weights = weights_of(path)
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def reshape(path: Path) -> None:
    tensors = load_file(weights_of(path))
    save_file({name: tensor[..., :1].contiguous() for name, tensor in tensors.items()}, weights_of(path))


DAMAGES = {
    "truncated": (lambda path: weights_of(path).write_bytes(weights_of(path).read_bytes()[:-9]), "is not a whole safetensors file .*again"),
    "garbage": (lambda path: weights_of(path).write_bytes(b"\xff" * 99), "is not a whole safetensors file .*again"),
    "empty": (lambda path: weights_of(path).write_bytes(b""), "is not a whole safetensors file .*again"),
    "missing": (lambda path: weights_of(path).unlink(), r"model.safetensors is missing: .* save it again"),
    "pickled": (pickle_instead, r"model.safetensors is missing: .* save it again"),
    "other shapes": (reshape, r"model.safetensors (holds .* needs|does not hold the parameters of)"),
    "no JSON": (lambda path: (path / "ptv2.json").write_text("{"), "ptv2.json is not valid JSON .*again"),
    "no UTF-8": (lambda path: (path / "ptv2.json").write_bytes(b'{"\xff": 1}'), "ptv2.json is not valid JSON .*again"),
    "no object": (lambda path: (path / "ptv2.json").write_text("[]"), "ptv2.json must hold a JSON object.*again"),
    "no description": (lambda path: (path / "ptv2.json").unlink(), "holds no ptv2.json: it is not a checkpoint"),
    "no method": (lambda path: (path / "ptv2.json").write_text("{}"), "ptv2.json is not a ptv2 description .*again"),
    "backbone as text": (lambda path: describe(path, backbone="x"), "ptv2.json is not a ptv2 description"),
    "unknown method": (lambda path: describe(path, method="p-tuning-v3"), 'The method "p-tuning-v3" is unknown; choose one of p-tuning'),
    "no text": (lambda path: describe(path, method=[]), r'The method "\[\]" is unknown'),
    "unknown field": (lambda path: describe(path, prefix={"psl": 4}), "ptv2.json is not a ptv2 description .*psl"),
    "prefix as text": (lambda path: describe(path, prefix="16"), "ptv2.json is not a ptv2 description"),
    "length as text": (lambda path: describe(path, prefix={"prefix_length": "4"}), "prefix_length is 4; .* a whole number"),
    "rank as text": (lambda path: describe(path, lora_rank="8"), "lora_rank is 8; .* a whole number"),
    "no backbone": (lambda path: describe(path, backbone={"name": "no/such", "sha256": ""}), 'The backbone "no/such" was not found'),
}  # fmt: skip


@pytest.mark.parametrize("method", ["p-tuning-v2", "head-only"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tiny_bert, tmp_path, method, damage):
    make_model(tiny_bert, method).save_pretrained(tmp_path)
    load_model(tmp_path)
    break_it, sentence = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(InputError, match=sentence):
        load_model(tmp_path)


def test_another_backbones_weights_are_refused(tiny_bert, tmp_path):
    backbone = shutil.copytree(tiny_bert, tmp_path / "backbone")
    make_model(backbone).save_pretrained(tmp_path / "run")
    weights = load_file(backbone / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1e-6
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"was trained on a backbone with sha256 \w{12}\.\.\., but .* is \w{12}\.\.\.: give the backbone"):
        load_model(tmp_path / "run")


def test_a_model_of_another_method_is_not_a_prefix_model(tiny_bert, tmp_path):
    make_model(tiny_bert, "lora").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds a lora model, not p-tuning-v2; load it with ptv2\.load_model"):
        PrefixModelForQuestionAnswering.from_pretrained(tmp_path)


def test_a_zero_prefix_still_takes_its_share_of_every_softmax(tiny_bert):
    """By hand, in the first layer: P keys with logit 0 take P / (P + Σ exp(logit)), and the values shrink by that."""
    model, batch = make_model(tiny_bert, init="zero", prefix_length=4), make_batch(tiny_bert)
    assert not model.prefix_encoder().any()
    bert = model.backbone
    one = {name: batch[name][:1, : int(batch["attention_mask"][0].sum())] for name in ("input_ids", "token_type_ids")}
    hidden = bert.embeddings(**one)  # [1, S, E]
    attention = bert.encoder.layer[0].attention.self
    query, key, value = (
        layer(hidden).view(1, hidden.shape[1], 4, 8).transpose(1, 2) for layer in (attention.query, attention.key, attention.value)
    )
    exponentials = (query @ key.transpose(2, 3) / 8**0.5).exp()  # [1, H, S, S]
    text = exponentials.sum(-1, keepdim=True)
    shrunk = (exponentials / text) @ value * (1 - 4 / (4 + text))  # [1, H, S, D]
    seen = []
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        model(**one)
    hook.remove()
    torch.testing.assert_close(seen[0], shrunk.transpose(1, 2).flatten(2), **CLOSE)


@pytest.mark.parametrize(("more", "alike"), [({}, True), ({"prefix_projection": True, "prefix_hidden_size": 8}, False)])
def test_the_places_of_a_zero_prefix_stay_copies_unless_an_mlp_sets_them_apart(more, alike, tiny_bert):
    model, batch = make_model(tiny_bert, init="zero", **more), make_batch(tiny_bert)
    steps(model, batch, n=3)
    prefix = model.prefix_encoder()  # [L, 2, H, P, D]
    assert prefix.abs().amax((2, 3, 4)).min() > 1e-3  # each layer's keys and values have learned
    assert torch.allclose(prefix, prefix[:, :, :, :1].expand_as(prefix), atol=1e-5) == alike
