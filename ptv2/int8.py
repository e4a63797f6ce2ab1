"""Frozen linear layers in 8 bits, forward and backward: for CPUs with 8-bit dot products (VNNI).

Every row of the activations, and of the gradients on their way back, is scaled to -127..127 and rounded; so is every output
channel of the weights, once for each direction. A product of these is exact in int32 and scaled back. A frozen weight needs
no gradient, so both products of a training step run in 8 bits, as the two of three do in SwitchBack (Wortsman et al.,
"Stable and low-precision training for large-scale vision-language models", NeurIPS 2023, section 2).

The products, and what stands between them in a BERT-shaped layer, are in int8.cpp. Which parts of a backbone have that shape is
found by their structure and by what they compute; all other linear layers are replaced one by one.
"""

import ctypes
import inspect
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ptv2.errors import InputError
from ptv2.native import library, pointer

_PANEL = 64  # columns that int8.cpp sums up at once
_NO_COMPILER = "precision int8 needs a C++ compiler, such as g++, which was not found: install one, or choose fp32."


def _native() -> ctypes.CDLL:
    if (found := library("int8")) is None:
        raise InputError(_NO_COMPILER)
    return found


class _MatrixPointers(ctypes.Structure):
    """`Matrix` of int8.cpp."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
    )


class _NormPointers(ctypes.Structure):
    """`Norm` of int8.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("normal", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
    )


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] in 8 bits: int8 [N, K], and float32 [N], the scale of every row."""
    scale = weight.abs().amax(dim=1).clamp_min(1e-30) / 127  # [N]
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Matrix(nn.Module):
    """A matrix [N, K] and a bias [N], float32, laid out in 8 bits for products from the left; see int8.cpp for the layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.N, self.K = weight.shape
        steps, scale = quantised(weight)
        more = -self.N % _PANEL
        steps = F.pad(steps, (0, -self.K % 4, 0, more))
        packed = steps.view(-1, _PANEL, steps.shape[1] // 4, 4).transpose(1, 2).contiguous()  # [N / 64, K / 4, 64, 4]
        self.register_buffer("packed", packed)
        self.register_buffer("scale", F.pad(scale, (0, more)))
        self.register_buffer("sums", steps.sum(dim=1, dtype=torch.int32) * -128)
        self.register_buffer("bias", F.pad(torch.zeros(self.N) if bias is None else bias, (0, more)))

    def pointers(self) -> _MatrixPointers:
        return _MatrixPointers(*map(pointer, (self.packed, self.scale, self.sums, self.bias)), self.K, self.N)


def _rows(tensor: Tensor) -> Tensor:
    """[..., K] as contiguous float32 rows [M, K]."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float().contiguous()


def _pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def _matrices(matrices: list[Int8Matrix]) -> ctypes.Array:
    return (_MatrixPointers * len(matrices))(*(matrix.pointers() for matrix in matrices))


class _Products(torch.autograd.Function):
    """The products of one input [..., K] with several layers, [..., N] each."""

    @staticmethod
    def forward(ctx, inputs: Tensor, layers: tuple["Int8Linear", ...]) -> tuple[Tensor, ...]:
        ctx.layers, ctx.shape = layers, inputs.shape
        ctx.set_materialize_grads(False)
        rows = _rows(inputs)
        outputs = [rows.new_empty(*inputs.shape[:-1], layer.ahead.N) for layer in layers]
        matrices = _matrices([layer.ahead for layer in layers])
        _native().fan_out(pointer(rows), ctypes.c_int64(len(rows)), matrices, len(layers), _pointers(outputs))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        rows = [None if gradient is None else _rows(gradient) for gradient in gradients]
        M = next((len(gradient) for gradient in rows if gradient is not None), None)
        if M is None:
            return None, None
        summed = torch.empty(ctx.shape)
        matrices = _matrices([layer.back for layer in ctx.layers])
        _native().fan_in(_pointers(rows), ctypes.c_int64(M), matrices, len(rows), pointer(summed))
        return summed, None


class Int8Linear(nn.Module):
    """A frozen nn.Linear with weights int8: [..., K] to [..., N]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # [N, K]
        self.ahead = Int8Matrix(weight, None if linear.bias is None else linear.bias.detach().float())
        self.back = Int8Matrix(weight.t())
        self.shapes = ((linear.in_features, linear.out_features),)  # of the linear layers that a call stands for

    def forward(self, inputs: Tensor) -> Tensor:
        return _Products.apply(inputs, (self,))[0]


class _Taken(NamedTuple):
    """What the first layer of several computed for the others: of this input, in its state then."""

    inputs: weakref.ref
    state: tuple[int | None, bool]
    outputs: dict["Int8JointLinear", Tensor]


class _Joint:
    """Layers that are called in turn with the same input: the first call computes them all, from rows that are rounded once.

    A layer that is called with another input computes anew. Outputs are kept until their layer takes them, their input is gone, or
    the layers are next called.
    """

    def __init__(self, layers: tuple["Int8JointLinear", ...]):
        self.layers = layers
        self.taken: _Taken | None = None

    def output(self, layer: "Int8JointLinear", inputs: Tensor) -> Tensor:
        version = None if inputs.is_inference() else inputs._version  # a tensor of inference mode counts no changes
        state = (version, torch.is_grad_enabled())
        taken = self.taken  # another thread may replace it meanwhile
        if taken is None or taken.inputs() is not inputs or taken.state != state or layer not in taken.outputs:
            outputs = dict(zip(self.layers, _Products.apply(inputs, self.layers), strict=True))
            taken = self.taken = _Taken(weakref.ref(inputs, lambda _, outputs=outputs: outputs.clear()), state, outputs)
        output = taken.outputs.pop(layer)
        if not taken.outputs:
            self.taken = None
        return output


class Int8JointLinear(Int8Linear):
    """One of several layers of the same input, such as a query's, a key's and a value's; see `_Joint`."""

    joint: _Joint

    def forward(self, inputs: Tensor) -> Tensor:
        return self.joint.output(self, inputs)


def _kept(norm: nn.LayerNorm, M: int, trains: bool) -> tuple[Tensor | None, Tensor | None]:
    """Room for what a layer norm's gradient needs of M rows; None where there will be none.

    Returns:
        bf16 [M, N], the rows with mean 0 and variance 1; float32 [M], 1 / the standard deviation before.
    """
    return (torch.empty((M, *norm.normalized_shape), dtype=torch.bfloat16), torch.empty(M)) if trains else (None, None)


def _norm_pointers(norm: nn.LayerNorm, normal: Tensor | None, inverse: Tensor | None) -> _NormPointers:
    return _NormPointers(pointer(norm.weight), pointer(norm.bias), norm.eps, pointer(normal), pointer(inverse))


class _ResidualNorm(torch.autograd.Function):
    """Layer norm of a linear layer of `hidden` [..., K] plus `residual` [..., N]."""

    @staticmethod
    def forward(ctx, hidden: Tensor, residual: Tensor, module: "Int8Residual", trains: bool) -> Tensor:
        rows, summand = _rows(hidden), _rows(residual)
        output, kept = torch.empty(residual.shape), _kept(module.LayerNorm, len(rows), trains)
        ctx.module, ctx.shapes = module, (hidden.shape, residual.shape)
        ctx.save_for_backward(*kept)
        matrix, norm = module.dense.ahead.pointers(), _norm_pointers(module.LayerNorm, *kept)
        given = (pointer(rows), pointer(summand), ctypes.c_int64(len(rows)))
        _native().residual_norm(*given, ctypes.byref(matrix), ctypes.byref(norm), pointer(output))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = _rows(gradient)
        asked = [torch.empty(shape) if needed else None for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=False)]
        matrix, norm = ctx.module.dense.back.pointers(), _norm_pointers(ctx.module.LayerNorm, *ctx.saved_tensors)
        call = _native().residual_norm_backward
        call(pointer(rows), ctypes.c_int64(len(rows)), ctypes.byref(matrix), ctypes.byref(norm), *map(pointer, asked))
        return *asked, None, None


