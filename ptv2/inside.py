"""Looking inside a prefix model: how much attention its prefix takes, what one layer's prefix is worth, what its keys resemble.

Symbols as in ptv2.prefix; N counts the backbone's layers, with or without a prefix, and V tokens of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ptv2.attention import watch_attention
from ptv2.errors import InputError
from ptv2.model import PrefixModelForQuestionAnswering


@dataclass(frozen=True)
class PrefixAttention:
    """The share of its attention that each token gives to the prefix.

    Args:
        shares: float32 [N, B, H, S], 0 to 1; 0 in layers without a prefix.
        real: bool [B, S], False at padding.
    """

    shares: Tensor
    real: Tensor

    def by_head(self) -> Tensor:
        """Mean over all real tokens of the batch, float32 [N, H]."""
        return self.shares.transpose(2, 3)[:, self.real].mean(dim=1)  # [N, B, S, H] -> [N, tokens, H] -> [N, H]

    def along_text(self, example: int = 0) -> Tensor:
        """Mean over the heads at each real token of one example, float32 [N, tokens]."""
        return self.shares[:, example].mean(dim=1)[:, self.real[example]]  # [N, S] -> [N, tokens]


def attention_to_prefix(model: PrefixModelForQuestionAnswering, batch: dict[str, Tensor]) -> PrefixAttention:
    """How much attention goes to the prefix, layer by layer, head by head and token by token.

    Args:
        batch: as `ptv2.features.collate` makes it, int [B, S] each; labels are not needed.
    """
    S = batch["input_ids"].shape[1]
    shares = _watch(model, batch, lambda key, weights: weights[..., : weights.shape[-1] - S].sum(-1))  # [B, H, S] each
    return PrefixAttention(shares, batch["attention_mask"].bool().cpu())


def text_keys(model: PrefixModelForQuestionAnswering, batch: dict[str, Tensor]) -> Tensor:
    """The keys of the text's own tokens in every layer, as they stand beside the prefix's: float32 [N, B, H, S, D].

    Args:
        batch: as `ptv2.features.collate` makes it, int [B, S] each; labels are not needed.
    """
    S = batch["input_ids"].shape[1]
    return _watch(model, batch, lambda key, weights: key[:, :, -S:])


@torch.inference_mode()
def _watch(model: PrefixModelForQuestionAnswering, batch: dict[str, Tensor], take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `take` gives for each layer's keys and weights (see `watch_attention`), stacked: float32 [N, ...], on the CPU."""
    device = model.qa_outputs.weight.device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if not name.endswith("_positions")}
    taken = []
    with watch_attention(lambda key, weights: taken.append(take(key, weights).float().cpu())):
        model(**inputs)
    return torch.stack(taken)


def without_layer(model: PrefixModelForQuestionAnswering, layer: int) -> PrefixModelForQuestionAnswering:
    """The same model without its prefix in one layer; backbone and head are shared with it, the other prefixes copied.

    Raises:
        InputError: there is no prefix in this layer, or in this layer alone.
    """
    encoder = model.prefix_encoder
    if layer not in encoder.layers or len(encoder.layers) == 1:
        raise InputError(f"The prefix of layer {layer} cannot be removed: layers {list(encoder.layers)} have one, and one must remain.")
    kept = [index for index, other in enumerate(encoder.layers) if other != layer]
    layers = tuple(encoder.layers[index] for index in kept)
    smaller = PrefixModelForQuestionAnswering(model.source, model.backbone, replace(encoder.config, layers=layers, prefix_projection=False))
    smaller.qa_outputs = model.qa_outputs
    with torch.no_grad():
        smaller.prefix_encoder.set_prefix(encoder()[kept])  # [L - 1, 2, H, P, D]
    return smaller.to(model.qa_outputs.weight.device).eval()


def token_keys(
    model: PrefixModelForQuestionAnswering, tokenizer: PreTrainedTokenizerFast, token_ids: list[int], batch_size: int = 512
) -> Tensor:
    """The key of each token in every layer where it is the only word of a text, float32 [N, H, V, D].

    A token's key depends on its place and, above the first layer, on what stands around it; alone between the special
    tokens ("[CLS] token [SEP]" for BERT), beside the prefix, is the most neutral surrounding there is.
    """
    frame = tokenizer(tokenizer.mask_token)["input_ids"]  # [CLS] [MASK] [SEP]
    place = frame.index(tokenizer.mask_token_id)
    keys = []
    for some in torch.tensor(token_ids).split(batch_size):
        ids = torch.tensor(frame).repeat(len(some), 1)  # [B, 3]
        ids[:, place] = some
        keys.append(text_keys(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, :, :, place])  # [N, B, H, D]
    return torch.cat(keys, dim=1).transpose(1, 2)  # [N, V, H, D] -> [N, H, V, D]


def nearest(keys: Tensor, candidates: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """For each key the k candidates of the same layer and head that point most nearly the same way.

    Args:
        keys: float [N, H, n, D], such as a prefix's keys.
        candidates: float [N, H, V, D], such as `token_keys`.

    Returns:
        cosine similarities float [N, H, n, k], highest first, and indices into V, int [N, H, n, k].
    """
    unit = torch.nn.functional.normalize
    return (unit(keys, dim=-1) @ unit(candidates, dim=-1).transpose(-1, -2)).topk(k, dim=-1)  # of [N, H, n, V]
