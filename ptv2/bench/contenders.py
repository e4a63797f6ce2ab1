"""Who runs in the benchmarks: prefix tuning and LoRA of PEFT, full fine-tuning of transformers, and this package."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForQuestionAnswering

from ptv2.backbone import default_device, load_backbone, quiet_transformers, resolve_backbone
from ptv2.bank import PrefixBank
from ptv2.methods import METHODS, Build, build_model
from ptv2.prefix import PrefixConfig

OFFICIAL_LENGTH = 384  # to which the official question-answering code pads every window; also the default of BERT's run_squad.py


@dataclass(frozen=True)
class Contender:
    """Something that trains, or answers, question answering on batches of windows.

    Args:
        name: on the command line and in records.
        title: in tables.
        build: backbone, prefix length and seed -> a model that takes a batch by keywords.
        autocast: run the model under bf16 autocast.
        padded_to: length to which every window is padded; None for that of the longest in its batch.
    """

    name: str
    title: str
    build: Callable[[str, int, int], nn.Module]
    autocast: bool = False
    padded_to: int | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ptv2")


def _transformers_model(backbone: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with quiet_transformers():
        return AutoModelForQuestionAnswering.from_pretrained(resolve_backbone(backbone).path, dtype=torch.float32)


def _full(backbone: str, prefix_length: int, seed: int) -> nn.Module:
    return _transformers_model(backbone, seed)


def _peft_prefix(backbone: str, prefix_length: int, seed: int) -> nn.Module:
    config = PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=prefix_length)
    return get_peft_model(_transformers_model(backbone, seed), config)


def _peft_lora(backbone: str, prefix_length: int, seed: int) -> nn.Module:
    return get_peft_model(_transformers_model(backbone, seed), LoraConfig(task_type="QUESTION_ANS", r=8, lora_alpha=16))


def _ours(precision: str) -> Callable[[str, int, int], nn.Module]:
    def build(backbone: str, prefix_length: int, seed: int) -> nn.Module:
        config = PrefixConfig(prefix_length=prefix_length, init="normal")  # where it starts does not change how fast it goes
        return build_model("p-tuning-v2", backbone, config, seed=seed, precision=precision)

    return build


def _bank(prefixes: int) -> Callable[[str, int, int], nn.Module]:
    def build(backbone: str, prefix_length: int, seed: int) -> nn.Module:
        found = resolve_backbone(backbone)
        encoder = load_backbone(found)
        config = PrefixConfig(prefix_length=prefix_length, init="normal")
        models = [METHODS["p-tuning-v2"].build(Build(found, encoder, config, 8, seed + n)) for n in range(prefixes)]
        return PrefixBank(models)

    return build


TRAINING = (
    Contender("peft-padded", f"PEFT prefix tuning, padded to {OFFICIAL_LENGTH}", _peft_prefix, padded_to=OFFICIAL_LENGTH),
    Contender("peft-fp32", "PEFT prefix tuning, buckets", _peft_prefix),
    Contender("peft-bf16", "PEFT prefix tuning, buckets, bf16 autocast", _peft_prefix, autocast=True),
    Contender("peft-lora", "PEFT LoRA", _peft_lora),
    Contender("full-fp32", "full fine-tuning", _full),
    Contender("full-bf16", "full fine-tuning, bf16 autocast", _full, autocast=True),
    Contender("ptv2-fp32", "ptv2, fp32", _ours("fp32")),
    Contender("ptv2-bf16", "ptv2, bf16", _ours("bf16")),
    Contender("ptv2-int8", "ptv2, int8", _ours("int8")),
)
BANK_SIZES = (1, 2, 8, 64)
ANSWERING = (
    Contender("plain", "backbone with a span head", _full),
    Contender("peft-prefix", "PEFT prefix tuning", _peft_prefix),
    *(Contender(f"ptv2-{n}", f"ptv2, {n} {'prefix' if n == 1 else 'prefixes mixed'}", _bank(n)) for n in BANK_SIZES),
)


def find(name: str) -> Contender:
    """By name."""
    return next(contender for contender in (*TRAINING, *ANSWERING) if contender.name == name)


def prepared(name: str, backbone: str, prefix_length: int, seed: int = 0) -> nn.Module:
    """A contender's model on the device that is used."""
    return find(name).build(backbone, prefix_length, seed).to(default_device())