class Int8Residual(nn.Module):
    """What follows attention in a BERT-shaped layer: `LayerNorm(dense(hidden) + residual)`, without dropout."""

    def __init__(self, dense: Int8Linear, norm: nn.LayerNorm):
        super().__init__()
        self.dense, self.LayerNorm = dense, norm
        self.shapes = dense.shapes

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and (hidden.requires_grad or residual.requires_grad)
        return _ResidualNorm.apply(hidden, residual, self, trains)


class _FeedForward(torch.autograd.Function):
    """The whole block, [..., E] to [..., E]. Of the inner width only GELU's slope is kept, in 8 bits: uint8 [M, I]."""

    @staticmethod
    def forward(ctx, inputs: Tensor, module: "Int8FeedForward", trains: bool) -> Tensor:
        rows = _rows(inputs)
        output, kept = torch.empty(inputs.shape), _kept(module.LayerNorm, len(rows), trains)
        slope = torch.empty((len(rows), module.dense.ahead.K), dtype=torch.uint8) if trains else None
        ctx.module = module
        ctx.save_for_backward(slope, *kept)
        parts = module.up.ahead.pointers(), module.dense.ahead.pointers(), _norm_pointers(module.LayerNorm, *kept)
        given = (pointer(rows), ctypes.c_int64(len(rows)), *map(ctypes.byref, parts))
        _native().feed_forward(*given, pointer(output), pointer(slope))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, asked, module = _rows(gradient), torch.empty(gradient.shape), ctx.module
        slope, *kept = ctx.saved_tensors
        parts = module.dense.back.pointers(), module.up.back.pointers(), _norm_pointers(module.LayerNorm, *kept)
        given = (pointer(rows), ctypes.c_int64(len(rows)), *map(ctypes.byref, parts))
        _native().feed_forward_backward(*given, pointer(slope), pointer(asked))
        return asked, None, None


