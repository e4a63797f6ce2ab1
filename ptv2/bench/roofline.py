"""How near a training step comes to the machine's limit: the least work it needs, and how fast the machine multiplies."""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ptv2.attention import attention_shape
from ptv2.bench.rounds import seconds
from ptv2.model import PrefixModelForQuestionAnswering

# Operators of torch's profiler by what they are for; the first group whose part stands in an operator's name takes it.
OPERATORS = {
    "matrix products": ("mm", "linear"),
    "attention, backward": ("attention_for_cpu_backward", "attention_backward", "AttentionForCpuBackward", "_AttentionBackward"),
    "attention, forward": ("attention", "_Attention", "softmax"),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm",),
    "8-bit layers": ("_Products", "_ResidualNorm", "_FeedForward"),
    "copies and concatenation": ("copy_", "cat", "fill_", "index", "clone"),
    "sums": ("add", "sum", "mul"),
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a training step that no prefix tuning can avoid: no padding, no weight gradients.

    Args:
        linear: of the frozen linear layers, forward, and backward where something below has to learn.
        attention: of the attention products; a backward pass needs four where the forward pass needs two.
    """

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def linear_layers(model: PrefixModelForQuestionAnswering, batch: dict[str, Tensor]) -> list[tuple[int, int, bool]]:
    """Inputs, outputs and whether a gradient must pass, of every linear layer of the backbone; seen in one forward pass."""
    found = []

    def shapes(module: nn.Module) -> tuple[tuple[int, int], ...]:
        """Of the linear layers that a call stands for: several where `ptv2.int8` computes a block at once."""
        return ((module.in_features, module.out_features),) if isinstance(module, nn.Linear) else getattr(module, "shapes", ())

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend((*shape, inputs[0].requires_grad) for shape in shapes(module))

    hooks = [module.register_forward_hook(see) for module in model.backbone.modules() if shapes(module)]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def least_work(layers: list[tuple[int, int, bool]], lengths: list[int], model: PrefixModelForQuestionAnswering) -> Work:
    """Of one step on windows of these true lengths.

    Args:
        layers: what `linear_layers` saw.
        lengths: tokens of every window, padding apart.
    """
    shape, P = attention_shape(model.backbone.config), model.prefix_encoder.config.prefix_length
    linear = sum(lengths) * sum(2 * inputs * outputs * (1 + passes) for inputs, outputs, passes in layers)
    E = shape.num_heads * shape.head_dim
    forward = sum(4 * S * (P + S) * E for S in lengths)  # scores and weighted values
    below_first = sum(6 * S * P * E for S in lengths)  # of the first layer, only the prefix learns
    attention = shape.num_layers * forward + (shape.num_layers - 1) * 2 * forward + below_first
    return Work(linear, attention)


def product_rate(layers: list[tuple[int, int, bool]], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of bare matrix products [tokens, inputs] x [inputs, outputs] at the model's own shapes, both ways."""
    shapes = {(inputs, outputs) for inputs, outputs, _ in layers}
    shapes |= {(outputs, inputs) for inputs, outputs in shapes}
    work = spent = 0.0
    for inputs, outputs in sorted(shapes):
        if dtype == torch.int8:
            left, right = (torch.randint(-127, 128, shape, dtype=dtype, device=device) for shape in ((tokens, inputs), (inputs, outputs)))
            product = torch._int_mm
        else:
            left, right = (torch.randn(shape, dtype=dtype, device=device) for shape in ((tokens, inputs), (inputs, outputs)))
            product = torch.mm
        product(left, right)
        work += 2 * tokens * inputs * outputs
        spent += statistics.median(seconds(lambda p=product, a=left, b=right: p(a, b)) for _ in range(5))
    return work / spent


def profile_step(step, batch: dict[str, Tensor]) -> dict[str, float]:
    """Share of a step's time by kind of operator, largest first."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True) as profiled:
        step(batch)
    groups: dict[str, float] = {}
    for event in profiled.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        group = next((name for name, parts in OPERATORS.items() if any(part in event.key for part in parts)), "the rest")
        groups[group] = groups.get(group, 0.0) + spent
    total = sum(groups.values())
    return {name: spent / total for name, spent in sorted(groups.items(), key=lambda item: -item[1])}
