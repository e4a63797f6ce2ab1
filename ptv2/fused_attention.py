"""Attention of a text to a prefix and to itself in one pass over both, forward and backward, on a CPU (fused_attention.cpp).

The same numbers as torch's fused attention on joined keys and values, to float32's rounding, in less time: the prefix is read where
it lies, padding is left out rather than masked, and where only the prefix learns (in a frozen first layer) nothing else is computed.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptv2.native import library, pointer

HEAD_SIZES = (32, 64)


class Seen(NamedTuple):
    """What each example of a batch attends to, int64 [B] each on the CPU: so many places of the prefix, and the text from `first` to
    before `last`."""

    prefix: Tensor
    first: Tensor
    last: Tensor


def fits(query: Tensor, key: Tensor) -> bool:
    """Whether these queries and keys, [B, H, S, D] each, can be attended here: float32 on a CPU with a compiler at hand."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == torch.float32
        and query.shape == key.shape
        and query.shape[3] in HEAD_SIZES
        and not torch.is_autocast_enabled("cpu")
        and library("fused_attention") is not None
    )


def text_seen(mask: Tensor | None, B: int, S: int) -> tuple[Tensor, Tensor] | None:
    """The first and the last + 1 place of the text that an example's tokens see, int64 [B] each.

    Args:
        mask: bool [B, 1, S or 1, S], True where a token may look; None for everywhere.

    Returns:
        None where tokens of one example see different places, or places with a gap between them.
    """
    if mask is None:
        return torch.zeros(B, dtype=torch.long), torch.full((B,), S)
    if mask.dtype != torch.bool or mask.shape[:2] != (B, 1):
        return None
    row = mask[:, 0, 0]  # [B, S]
    count = row.sum(1)
    first = row.to(torch.uint8).argmax(1)
    places = torch.arange(S)
    whole = (places >= first[:, None]) & (places < (first + count)[:, None])
    if (count == 0).any() or not torch.equal(row, whole) or not (mask[:, 0] == row[:, None]).all():
        return None
    return first, first + count


def attend(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None, seen: Seen, scale: float) -> Tensor:
    """Attention outputs, float32 [B, S, H, D].

    Args:
        query, key, value: float32 [B, H, S, D], of the text.
        prefix: key and value, float32 [H, P, D] for all examples or [B, H, P, D]; None for no prefix.
        seen: what takes part.
        scale: of the scores.
    """
    if prefix is None:
        H, D = query.shape[1], query.shape[3]
        prefix = (query.new_empty((H, 0, D)),) * 2
    return _Attention.apply(query, key, value, *prefix, seen, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, seen: Seen, scale: float) -> Tensor:
        query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
        prefix_key, prefix_value = prefix_key.contiguous(), prefix_value.contiguous()
        B, H, S, D = query.shape
        output = query.new_empty((B, S, H, D))
        log_sums = query.new_empty((B, H, S)) if any(ctx.needs_input_grad) else None
        inputs = query, key, value, prefix_key, prefix_value
        library("fused_attention").attention_forward(*_described(inputs, seen, scale), pointer(output), pointer(log_sums))
        ctx.save_for_backward(*inputs, output, log_sums)
        ctx.seen, ctx.scale = seen, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        *inputs, output, log_sums = ctx.saved_tensors
        query, prefix_key = inputs[0], inputs[3]
        gradient = gradient.contiguous()  # by a name, or it would be gone before the call: pointers keep nothing alive
        B, H, S, D = query.shape
        text = [query.new_empty((B, S, H, D)) if any(ctx.needs_input_grad[:3]) else None for _ in range(3)]
        prefix = [query.new_empty((B, H, prefix_key.shape[-2], D)) for _ in range(2)]
        library("fused_attention").attention_backward(
            *_described(inputs, ctx.seen, ctx.scale), *map(pointer, (output, log_sums, gradient, *text, *prefix))
        )
        if prefix_key.dim() == 3:
            prefix = [part.sum(0) for part in prefix]  # [H, P, D]
        return *(None if part is None else part.transpose(1, 2) for part in text), *prefix, None, None


def _described(inputs: tuple[Tensor, ...], seen: Seen, scale: float) -> tuple:
    """Sizes, strides, what is seen, and the inputs, as both functions of the library take them."""
    B, H, S, D = inputs[0].shape
    sizes = [ctypes.c_int64(size) for size in (D, B, H, S, inputs[3].shape[-2])]
    strides = (ctypes.c_int64 * 9)(*(stride for part in inputs[:3] for stride in part.stride()[:3]))
    shared = ctypes.c_bool(inputs[3].dim() == 3)
    return *sizes, ctypes.c_float(scale), strides, *map(pointer, seen), shared, *map(pointer, inputs)
