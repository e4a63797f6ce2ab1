"""Many prefixes, one frozen backbone: each example of a batch is read with a prefix and a head of its own.

What a method trains beside a frozen backbone is small, so many trained models fit into one; a batch may mix them, and
costs what it would cost with a single one.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from ptv2.attention import LayerPrefix, open_to_prefix, prefix_for_forward, shifted_position_ids
from ptv2.checkpoint import read_description
from ptv2.errors import InputError
from ptv2.methods import load_model
from ptv2.model import PrefixModelForQuestionAnswering, SpanModel, span_logits

BANKABLE = ("p-tuning-v2", "head-only")  # methods that leave the backbone, and what flows through it, as it was


class PrefixBank(nn.Module):
    """N trained prefixes with their heads over one frozen backbone, for answering only.

    Args:
        models: of the methods in BANKABLE, on the same backbone; the first one's encoder is used. Lengths and layers of
            the prefixes may differ; a head alone is a prefix of length 0.

    Raises:
        InputError: there are none, or they do not go together.
    """

    def __init__(self, models: Sequence[SpanModel]):
        super().__init__()
        if not models:
            raise InputError("A bank needs at least one model.")
        for model in models:
            if model.method not in BANKABLE:
                raise InputError(f"A {model.method} model cannot share its backbone; a bank holds {' and '.join(BANKABLE)}.")
            if model.source.sha256 != models[0].source.sha256:
                raise InputError(f"The models stand on different backbones, {models[0].source.name} and {model.source.name}.")
        self.source, self.backbone = models[0].source, models[0].backbone
        open_to_prefix(self.backbone)
        self.backbone.requires_grad_(False)
        heads = [model.qa_outputs for model in models]
        self.register_buffer("head_weight", torch.stack([head.weight.detach() for head in heads]))  # [N, 2, E]
        self.register_buffer("head_bias", torch.stack([head.bias.detach() for head in heads]))  # [N, 2]
        self.layers = self._stack([_prefix_of(model) for model in models])
        self.shifts = [_shift_of(model) for model in models]
        self.eval()

    @classmethod
    def from_pretrained(
        cls, paths: Sequence[str | Path], *, precision: str = "auto", attn_implementation: str | None = None
    ) -> "PrefixBank":
        """From checkpoint directories; the backbone is loaded once.

        Raises:
            InputError: a checkpoint is broken, or they do not go together.
        """
        for path in paths:
            method = read_description(Path(path)).get("method")
            if method not in BANKABLE:
                raise InputError(f"{path} holds a {method} model; a bank holds {' and '.join(BANKABLE)}.")
        models: list[SpanModel] = []
        for path in paths:
            beside = models[0] if models else None
            models.append(load_model(path, precision=precision, attn_implementation=attn_implementation, beside=beside))
        return cls(models)

    def __len__(self) -> int:
        """N, the number of prefixes."""
        return len(self.head_bias)

    def _stack(self, prefixes: list[dict[int, tuple[Tensor, Tensor]]]) -> list[int]:
        """Keep every layer's prefixes as buffers, filled up to the longest: key and value [N, H, P, D], visible bool [N, P]."""
        layers = sorted({layer for prefix in prefixes for layer in prefix})
        dtype = next(self.backbone.parameters()).dtype
        for layer in layers:
            longest = max((prefix[layer][0] for prefix in prefixes if layer in prefix), key=lambda key: key.shape[1])
            H, P, D = longest.shape
            pair = torch.zeros((2, len(prefixes), H, P, D), dtype=dtype, device=longest.device)
            visible = torch.zeros((len(prefixes), P), dtype=torch.bool, device=longest.device)
            for n, prefix in enumerate(prefixes):
                if layer in prefix:
                    length = prefix[layer][0].shape[1]
                    pair[0, n, :, :length], pair[1, n, :, :length] = prefix[layer]
                    visible[n, :length] = True
            self.register_buffer(f"prefix_{layer}", pair)
            self.register_buffer(f"visible_{layer}", visible)
        return layers

    def prefix_of_batch(self, prefix_index: Tensor) -> dict[int, LayerPrefix]:
        """Layer -> the prefixes that the examples chose: key and value [B, H, P, D], visible bool [B, P] or None for all."""
        chosen, shared = {}, {}
        for layer in self.layers:
            key, value = self.get_buffer(f"prefix_{layer}")[:, prefix_index]  # [B, H, P, D] each
            visible = self.get_buffer(f"visible_{layer}")[prefix_index]  # [B, P]
            # Layers with the same lengths share one tensor, and so one attention mask.
            visible = None if visible.all() else shared.setdefault(visible.numpy(force=True).tobytes(), visible)
            chosen[layer] = LayerPrefix(key, value, visible)
        return chosen

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        prefix_index: Tensor,
    ) -> QuestionAnsweringModelOutput:
        """Span logits, each example by its own prefix and head.

        Args:
            input_ids, attention_mask, token_type_ids: int [B, S], as for `SpanModel`.
            prefix_index: int [B], 0 to N - 1.

        Returns:
            start_logits and end_logits, float32 [B, S]; the least float32 at padding.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if any(self.shifts):
            inputs["position_ids"] = self._positions(input_ids, prefix_index)
        with prefix_for_forward(self.prefix_of_batch(prefix_index)):
            hidden = self.backbone(**inputs).last_hidden_state  # [B, S, E]
        weight, bias = self.head_weight[prefix_index], self.head_bias[prefix_index]  # [B, 2, E], [B, 2]
        logits = hidden.to(weight.dtype) @ weight.mT + bias[:, None]  # [B, S, 2]
        start_logits, end_logits = span_logits(logits, attention_mask)
        return QuestionAnsweringModelOutput(start_logits=start_logits, end_logits=end_logits)

    def _positions(self, input_ids: Tensor, prefix_index: Tensor) -> Tensor:
        """Position numbers [B, S], moved for the prefixes that were trained so."""
        shifts = torch.tensor(self.shifts, device=input_ids.device)[prefix_index]  # [B]
        positions = torch.zeros_like(input_ids)
        for shift in shifts.unique().tolist():
            rows = shifts == shift
            positions[rows] = shifted_position_ids(self.backbone, input_ids[rows], shift)
        return positions


@torch.no_grad()
def _prefix_of(model: SpanModel) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> key and value, [H, P, D] each; empty for a head alone."""
    if not isinstance(model, PrefixModelForQuestionAnswering):
        return {}
    encoder = model.eval().prefix_encoder
    return {layer: (key, value) for layer, (key, value) in zip(encoder.layers, encoder(), strict=True)}


def _shift_of(model: SpanModel) -> int:
    """By how many positions the model moves the text."""
    if not isinstance(model, PrefixModelForQuestionAnswering):
        return 0
    config = model.prefix_encoder.config
    return config.prefix_length if config.shift_positions else 0
