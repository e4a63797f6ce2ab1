"""The question-answering models: a backbone, a span head, and what a method adds between them.

`SpanModel` is the plain form (text → encoder → a start and an end logit per token); a method of `ptv2.methods` decides
which of its parameters are trained. `PrefixModelForQuestionAnswering` adds the prefix. Both are saved as what was
trained, tied to the backbone by the hash of its weights.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from ptv2.attention import (
    LayerPrefix,
    attention_shape,
    open_to_prefix,
    prefix_for_forward,
    sample_activations,
    shifted_position_ids,
    text_positions,
)
from ptv2.backbone import Backbone, fast_dtype, load_backbone, load_tokenizer, resolve_backbone
from ptv2.checkpoint import DESCRIPTION_FILE, start_from
from ptv2.errors import InputError
from ptv2.int8 import freeze_in_int8
from ptv2.prefix import PrefixConfig, PrefixEncoder

WEIGHTS_FILE = "model.safetensors"
DELTA_FILE = "delta.safetensors"  # fully fine-tuned weights as a difference to the backbone


class SpanModel(nn.Module):
    """A backbone with a span head: one linear layer from E to a start and an end logit.

    Args:
        backbone: what `resolve_backbone` found.
        encoder: that backbone, loaded.
        method: the name in `ptv2.methods.METHODS` that built this.
        seed: draws the head from N(0, 0.02), as BERT's heads are.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer shall divide by accumulation steps itself

    def __init__(self, backbone: Backbone, encoder: PreTrainedModel, method: str, seed: int = 0):
        super().__init__()
        self.source, self.method = backbone, method
        self.backbone = encoder
        self.qa_outputs = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.normal_(self.qa_outputs.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.qa_outputs.bias)

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs int [B, S] each to hidden states [B, S, E]."""
        return self.backbone(**inputs).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Span logits, and the loss where labels are given.

        Args:
            input_ids: int [B, S].
            attention_mask: int [B, S], 1 for real tokens; None if all are.
            token_type_ids: int [B, S], for backbones that know segments.
            start_positions, end_positions: int [B], token indices of the answer.

        Returns:
            loss (mean of the start's and the end's cross-entropy) or None; start_logits and end_logits, float32 [B, S].
            Logits at padding are the least float32, so that padding takes no share of a softmax.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.encode(inputs)  # [B, S, E]
        start_logits, end_logits = span_logits(self.qa_outputs(hidden.to(self.qa_outputs.weight.dtype)), attention_mask)
        loss = None
        if start_positions is not None and end_positions is not None:
            cross_entropy = nn.functional.cross_entropy
            loss = (cross_entropy(start_logits, start_positions) + cross_entropy(end_logits, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits)

    def train(self, mode: bool = True) -> "SpanModel":
        """Dropout acts only where something is learned: a backbone of which no original weight is trained stays in evaluation mode."""
        super().train(mode)
        if not self.trains_backbone:
            self.backbone.eval()
        return self

    @property
    def trains_backbone(self) -> bool:
        """Whether any of the backbone's own weights is trained."""
        return self.method in ("fine-tuning", "bitfit")

    def train_only(self, is_trained) -> "SpanModel":
        """Freeze all parameters but those whose name `is_trained` accepts; the head is always trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("qa_outputs.") or is_trained(name))
        return self

    @property
    def trained_names(self) -> list[str]:
        """Names of the trained parameters: what is optimised, counted and saved."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def trained_state(self) -> dict[str, Tensor]:
        """The trained parameters by name, on the CPU."""
        return {name: self.get_parameter(name).detach().cpu().contiguous() for name in self.trained_names}

    def load_trained_state(self, file: Path) -> None:
        """Take the trained parameters from a safetensors file.

        Raises:
            InputError: the file is damaged or holds other parameters.
        """
        state = read_safetensors(file)
        mine = {name: self.get_parameter(name) for name in self.trained_names}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != {n: tuple(p.shape) for n, p in mine.items()}:
            raise InputError(f"{file} does not hold the parameters of {self.method} for this backbone.")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state[name])

    def freeze_in(self, dtype: torch.dtype) -> "SpanModel":
        """Keep a wholly frozen backbone's weights in `dtype`; trained ones stay float32, and so do all that run beside them.

        Raises:
            InputError: int8 does not go with this method or machine.
        """
        if dtype == torch.int8:
            freeze_in_int8(self.backbone)
            return self
        if self.trains_backbone:
            return self
        for module in self.backbone.modules():
            if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        return self

    def description(self) -> dict:
        """What a checkpoint says of itself in ptv2.json."""
        return {"method": self.method, "backbone": {"name": self.source.name, "sha256": self.source.sha256}}

    def save_pretrained(self, path: str | Path, **more: dict) -> None:
        """Write what was trained, and ptv2.json with the method, the backbone and `more` (such as window settings)."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_file(self.trained_state(), path / WEIGHTS_FILE, metadata={"format": "pt"})
        self._write_description(path, more)

    def load_pretrained(self, path: Path) -> None:
        """Take the trained weights of a checkpoint directory into this model, built alike."""
        if (path / DELTA_FILE).is_file():
            from ptv2.delta import load_delta

            load_delta(self, path)
        else:
            self.load_trained_state(path / WEIGHTS_FILE)

    def _write_description(self, path: Path, more: dict) -> None:
        text = json.dumps({**self.description(), **more}, indent=2, ensure_ascii=False)
        (path / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")


def span_logits(logits: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A head's output [B, S, 2] to start and end logits, float32 [B, S] each, the least float32 at padding."""
    logits = logits.float().masked_fill(~attention_mask.bool()[:, :, None], torch.finfo(torch.float32).min)
    return logits.unbind(-1)


