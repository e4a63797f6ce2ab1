"""How a prefix reaches the attention layers of a transformers encoder.

transformers lets a model name its attention function (https://huggingface.co/docs/transformers/attention_interface).
The functions registered here put the prefix before the keys and values of the layer that is running and call the
function they are named after ("ptv2_sdpa" calls "sdpa", or where it can `ptv2.fused_attention`, which gives the same
numbers sooner). Nothing is copied into a cache, no position moves, and the backbone's code is not touched. All that
depends on the transformers version or on a model family sits in this file.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptv2 import fused_attention
from ptv2.backbone import quiet_transformers
from ptv2.errors import InputError
from ptv2.fused_attention import Seen, fits, text_seen
from ptv2.prefix import AttentionShape

_current: ContextVar["_Forward | None"] = ContextVar("ptv2_forward", default=None)
_watcher: ContextVar[Callable[[Tensor, Tensor], None] | None] = ContextVar("ptv2_watcher", default=None)


class LayerPrefix(NamedTuple):
    """The prefix of one layer.

    key, value: [H, P, D] for all examples, or [B, H, P, D] where they differ.
    visible: bool [B, P], which of these places an example sees; None for all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None


class _Forward:
    """What one forward pass through a backbone carries to its attention layers."""

    def __init__(self, prefix: dict[int, LayerPrefix], record: bool = False):
        self.prefix = prefix
        self.calls = 0  # attention layers run so far: ALBERT calls one module for every layer, so modules can't be asked
        self.recorded: list[tuple[Tensor, Tensor]] | None = [] if record else None
        self._widened: tuple[Tensor | None, Tensor | None, Tensor] | None = None
        self._text_seen: tuple[Tensor | None, tuple[Tensor, Tensor] | None] | None = None

    def widen(self, mask: Tensor | None, prefix: LayerPrefix, query: Tensor) -> Tensor | None:
        """[B, 1, S, S] or None (all visible) to [B, 1, S or 1, P + S] or None; one for all layers that share mask and prefix."""
        if mask is None and prefix.visible is None:
            return None
        if self._widened is None or self._widened[0] is not mask or self._widened[1] is not prefix.visible:
            self._widened = mask, prefix.visible, _widened(mask, prefix, query)
        return self._widened[2]

    def seen(self, mask: Tensor | None, prefix: LayerPrefix | None, query: Tensor) -> Seen | None:
        """The same for `fused_attention`; None where it can't be said in its terms."""
        B, _, S, _ = query.shape
        if self._text_seen is None or self._text_seen[0] is not mask:
            self._text_seen = mask, text_seen(mask, B, S)
        if self._text_seen[1] is None:
            return None
        if prefix is None or prefix.visible is None:
            return Seen(torch.full((B,), 0 if prefix is None else prefix.key.shape[-2]), *self._text_seen[1])
        count = prefix.visible.sum(1)
        at_front = torch.equal(prefix.visible, torch.arange(prefix.visible.shape[1]) < count[:, None])
        return Seen(count, *self._text_seen[1]) if at_front else None


def _widened(mask: Tensor | None, prefix: LayerPrefix, query: Tensor) -> Tensor:
    P, S = prefix.key.shape[-2], query.shape[2]
    if mask is None:
        mask = query.new_zeros((len(query), 1, 1, S))
    shown = True if mask.dtype == torch.bool else 0.0
    mask = nn.functional.pad(mask, (P, 0), value=shown)  # [B, 1, S or 1, P + S]
    if prefix.visible is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask[..., :P].masked_fill_(~prefix.visible[:, None, None, :], hidden)
    return mask


