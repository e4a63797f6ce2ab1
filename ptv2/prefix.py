"""The prefix: trained key and value vectors that every attention layer sees before its own.

Symbols, used throughout the package:

    B batch   S text length   P prefix length   L layers with a prefix   H heads   D head size   E = H·D hidden size

Source: Liu et al., "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
Tasks", ACL 2022, section 3.2 (https://aclanthology.org/2022.acl-short.8); the layout of the flat vector is that of
the official `model/prefix_encoder.py` (https://github.com/THUDM/P-tuning-v2) and of PEFT's prefix tuning.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ptv2.errors import InputError

INITIALISERS = ("normal", "zero", "activations")


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix looks like and where it starts.

    Args:
        prefix_length: P, at least 1; the default was the best of 1 to 128 on held-out questions (`results/sweeps/length.json`).
        prefix_projection: False stores the P·2·L·E numbers themselves; True makes them with an embedding and a
            two-layer tanh network ("reparameterisation", section 3.3 of the paper).
        prefix_hidden_size: width of that network.
        prefix_dropout: probability with which a number of the prefix is zeroed in training, per example.
        init: "normal" draws from N(0, 1) as the official code does; "activations" takes the backbone's own keys and
            values at random positions of training text; "zero" is all zero, which is no no-op: see `set_zero`. A
            directory is a checkpoint of the same method, whatever that is: all trained weights start at those it holds.
        layers: indices of the layers that carry a prefix; None for all.
        shift_positions: number the text from P on, as `past_key_values` does in the official code and in PEFT.

    Raises:
        InputError: a value is out of its range.
    """

    prefix_length: int = 32
    prefix_projection: bool = False
    prefix_hidden_size: int = 512
    prefix_dropout: float = 0.0
    init: str = "activations"
    layers: tuple[int, ...] | None = None
    shift_positions: bool = False

    def __post_init__(self):
        for name in ("prefix_length", "prefix_hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1, a whole number.")
        if not 0.0 <= self.prefix_dropout < 1.0:
            raise InputError(f"prefix_dropout is {self.prefix_dropout}; it must be at least 0 and below 1.")
        object.__setattr__(self, "init", str(self.init))
        # A path is looked at when a model starts there: what was trained from it is loaded where it may not exist.
        is_place = self.init and ("/" in self.init or Path(self.init).is_dir())
        if self.init not in INITIALISERS and not is_place:
            raise InputError(f'init is "{self.init}"; it must be "normal", "zero" or "activations", or a directory with a checkpoint.')
        if self.layers is not None:
            layers = tuple(self.layers)
            if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
                raise InputError(f"layers is {list(layers)}; it must be different layer indices in ascending order.")
            object.__setattr__(self, "layers", layers)

    @property
    def checkpoint(self) -> Path | None:
        """The directory that `init` names; None for a way to draw."""
        return None if self.init in INITIALISERS else Path(self.init).expanduser()

    def to_dict(self) -> dict:
        return {**asdict(self), "layers": None if self.layers is None else list(self.layers)}


@dataclass(frozen=True)
class AttentionShape:
    """How a backbone's attention is cut: its number of layers, key/value heads H, head size D and hidden size E."""

    num_layers: int
    num_heads: int
    head_dim: int
    hidden_size: int


