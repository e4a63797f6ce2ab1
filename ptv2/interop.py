"""Prefix checkpoints in PEFT's format (https://huggingface.co/docs/peft/developer_guides/checkpoint).

adapter_model.safetensors holds `prompt_embeddings`, float [P, 2·L·E], and the head under `base_model.qa_outputs`;
adapter_config.json says the rest. `PeftModel.from_pretrained(AutoModelForQuestionAnswering..., path)` reads it. PEFT
numbers the text from P on, so it computes the same logits only for a prefix trained with `shift_positions=True`; and
its question-answering forward drops token_type_ids, so a BERT that tells question from text by them differs there.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PrefixTuningConfig
from safetensors.torch import save_file

from ptv2.errors import InputError
from ptv2.prefix import unflatten

if TYPE_CHECKING:
    from ptv2.model import PrefixModelForQuestionAnswering

ADAPTER_FILE = "adapter_model.safetensors"


def write_peft_adapter(model: "PrefixModelForQuestionAnswering", path: Path) -> None:
    """Write a prefix and its head as a PEFT prefix-tuning adapter into the directory `path`.

    A prefix in some layers only is written with those layers alone; PEFT has no word for it and cannot run it.
    """
    encoder = model.prefix_encoder
    shape = encoder.shape
    path.mkdir(parents=True, exist_ok=True)
    flat = encoder.flat().detach().float().cpu()  # [P, 2·L·E]
    tensors = {
        "prompt_embeddings": flat.contiguous(),
        "base_model.qa_outputs.weight": model.qa_outputs.weight.detach().cpu().contiguous(),
        "base_model.qa_outputs.bias": model.qa_outputs.bias.detach().cpu().contiguous(),
    }
    save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})
    config = PrefixTuningConfig(
        task_type="QUESTION_ANS",
        base_model_name_or_path=model.source.name,
        inference_mode=True,
        num_virtual_tokens=flat.shape[0],
        num_layers=len(encoder.layers),
        num_attention_heads=shape.num_heads,
        token_dim=shape.num_heads * shape.head_dim,
        num_transformer_submodules=1,
        encoder_hidden_size=shape.hidden_size,
        prefix_projection=False,
        modules_to_save=["qa_outputs"],
    )
    config.save_pretrained(str(path))


@torch.no_grad()
def read_peft_adapter(model: "PrefixModelForQuestionAnswering", path: Path) -> None:
    """Take the prefix and the head from a PEFT prefix-tuning adapter.

    Raises:
        InputError: the file is damaged, or its shapes do not fit the model.
    """
    from ptv2.model import read_safetensors

    tensors = read_safetensors(path / ADAPTER_FILE)
    encoder = model.prefix_encoder
    width = 2 * len(encoder.layers) * encoder.shape.num_heads * encoder.shape.head_dim
    wanted = {
        "prompt_embeddings": (encoder.config.prefix_length, width),
        "base_model.qa_outputs.weight": tuple(model.qa_outputs.weight.shape),
        "base_model.qa_outputs.bias": tuple(model.qa_outputs.bias.shape),
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise InputError(f"{path / ADAPTER_FILE} holds {found}; {model.source.name} with this prefix needs {wanted}.")
    encoder.set_prefix(unflatten(tensors["prompt_embeddings"], len(encoder.layers), encoder.shape))
    model.qa_outputs.weight.copy_(tensors["base_model.qa_outputs.weight"])
    model.qa_outputs.bias.copy_(tensors["base_model.qa_outputs.bias"])