def _with_prefix(base_name: str):
    """An attention function that puts the running forward's prefix before keys and values, then calls the base one."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
        """query, key, value [B, H, S, D]; attention_mask None or [B, 1, S, S], bool or additive."""
        base = ALL_ATTENTION_FUNCTIONS.get_interface(base_name, _eager_of(module))
        forward = _current.get()
        if forward is not None:
            if forward.recorded is not None:
                forward.recorded.append((key.detach(), value.detach()))
            prefix = forward.prefix.get(forward.calls)
            forward.calls += 1
            plain = base_name == "sdpa" and not kwargs.get("dropout") and kwargs.get("position_bias") is None and _watcher.get() is None
            if plain and fits(query, key) and (seen := forward.seen(attention_mask, prefix, query)) is not None:
                scale = kwargs.get("scaling") or query.shape[3] ** -0.5
                return fused_attention.attend(query, key, value, prefix and prefix[:2], seen, scale), None
            if prefix is not None:
                B = query.shape[0]
                prefix_key, prefix_value = (part.to(key.dtype).expand(B, *part.shape[-3:]) for part in prefix[:2])
                key = torch.cat((prefix_key, key), dim=2)  # [B, H, P + S, D]
                value = torch.cat((prefix_value, value), dim=2)  # [B, H, P + S, D]
                attention_mask = forward.widen(attention_mask, prefix, query)
        if (watch := _watcher.get()) is not None:
            watch(key, _weights(module, query, key, value, attention_mask, kwargs))
        return base(module, query, key, value, attention_mask, **kwargs)

    return attend


def _weights(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    """Attention weights [B, H, S, P + S] by the family's plain function, for the fused ones form none."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return _eager_of(module)(module, query, key, value, mask, **options)[1]


