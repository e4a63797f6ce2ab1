"""A checkpoint directory's description of itself, ptv2.json, and how a model to be trained starts at a checkpoint's weights.

Source of the idea to start a prompt at one pretrained without labels: Gu et al., "PPT: Pre-trained Prompt Tuning for Few-shot
Learning", ACL 2022 (https://aclanthology.org/2022.acl-long.576); `ptv2.pretraining` makes the task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptv2.attention import attention_shape
from ptv2.errors import InputError
from ptv2.prefix import PrefixConfig

if TYPE_CHECKING:
    from ptv2.model import SpanModel

DESCRIPTION_FILE = "ptv2.json"


@dataclass(frozen=True)
class Description:
    """What a checkpoint is: its method, the backbone's name and the sha256 of its weights, the method's settings."""

    method: str
    backbone: str
    sha256: str
    prefix: PrefixConfig
    lora_rank: int

    @classmethod
    def read(cls, path: Path) -> "Description":
        """Of a checkpoint directory.

        Raises:
            InputError: ptv2.json is missing or broken.
        """
        try:
            return cls.of(read_description(path))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path / DESCRIPTION_FILE} is not a ptv2 description ({error}): save the checkpoint again.") from error

    @classmethod
    def of(cls, described: dict) -> "Description":
        """From ptv2.json's content, which is `SpanModel.description()` and more."""
        backbone, prefix = described["backbone"], PrefixConfig(**described.get("prefix", {}))
        return cls(str(described["method"]), str(backbone["name"]), str(backbone["sha256"]), prefix, described.get("lora_rank", 8))


def read_description(path: Path) -> dict:
    """ptv2.json of a checkpoint directory.

    Raises:
        InputError: it is missing or broken.
    """
    file = path / DESCRIPTION_FILE
    if not file.is_file():
        raise InputError(f"{path} holds no {DESCRIPTION_FILE}: it is not a checkpoint of ptv2.")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): copy or save the checkpoint again.") from error
    if not isinstance(described, dict):
        raise InputError(f"{file} must hold a JSON object: copy or save the checkpoint again.")
    return described


def start_from(model: "SpanModel", path: Path) -> None:
    """Let all that `model` trains, its head too, start at the weights of a checkpoint of the same method and settings.

    Raises:
        InputError: there is no checkpoint, it is broken, or it is of another method, backbone, prefix or rank.
    """
    if not path.is_dir():
        raise InputError(f"init names the checkpoint {path}, which is no directory; give one that `ptv2 pretrain` or `ptv2 train` wrote.")
    there, here = Description.read(path), Description.of(model.description())
    wanted = [("method", there.method, here.method), ("backbone sha256", there.sha256, here.sha256)]
    for name in ("prefix_length", "layers", "shift_positions"):
        wanted.append((name, getattr(there.prefix, name), getattr(here.prefix, name)))
    wanted.append(("lora_rank", there.lora_rank, here.lora_rank))
    for name, found, needed in wanted:
        if name == "layers" and found != needed:  # all of them may be written as none
            everywhere = tuple(range(attention_shape(model.backbone.config).num_layers))
            found, needed = found or everywhere, needed or everywhere
        if found != needed:
            raise InputError(f"init names the checkpoint {path} with {name} {found}, not {needed}; give one trained with {needed}.")
    model.load_pretrained(path)
