"""Frozen linear layers in 8 bits, forward and backward: for CPUs with 8-bit dot products (VNNI, AMX), two to three times float32.

Every row of the activations, and of the gradients on their way back, is scaled to -127..127 and rounded; so is every output
channel of the weights, once for each direction. A product of these is exact in int32 and scaled back. A frozen weight needs
no gradient, so both products of a training step run in 8 bits, as the two of three do in SwitchBack (Wortsman et al.,
"Stable and low-precision training for large-scale vision-language models", NeurIPS 2023, section 2).
"""

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from ptv2.errors import InputError


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] in 8 bits: int8 [K, N], as a product from the left needs it, and float32 [N], the scale of every row of `weight`."""
    scale = weight.abs().amax(dim=1).clamp_min(1e-30) / 127  # [N]
    return (weight / scale[:, None]).round().to(torch.int8).t().contiguous(), scale


def product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """rows [M, K] times a quantised weight [K, N], to float32 [M, N]."""
    row_scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127  # [M, 1]
    exact = torch._int_mm((rows / row_scale).round().to(torch.int8), weight)  # int32 [M, N]
    scaled = exact.float() * (row_scale * scale)
    return scaled if bias is None else scaled + bias


# In plain PyTorch the passes before and after the product cost more than the product saves; compiled, each is one loop.
_compiled_product = torch.compile(product, dynamic=True)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, layer: "Int8Linear") -> Tensor:
        ctx.layer = layer
        rows = inputs.reshape(-1, inputs.shape[-1])
        return _compiled_product(rows, layer.weight, layer.scale, layer.bias).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        rows = gradient.reshape(-1, gradient.shape[-1])
        return _compiled_product(rows, layer.back_weight, layer.back_scale, None).view(*gradient.shape[:-1], -1), None


class Int8Linear(nn.Module):
    """A frozen nn.Linear with weights int8: [..., K] to [..., N]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # [N, K]
        for name, tensor in zip(("weight", "scale"), quantised(weight), strict=True):
            self.register_buffer(name, tensor)
        for name, tensor in zip(("back_weight", "back_scale"), quantised(weight.t()), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, inputs: Tensor) -> Tensor:
        return _Int8Product.apply(inputs, self)


def freeze_in_int8(backbone: nn.Module) -> None:
    """Replace every linear layer of a wholly frozen backbone; what is left stays float32.

    Raises:
        InputError: not on this machine, or something in the backbone is trained.
    """
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise InputError(
            "precision int8 is for a wholly frozen backbone; choose fp32 or bf16, or a method that trains none of its weights."
        )
    if torch.cuda.is_available():
        raise InputError("precision int8 is for CPUs; choose bf16 on a GPU.")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError("precision int8 needs a C++ compiler, such as g++, which was not found: install one, or choose fp32.") from error
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
