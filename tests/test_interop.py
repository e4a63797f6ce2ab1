"""Checkpoints both ways: PEFT computes from ours what we compute, and we from PEFT's."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering

from ptv2.errors import InputError
from ptv2.interop import read_peft_adapter
from ptv2.model import PrefixModelForQuestionAnswering
from ptv2.prefix import PrefixConfig

P = 5
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(path: Path, **prefix) -> PrefixModelForQuestionAnswering:
    config = PrefixConfig(**{"prefix_length": P, "init": "normal", "shift_positions": True, **prefix})
    model = PrefixModelForQuestionAnswering.from_backbone(str(path), config, precision="fp32").eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.qa_outputs.weight, std=0.3)
    torch.nn.init.normal_(model.qa_outputs.bias)
    return model


def make_batch(path: Path) -> dict[str, torch.Tensor]:
    """Without segments: PEFT's question-answering forward takes token_type_ids and drops them."""
    pad = json.loads((path / "config.json").read_text())["pad_token_id"]
    mask = torch.arange(12) < torch.tensor([[12], [7], [4]])
    ids = torch.randint(5, 900, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    """At real tokens, [tokens, 2]."""
    output = model(**batch)
    return torch.stack((output.start_logits, output.end_logits), -1)[batch["attention_mask"].bool()]


@pytest.mark.parametrize("projection", [False, True])
def test_peft_reads_what_we_save_and_computes_the_same(tiny_backbone, tmp_path, projection):
    model, batch = make_model(tiny_backbone, prefix_projection=projection, prefix_hidden_size=16), make_batch(tiny_backbone)
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForQuestionAnswering.from_pretrained(tiny_backbone), tmp_path).eval()
    torch.testing.assert_close(logits(peft, batch), logits(model, batch), **CLOSE)


def test_peft_numbers_positions_otherwise_than_our_default(tiny_backbone, tmp_path):
    model, batch = make_model(tiny_backbone, shift_positions=False), make_batch(tiny_backbone)
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForQuestionAnswering.from_pretrained(tiny_backbone), tmp_path).eval()
    assert (logits(peft, batch) - logits(model, batch)).abs().max() > 0.1


def test_peft_drops_the_segments(tiny_bert, tmp_path):
    model, batch = make_model(tiny_bert), make_batch(tiny_bert)
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForQuestionAnswering.from_pretrained(tiny_bert), tmp_path).eval()
    segments = {**batch, "token_type_ids": batch["attention_mask"]}
    assert torch.equal(logits(peft, segments), logits(peft, batch))
    assert (logits(model, segments) - logits(model, batch)).abs().max() > 0.1


def saved_by_peft(backbone: Path, path: Path, **options):
    torch.manual_seed(0)
    plain = AutoModelForQuestionAnswering.from_pretrained(backbone)
    peft = get_peft_model(plain, PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=P, **options)).eval()
    torch.nn.init.normal_(peft.base_model.qa_outputs.modules_to_save["default"].weight, std=0.3)
    peft.save_pretrained(path)
    return peft


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 16}])
def test_we_read_what_peft_saves_and_compute_the_same(tiny_backbone, tmp_path, options):
    peft = saved_by_peft(tiny_backbone, tmp_path, **options)
    model, batch = make_model(tiny_backbone), make_batch(tiny_backbone)
    assert (logits(model, batch) - logits(peft, batch)).abs().max() > 0.1
    read_peft_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, batch), logits(peft, batch), **CLOSE)


def test_an_adapter_read_into_a_projection_is_the_same_prefix(tiny_bert, tmp_path):
    peft = saved_by_peft(tiny_bert, tmp_path)
    model, batch = make_model(tiny_bert, prefix_projection=True, prefix_hidden_size=16), make_batch(tiny_bert)
    read_peft_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, batch), logits(peft, batch), atol=1e-4, rtol=1e-4)  # solved for, not copied


def test_the_adapter_config_says_what_the_adapter_is(tiny_backbone, tmp_path):
    make_model(tiny_backbone, layers=(1,)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "PREFIX_TUNING", "task_type": "QUESTION_ANS", "base_model_name_or_path": str(tiny_backbone), "num_virtual_tokens": P,
        "num_layers": 1, "num_attention_heads": 4, "token_dim": 32, "prefix_projection": False, "modules_to_save": ["qa_outputs"],
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(prompt_embeddings=torch.zeros(P + 1, 128)),
        lambda tensors: tensors.update(prompt_embeddings=torch.zeros(P, 64)),
        lambda tensors: tensors.update(prompt_embeddings=torch.zeros(128, P)),
        lambda tensors: tensors.update({"base_model.qa_outputs.weight": torch.zeros(3, 32)}),
        lambda tensors: tensors.pop("base_model.qa_outputs.bias"),
        lambda tensors: tensors.update(more=torch.zeros(1)),
    ],
)
def test_an_adapter_of_other_shapes_is_refused_and_changes_nothing(tiny_bert, tmp_path, change):
    model = make_model(tiny_bert)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=r"adapter_model.safetensors holds .*; .* with this prefix needs .*\(5, 128\)"):
        read_peft_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trained_state().items())
