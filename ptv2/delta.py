"""Fully fine-tuned weights as their difference to the backbone: 8 bits a weight, one scale a row.

Fine-tuning moves a weight little, so the differences of a row span a narrow range, and 255 steps over it lose next to
nothing. Of the word embeddings, half of a small backbone, only the rows that matter most are stored; the others stay as
they were pretrained. The head, which the backbone lacks, is stored whole. The file is tied to the backbone by the hash
of its weights.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptv2 import records
from ptv2.backbone import load_backbone, load_tokenizer
from ptv2.errors import InputError
from ptv2.methods import load_model
from ptv2.model import DELTA_FILE, DESCRIPTION_FILE, SpanModel, read_safetensors
from ptv2.training import RUN_FILE

_STEPS = 127  # int8 without -128, so that the range is even


def quantise(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in 8 bits, with one scale a row; a vector is one row.

    Args:
        difference: float [..., columns].

    Returns:
        steps int8 [..., columns] and scale float32 [..., 1]: their product is within half a scale of `difference`.
    """
    scale = difference.abs().amax(dim=-1, keepdim=True) / _STEPS
    steps = torch.round(difference / scale.clamp(min=torch.finfo(scale.dtype).tiny))
    return steps.to(torch.int8), scale


def export_delta(run: Path, output: Path, texts: Iterable[str], word_rows: int, command: str) -> dict:
    """Write a run of full fine-tuning into the directory `output` as a difference: a checkpoint like any other.

    Where the run has a record, `output` gets it, too, without the log, with the new size and with how it was made.

    Args:
        texts, word_rows: as for `save_delta`.
        command: that repeats this.

    Returns:
        `output` as a string, and stored_bytes, the size of what is needed beside the backbone.

    Raises:
        InputError: the checkpoint is broken, or of another method, or `output` is the run itself.
    """
    if output.resolve() == run.resolve():
        raise InputError(f"The output directory {output} is the run itself: give another one.")
    save_delta(load_model(run, precision="fp32"), output, texts, word_rows)
    shutil.copyfile(run / DESCRIPTION_FILE, output / DESCRIPTION_FILE)
    stored = (output / DELTA_FILE).stat().st_size
    if (run / RUN_FILE).is_file():
        record = {name: value for name, value in records.read_json(run / RUN_FILE).items() if name != "log_history"}
        record["parameters"] = {**record["parameters"], "stored_bytes": stored}
        record["export"] = {"of": run.resolve().name, "word_rows": word_rows, **records.provenance(command)}
        records.write_json(output / RUN_FILE, record)
    return {"checkpoint": str(output), "stored_bytes": stored}


def save_delta(model: SpanModel, path: Path, texts: Iterable[str], word_rows: int) -> None:
    """Write a fully fine-tuned model's weights into the directory `path` as a difference to its backbone.

    Args:
        texts: like those that the model will read; they say which words are frequent.
        word_rows: of the word embeddings, keep this many rows: those with the largest frequency times squared movement,
            the error that leaving a row out adds to the embeddings of these texts.

    Raises:
        InputError: the model is of another method, or word_rows is below 0.
    """
    if model.method != "fine-tuning":
        raise InputError(f"A {model.method} checkpoint holds no whole backbone to take the difference of; only fine-tuning's does.")
    if word_rows < 0:
        raise InputError(f"word_rows is {word_rows}; it must be at least 0.")
    pretrained, words = _pretrained(model), _words_name(model)
    tensors = {}
    for name, weight in model.trained_state().items():
        if name not in pretrained:
            tensors[name] = weight
            continue
        difference = weight - pretrained[name]
        if name == words:
            counts = _token_counts(model, texts, len(weight))
            rows = (counts * difference.pow(2).sum(dim=1)).topk(min(word_rows, len(weight))).indices.sort().values
            tensors[f"{name}.rows"], difference = rows.to(torch.int32), difference[rows]
        tensors[f"{name}.steps"], tensors[f"{name}.scale"] = quantise(difference)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / DELTA_FILE, metadata={"format": "pt", "backbone_sha256": model.source.sha256})


@torch.no_grad()
def load_delta(model: SpanModel, path: Path) -> None:
    """Set a fine-tuning model's weights to its backbone's plus the difference in the directory `path`.

    Raises:
        InputError: the file is damaged, or was made for another backbone or another kind of model.
    """
    file = path / DELTA_FILE
    tensors = read_safetensors(file)
    with safe_open(file, "pt") as stored:
        made_for = (stored.metadata() or {}).get("backbone_sha256", "none")
    if made_for != model.source.sha256:
        raise InputError(
            f"{file} is a difference to a backbone with sha256 {made_for[:12]}..., but {model.source.name} is "
            f"{model.source.sha256[:12]}...: give the backbone it was made for."
        )
    pretrained, words = _pretrained(model), _words_name(model)
    rows = tensors.pop(f"{words}.rows", torch.zeros(0)).long()  # [n]
    parameters = {name: model.get_parameter(name) for name in model.trained_names}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, weight in parameters.items():
        shape = (len(rows), weight.shape[1]) if name == words else tuple(weight.shape)
        wanted |= {f"{name}.steps": shape, f"{name}.scale": (*shape[:-1], 1)} if name in pretrained else {name: shape}
    fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted
    if not fits or (len(rows) and not 0 <= rows.min() <= rows.max() < len(pretrained[words])):
        raise InputError(f"{file} does not hold the difference of {model.method} to this backbone: export it again.")
    for name, weight in parameters.items():
        if name not in pretrained:
            weight.copy_(tensors[name])
            continue
        difference = tensors[f"{name}.steps"] * tensors[f"{name}.scale"]
        if name == words:
            difference = torch.zeros_like(pretrained[name]).index_copy(0, rows, difference)
        weight.copy_(pretrained[name] + difference)


def _pretrained(model: SpanModel) -> dict[str, Tensor]:
    """The backbone's own weights under the model's names."""
    return {f"backbone.{name}": tensor for name, tensor in load_backbone(model.source).state_dict().items()}


def _words_name(model: SpanModel) -> str:
    """The name of the word embeddings, [vocabulary, E]."""
    words = model.backbone.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is words)


def _token_counts(model: SpanModel, texts: Iterable[str], vocabulary: int) -> Tensor:
    """How often each token stands in the texts, float [vocabulary]."""
    tokenizer = load_tokenizer(model.source)
    ids = [index for text in texts for index in tokenizer(text, verbose=False)["input_ids"]]
    return torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocabulary).float()