class PrefixModelForQuestionAnswering(SpanModel):
    """P-tuning v2: a frozen backbone whose attention layers see a trained prefix before the text.

    `prefix_encoder()` gives the prefix, [num_layers, 2, num_heads, prefix_length, head_dim], key then value.
    """

    def __init__(self, backbone: Backbone, encoder: PreTrainedModel, config: PrefixConfig, seed: int = 0):
        super().__init__(backbone, encoder, "p-tuning-v2", seed)
        open_to_prefix(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.prefix_encoder = PrefixEncoder(config, attention_shape(encoder.config))
        self.train_only(lambda name: name.startswith("prefix_encoder."))

    @classmethod
    def from_backbone(
        cls,
        name: str,
        config: PrefixConfig | None = None,
        *,
        texts: list[str] | None = None,
        seed: int = 0,
        precision: str = "auto",
        attn_implementation: str | None = None,
    ) -> "PrefixModelForQuestionAnswering":
        """A new, untrained model.

        Args:
            name: directory or hub name of the backbone.
            config: of the prefix; PrefixConfig() if None.
            texts: training text for init="activations"; the embedded corpus if None.
            seed: of the head and the prefix.
            precision: dtype of the frozen weights: "auto", "fp32", "bf16" or "int8".
            attn_implementation: "sdpa", "eager", ...; None takes the fastest one.

        Raises:
            InputError: unknown backbone, or one that no prefix can reach.
        """
        config = config or PrefixConfig()
        backbone = resolve_backbone(name)
        model = cls(backbone, load_backbone(backbone, attn_implementation), config, seed)
        model.initialise(texts, seed)
        return model.freeze_in(fast_dtype(precision))

    def initialise(self, texts: list[str] | None, seed: int) -> None:
        """Start the prefix as its config says; see `from_backbone` for `texts`."""
        encoder = self.prefix_encoder
        if encoder.config.checkpoint is not None:
            start_from(self, encoder.config.checkpoint)
            return
        if encoder.config.init == "normal":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                encoder.set_normal()
            return
        if encoder.config.init == "zero":
            encoder.set_zero()
            return
        if texts is None:
            from ptv2.squad import load_examples  # only this default needs data

            texts = sorted({example.context for example in load_examples("embedded", "train")})
        if not texts:
            raise InputError('init="activations" needs texts to start from; give some, or choose init="normal".')
        generator = torch.Generator().manual_seed(seed)
        P = encoder.config.prefix_length
        drawn = [texts[i] for i in torch.randperm(len(texts), generator=generator)[:P].tolist()]
        tokenizer = load_tokenizer(self.source)
        limit = min(384, text_positions(self.backbone))
        batches = [tokenizer(text, truncation=True, max_length=limit, return_tensors="pt") for text in drawn]
        prefix = sample_activations(self.backbone, [dict(batch) for batch in batches], P, generator)
        encoder.set_prefix(prefix[list(encoder.layers)])

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs int [B, S] each to hidden states [B, S, E], every layer seeing its prefix first."""
        config = self.prefix_encoder.config
        if config.shift_positions:
            inputs = {**inputs, "position_ids": shifted_position_ids(self.backbone, inputs["input_ids"], config.prefix_length)}
        prefix = self.prefix_encoder(batch_size=len(inputs["input_ids"]))  # [L, 2, H, P, D] or [L, 2, B, H, P, D]
        with prefix_for_forward({layer: LayerPrefix(*pair) for layer, pair in zip(self.prefix_encoder.layers, prefix, strict=True)}):
            return self.backbone(**inputs).last_hidden_state

    def description(self) -> dict:
        """As it is stored: the MLP, if there was one, is folded into plain keys and values; no path, as none is needed again."""
        config = self.prefix_encoder.config
        init = config.init if config.checkpoint is None else f".../{config.checkpoint.resolve().name}"
        return {**super().description(), "prefix": {**config.to_dict(), "prefix_projection": False, "init": init}}

    def save_pretrained(self, path: str | Path, **more: dict) -> None:
        """Write the prefix and the head as a PEFT adapter, the MLP folded into plain keys and values, and ptv2.json."""
        from ptv2.interop import write_peft_adapter

        path = Path(path)
        write_peft_adapter(self, path)
        self._write_description(path, more)

    def load_pretrained(self, path: Path) -> None:
        from ptv2.interop import read_peft_adapter

        read_peft_adapter(self, path)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, precision: str = "auto", attn_implementation: str | None = None):
        """A trained model from the directory that `save_pretrained` wrote.

        Raises:
            InputError: the directory, its files or its backbone do not fit.
        """
        from ptv2.methods import load_model

        model = load_model(path, precision=precision, attn_implementation=attn_implementation)
        if not isinstance(model, cls):
            raise InputError(f"{path} holds a {model.method} model, not p-tuning-v2; load it with ptv2.load_model.")
        return model


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: it is missing, truncated or of another format.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing: the checkpoint is incomplete, save it again.")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}): copy or save the checkpoint again.") from error