class PrefixEncoder(nn.Module):
    """Makes the prefix of all layers from trained parameters: an embedding, or an embedding and an MLP.

    Args:
        config: what to make.
        shape: of the backbone that will see it.

    Raises:
        InputError: `config.layers` names a layer that the backbone lacks.
    """

    def __init__(self, config: PrefixConfig, shape: AttentionShape):
        super().__init__()
        self.config, self.shape = config, shape
        self.layers = config.layers if config.layers is not None else tuple(range(shape.num_layers))
        if self.layers[-1] >= shape.num_layers:
            raise InputError(f"layers names layer {self.layers[-1]}; the backbone has layers 0 to {shape.num_layers - 1}.")
        flat = len(self.layers) * 2 * shape.num_heads * shape.head_dim  # numbers per prefix position
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.prefix_length, shape.hidden_size)
            self.transform = nn.Sequential(
                nn.Linear(shape.hidden_size, config.prefix_hidden_size),
                nn.Tanh(),
                nn.Linear(config.prefix_hidden_size, flat),
            )
        else:
            self.embedding = nn.Embedding(config.prefix_length, flat)

    def flat(self) -> Tensor:
        """The prefix as one row per position, float [P, 2·L·E]; what a checkpoint stores."""
        return self.transform(self.embedding.weight) if self.config.prefix_projection else self.embedding.weight

    def forward(self, batch_size: int | None = None) -> Tensor:
        """The prefix of every layer, key then value.

        Args:
            batch_size: with prefix dropout in training, draw one mask per example, as the paper's code does.

        Returns:
            float [L, 2, H, P, D]; [L, 2, B, H, P, D] where dropout made the examples differ.
        """
        prefix = unflatten(self.flat(), len(self.layers), self.shape)  # [L, 2, H, P, D]
        if self.training and self.config.prefix_dropout > 0 and batch_size is not None:
            prefix = prefix[:, :, None].expand(-1, -1, batch_size, -1, -1, -1)  # [L, 2, B, H, P, D]
            prefix = nn.functional.dropout(prefix, self.config.prefix_dropout)
        return prefix

    @torch.no_grad()
    def set_prefix(self, prefix: Tensor) -> None:
        """Start from a given prefix, float [L, 2, H, P, D].

        With the MLP, its last layer is solved for (least squares, Moore-Penrose): exact while the P hidden
        vectors are independent, that is while P is at most `prefix_hidden_size`.
        """
        flat = flatten(prefix)
        if not self.config.prefix_projection:
            self.embedding.weight.copy_(flat)
            return
        last = self.transform[2]
        hidden = self.transform[:2](self.embedding.weight).double()  # [P, hidden]
        target = flat.double() - last.bias.double()
        last.weight.copy_((torch.linalg.pinv(hidden) @ target).T)

    @torch.no_grad()
    def set_normal(self) -> None:
        """N(0, 1) for the embedding, which is torch's own default and so the official code's."""
        nn.init.normal_(self.embedding.weight)

    @torch.no_grad()
    def set_zero(self) -> None:
        """All keys and values zero.

        This is no no-op. A zero key has the logit 0 with every query, so the P places still take the share
        P / (P + Σ_s exp(logit_s)) of each softmax, and their zero values shrink the attention's output by it. A true
        no-op needs logits of minus infinity: a mask, or keys far off in a direction that every query has.

        Nor do the places differ: without dropout or the MLP all P get the same gradient, and stay copies of one.
        """
        if self.config.prefix_projection:  # the last layer's; the embedding keeps the places apart
            nn.init.zeros_(self.transform[2].weight)
            nn.init.zeros_(self.transform[2].bias)
        else:
            nn.init.zeros_(self.embedding.weight)


def unflatten(flat: Tensor, num_layers: int, shape: AttentionShape) -> Tensor:
    """[P, 2·L·E] to [L, 2, H, P, D]: layer by layer, key before value, head by head."""
    P = flat.shape[0]
    split = flat.view(P, num_layers, 2, shape.num_heads, shape.head_dim)  # [P, L, 2, H, D]
    return split.permute(1, 2, 3, 0, 4)  # [L, 2, H, P, D]


def flatten(prefix: Tensor) -> Tensor:
    """[L, 2, H, P, D] to [P, 2·L·E], the inverse of `unflatten`."""
    return prefix.permute(3, 0, 1, 2, 4).flatten(1)  # [P, L, 2, H, D] -> [P, 2·L·E]


def to_past_key_values(prefix: Tensor, batch_size: int) -> DynamicCache:
    """The paper's way in: the prefix as a cache of what "came before", one (key, value) pair [B, H, P, D] a layer.

    The package itself uses `ptv2.attention`; this is the reference that its tests and the notebooks hold it against.

    Args:
        prefix: float [L, 2, H, P, D] with a prefix in every layer.
        batch_size: B.
    """
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix):  # each [H, P, D]
        cache.update(key.expand(batch_size, -1, -1, -1), value.expand(batch_size, -1, -1, -1), layer)
    return cache


def prefix_parameter_count(config: PrefixConfig, shape: AttentionShape) -> int:
    """Trained numbers of a prefix by formula: P·2·L·E; with the MLP of width M: P·E + (E + 1)·M + (M + 1)·2·L·E."""
    layers = shape.num_layers if config.layers is None else len(config.layers)
    flat = 2 * layers * shape.num_heads * shape.head_dim
    if not config.prefix_projection:
        return config.prefix_length * flat
    E, M = shape.hidden_size, config.prefix_hidden_size
    return config.prefix_length * E + (E + 1) * M + (M + 1) * flat