class Int8FeedForward(Int8Residual):
    """A BERT-shaped layer's feed-forward block: `LayerNorm(dense(gelu(up(x))) + x)`, without dropout.

    It stands in the place of the layer's `output`, and takes what `Int8PassOn`, in the place of `intermediate`, hands through.
    """

    def __init__(self, up: Int8Linear, dense: Int8Linear, norm: nn.LayerNorm):
        super().__init__(dense, norm)
        self.up = up
        self.shapes = up.shapes + dense.shapes

    def forward(self, inputs: Tensor, residual: Tensor) -> Tensor:
        if residual is not inputs:  # a family that adds something else than what went in
            return super().forward(F.gelu(self.up(inputs)), residual)
        return _FeedForward.apply(inputs, self, torch.is_grad_enabled() and inputs.requires_grad)


class Int8PassOn(nn.Module):
    """In the place of a layer's `intermediate`, whose linear layer `Int8FeedForward` applies."""

    def __init__(self, dense: Int8Linear):
        super().__init__()
        self.dense = dense

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def _children(module: nn.Module, **kinds: type) -> bool:
    """Whether it has children of just these kinds under these names."""
    return all(type(getattr(module, name, None)) is kind for name, kind in kinds.items())


@torch.no_grad()
def _computes(inputs: tuple[Tensor, ...], ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> bool:
    """Whether two functions give the same for some inputs."""
    return torch.allclose(ours(*inputs), theirs(*inputs), rtol=1e-3, atol=1e-4)


def _is_residual(module: nn.Module) -> bool:
    """Whether this is what `Int8Residual` computes, in float32: by its parts, and by trying it."""
    parts = {name for name, _ in module.named_children()}
    if parts != {"dense", "LayerNorm", "dropout"} or not _children(module, dense=nn.Linear, LayerNorm=nn.LayerNorm):
        return False
    dense, norm = module.dense, module.LayerNorm
    arguments = list(inspect.signature(module.forward).parameters)
    if len(arguments) != 2 or norm.normalized_shape != (dense.out_features,) or norm.weight is None or norm.bias is None:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(4, width, generator=generator) for width in (dense.in_features, dense.out_features))
    return _computes(inputs, lambda hidden, residual: norm(dense(hidden) + residual), module)


def _is_feed_forward(layer: nn.Module) -> bool:
    """Whether `layer.intermediate` and `layer.output` are what `Int8FeedForward` computes, in float32."""
    inner, outer = getattr(layer, "intermediate", None), getattr(layer, "output", None)
    if inner is None or outer is None or not _is_residual(outer) or not _children(inner, dense=nn.Linear):
        return False
    if inner.dense.in_features != outer.dense.out_features or inner.dense.out_features != outer.dense.in_features:
        return False
    inputs = torch.randn(4, inner.dense.in_features, generator=torch.Generator().manual_seed(0))
    return _computes((inputs,), lambda rows: F.gelu(inner.dense(rows)), inner)


def _is_joint(module: nn.Module) -> bool:
    """Whether it makes queries, keys and values of rows of one width."""
    same = _children(module, query=nn.Linear, key=nn.Linear, value=nn.Linear)
    return same and module.query.in_features == module.key.in_features == module.value.in_features


def _replace_feed_forward(layer: nn.Module) -> None:
    up, outer = Int8Linear(layer.intermediate.dense), layer.output
    layer.intermediate, layer.output = Int8PassOn(up), Int8FeedForward(up, Int8Linear(outer.dense), outer.LayerNorm)


def _replace_joint(module: nn.Module) -> None:
    layers = tuple(Int8JointLinear(getattr(module, name)) for name in ("query", "key", "value"))
    joint = _Joint(layers)
    for name, layer in zip(("query", "key", "value"), layers, strict=True):
        layer.joint = joint
        setattr(module, name, layer)


def freeze_in_int8(backbone: nn.Module) -> None:
    """Replace every linear layer of a wholly frozen backbone, BERT-shaped blocks as a whole; what is left stays float32.

    The backbone is in evaluation mode from now on: the blocks know no dropout.

    Raises:
        InputError: not on this machine, or something in the backbone is trained.
    """
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise InputError(
            "precision int8 is for a wholly frozen backbone; choose fp32 or bf16, or a method that trains none of its weights."
        )
    if torch.cuda.is_available():
        raise InputError("precision int8 is for CPUs; choose bf16 on a GPU.")
    _native()
    backbone.eval()
    for module in list(backbone.modules()):
        if _is_feed_forward(module):
            _replace_feed_forward(module)
        if _is_joint(module):
            _replace_joint(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
            elif _is_residual(child):
                setattr(module, name, Int8Residual(Int8Linear(child.dense), child.LayerNorm))