def _eager_of(module: nn.Module):
    """The plain attention function that stands beside an attention module in its modelling file."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


# Flash-attention packages take padding on the left where keys outnumber queries; flex attention's masks are functions. Neither
# can be widened; on a GPU "sdpa" chooses torch's own fused kernels.
for _base in ("sdpa", "eager"):
    AttentionInterface.register(f"ptv2_{_base}", _with_prefix(_base))
    AttentionMaskInterface.register(f"ptv2_{_base}", ALL_MASK_ATTENTION_FUNCTIONS[_base])


def attention_shape(config: PretrainedConfig) -> AttentionShape:
    """Layers, key/value heads and head size of a backbone, from its config."""
    heads = config.num_attention_heads
    width = getattr(config, "true_hidden_size", None) or config.hidden_size  # MobileBERT's attention is narrower than its E
    return AttentionShape(
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        hidden_size=config.hidden_size,
    )


def open_to_prefix(backbone: PreTrainedModel) -> None:
    """Make a backbone's attention layers look for a prefix; without one they compute what they did before.

    Raises:
        InputError: this family's attention does not go through transformers' attention interface, or is causal.
    """
    base = backbone.config._attn_implementation.removeprefix("ptv2_")
    refusal = (
        f"The backbone's family ({backbone.config.model_type}, attention {base}) is not an encoder that uses "
        "transformers' attention interface in every layer, so a prefix cannot reach it; choose another backbone, such "
        "as a BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT or ModernBERT."
    )
    was_training = backbone.training
    backbone.eval()
    probe = torch.zeros((1, 4), dtype=torch.long, device=backbone.device)
    try:
        with quiet_transformers():
            backbone.set_attn_implementation(f"ptv2_{base}")
        with torch.no_grad(), prefix_for_forward({}, record=True) as forward:
            backbone(input_ids=probe, attention_mask=torch.ones_like(probe))
        shape = attention_shape(backbone.config)
    except Exception as error:  # each family that is not meant for this fails in its own way
        raise InputError(refusal) from error
    finally:
        backbone.train(was_training)
    reached = [(key.shape[1], key.shape[3]) for key, _ in forward.recorded]  # H and D of every layer
    # Causal attention counts from the first key on: with a prefix there, a token would no longer see itself.
    causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
    if causal or reached != [(shape.num_heads, shape.head_dim)] * shape.num_layers:
        raise InputError(refusal)


@contextmanager
def prefix_for_forward(prefix: dict[int, LayerPrefix], record: bool = False) -> Iterator[_Forward]:
    """While this is open, the n-th attention layer that runs in this thread sees `prefix[n]`.

    Args:
        prefix: layer index -> what that layer sees before the text.
        record: keep each layer's own keys and values, [B, H, S, D], in `recorded`.
    """
    forward = _Forward(prefix, record)
    token = _current.set(forward)
    try:
        yield forward
    finally:
        _current.reset(token)


@contextmanager
def watch_attention(watch: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """While this is open, each attention layer that runs in this thread hands `watch` its keys and its attention weights.

    Args:
        watch: is called layer by layer, in order, with keys [B, H, P + S, D] and weights [B, H, S, P + S], the prefix (if the
            layer has one) first.
    """
    token = _watcher.set(watch)
    try:
        yield
    finally:
        _watcher.reset(token)


@torch.no_grad()
def sample_activations(
    backbone: PreTrainedModel, batches: list[dict[str, Tensor]], prefix_length: int, generator: torch.Generator
) -> Tensor:
    """The backbone's own keys and values at random positions of text: a prefix that looks like what it has seen.

    One (example, position) is drawn for each place of the prefix, the same in all layers, so that a place holds the
    keys and values of one token on its way up.

    Args:
        backbone: opened by `open_to_prefix`.
        batches: of input_ids, attention_mask, ... [B, S] each.
        prefix_length: P.
        generator: on the CPU; fixes the draw.

    Returns:
        float [L, 2, H, P, D], for all layers of the backbone.
    """
    was_training = backbone.training
    backbone.eval()
    places = []  # of every real token: its keys and values, [L, 2, H, D] each, stacked batch by batch
    per_batch = -(-prefix_length // len(batches))
    for batch in batches:
        with prefix_for_forward({}, record=True) as forward:
            backbone(**batch)
        real = batch["attention_mask"].bool().nonzero().cpu()  # [tokens, 2]
        drawn = real[torch.randperm(len(real), generator=generator)[:per_batch]]  # [n, 2]
        layers = [torch.stack((key, value)) for key, value in forward.recorded]  # L x [2, B, H, S, D]
        for example, position in drawn.tolist():
            places.append(torch.stack([layer[:, example, :, position] for layer in layers]).float().cpu())
    backbone.train(was_training)
    # A short text has fewer tokens than the prefix has places: go round again.
    places = [places[i % len(places)] for i in range(prefix_length)]
    return torch.stack(places, dim=3)  # [L, 2, H, P, D]


def text_positions(backbone: PreTrainedModel) -> int:
    """How many positions a backbone has for tokens; RoBERTa and its kin keep the first padding_idx + 1 for themselves."""
    embeddings = getattr(backbone, "embeddings", None)
    offset = embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    return backbone.config.max_position_embeddings - offset


def shifted_position_ids(backbone: PreTrainedModel, input_ids: Tensor, prefix_length: int) -> Tensor:
    """Positions as if P tokens stood before the text, int [B, S].

    Raises:
        InputError: the backbone has no absolute positions to shift, or too few of them.
    """
    B, S = input_ids.shape
    embeddings = getattr(backbone, "embeddings", None)
    make = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if make is not None:  # RoBERTa and its kin number real tokens from padding_idx + 1
        position_ids = make(input_ids, embeddings.padding_idx, prefix_length)
    else:
        position_ids = torch.arange(prefix_length, prefix_length + S, device=input_ids.device).expand(B, S)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise InputError(f"shift_positions is on, but a {backbone.config.model_type} takes no position_ids; switch it off.")
    limit = backbone.config.max_position_embeddings
    if int(position_ids.max()) >= limit:
        raise InputError(
            f"shift_positions moves the text to position {int(position_ids.max())}; the backbone has {limit} positions: "
            "take a smaller max_length or prefix_length, or switch shift_positions off."
        )
    return position_ids
