"""`ptv2 bench leads`: ways to make a training step faster that were thought of, each against what is done now, in turn."""

import ctypes
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ptv2 import records
from ptv2.attention import attention_shape
from ptv2.backbone import default_device, load_backbone, load_tokenizer, resolve_backbone
from ptv2.bench import contenders
from ptv2.bench.rounds import Answers, Process, seconds, spread, use_threads
from ptv2.bench.train import Setting, described, prepare, real_batches
from ptv2.features import LengthGroupedSampler, WindowConfig, collate, make_features
from ptv2.fused_attention import Seen, attend, fits, text_seen
from ptv2.int8 import Int8Linear
from ptv2.squad import load_examples

LENGTHS = (64, 128, 192, 384)
Work = Callable[[], object]


def now(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """What is done now: prefix and text in one pass, or torch's fused attention where that can't be used."""
    if not fits(query, key):
        return joined(query, key, value, prefix)
    B, _, S, D = query.shape
    seen = Seen(torch.full((B,), prefix[0].shape[-2]), *text_seen(None, B, S))
    return attend(query, key, value, prefix, seen, D**-0.5).transpose(1, 2)


def joined(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """The prefix put before keys and values, and torch's fused attention."""
    return F.scaled_dot_product_attention(query, *_joined(key, value, prefix))


def products(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """Batched products with a softmax between them."""
    key, value = _joined(key, value, prefix)
    return ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(-1) @ value


def merged(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """Prefix and text attended apart, nothing joined or expanded, and merged by their log-sum-exps."""
    parts = []
    for keys, values in ((prefix[0], prefix[1]), (key, value)):
        scores = (query * query.shape[-1] ** -0.5) @ keys.mT  # [B, H, S, P or S]
        total = scores.logsumexp(-1, keepdim=True)
        parts.append((total, (scores - total).exp() @ values))
    share = (parts[0][0] - parts[1][0]).sigmoid()  # of the prefix
    return share * parts[0][1] + (1 - share) * parts[1][1]


def _joined(key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    B = len(key)
    return tuple(torch.cat((part.expand(B, -1, -1, -1), text), dim=2) for part, text in zip(prefix, (key, value), strict=True))


ATTENTION = {"torch's fused one, prefix joined": joined, "products and softmax": products, "prefix and text apart, merged": merged}


def _attention(setting: Setting, length: int, way: Callable[..., Tensor]) -> Work:
    """Forward and backward of one layer's attention on a batch of texts of this length."""
    shape = attention_shape(load_backbone(resolve_backbone(setting.backbone)).config)
    device, H, D = default_device(), shape.num_heads, shape.head_dim
    text = [torch.randn(setting.batch_size, H, length, D, device=device, requires_grad=True) for _ in range(3)]
    prefix = tuple(torch.randn(H, setting.prefix_length, D, device=device, requires_grad=True) for _ in range(2))
    upstream = torch.randn_like(text[0])
    return lambda: way(*text, prefix).backward(upstream)


def _linear(setting: Setting, layer: nn.Module) -> Work:
    """Forward and the gradient of the inputs of one linear layer, on a batch of texts of 192 tokens."""
    layer = layer.to(default_device())
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    inputs = torch.randn(setting.batch_size * 192, 384, device=default_device(), dtype=dtype, requires_grad=True)
    upstream = torch.randn(len(inputs), 1536, device=default_device(), dtype=dtype)
    return lambda: layer(inputs).backward(upstream)


@torch.no_grad()
def _packed(setting: Setting, layer: nn.Linear) -> tuple[Work, Work]:
    """The forward pass of a linear layer now, and with its weights laid out ahead by oneDNN and the bias added in the product."""
    inputs = torch.randn(setting.batch_size * 192, layer.in_features)
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, len(inputs))
    return lambda: layer(inputs), lambda: torch.ops.mkldnn._linear_pointwise(inputs, packed, layer.bias, "none", [], "")


def _in_turn(rounds: int, now: Work, lead: Work) -> dict[str, float]:
    """How many times as fast as what is done now, round by round, after an untimed call of each."""
    now(), lead()
    return spread([seconds(now) / seconds(lead) for _ in range(rounds)])


def operators(setting: Setting) -> Answers:
    """The leads about single operators, in a process of their own."""
    use_threads(setting.threads)

    def measure() -> list[dict]:
        found = []
        for length, (name, way) in itertools.product(LENGTHS, ATTENTION.items()):
            times = _in_turn(setting.rounds, _attention(setting, length, now), _attention(setting, length, way))
            found.append({"lead": f"attention: {name}", "at": f"{length} tokens", "times_as_fast": times})
        torch.manual_seed(0)
        plain = nn.Linear(384, 1536).requires_grad_(False)
        leads = {"bf16 products": nn.Linear(384, 1536).bfloat16().requires_grad_(False), "8-bit products": Int8Linear(plain)}
        for name, layer in leads.items():
            times = _in_turn(setting.rounds, _linear(setting, plain), _linear(setting, layer))
            found.append({"lead": f"linear layer: {name}", "at": "384 to 1,536", "times_as_fast": times})
        if torch.backends.mkldnn.is_available() and default_device().type == "cpu":
            times = _in_turn(setting.rounds, *_packed(setting, plain))
            found.append({"lead": "linear layer: weights packed, bias in the product", "at": "forward", "times_as_fast": times})
        return found

    return {"measure": measure}


def compiled(name: str, setting: Setting, batches: list) -> Answers:
    """Ours with the encoder compiled by torch for any length; what its first pass takes is mostly compilation."""
    use_threads(setting.threads)
    model = contenders.prepared(name, setting.backbone, setting.prefix_length, setting.seed).train()
    model.backbone.compile(dynamic=True)

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    def turn(i: int) -> float:
        step(batches[i])
        return seconds(lambda: step(batches[i]))

    compilation = seconds(lambda: step(batches[0]))
    return {"round": turn, "compilation": lambda: compilation}


def keeping(name: str, setting: Setting, batches: list) -> Answers:
    """Ours in a process whose C library keeps freed memory (mallopt(3)), rather than fetch it from the system again."""
    library = ctypes.CDLL(None)
    library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: nothing is too large for the heap
    library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the heap is never cut back
    return prepare(name, setting, batches)


def bench_leads(setting: Setting, command: str) -> dict:
    """Measure every lead and return the record."""
    process = Process(operators, setting)
    process.wait()
    found = process.ask("measure")
    process.stop()
    batches = real_batches(setting)
    ways = {"now": prepare, "torch.compile of the encoder": compiled, "freed memory kept": keeping}
    running = {way: Process(how, "ptv2-fp32", setting, batches) for way, how in ways.items()}
    for process in running.values():
        process.wait()
    turns = tqdm(range(setting.rounds), desc="rounds")
    rounds = [{way: process.ask("round", turn) for way, process in running.items()} for turn in turns]
    for way in list(ways)[1:]:
        times = spread([turn["now"] / turn[way] for turn in rounds])
        found.append({"lead": way, "at": "whole step", "times_as_fast": times})
    compilation = running["torch.compile of the encoder"].ask("compilation")
    for process in running.values():
        process.stop()
    return {
        **records.provenance(command),
        "setting": described(setting),
        "leads": found,
        "compilation_seconds": compilation,
        "step_seconds": spread([turn["now"] for turn in rounds]),
        **_data_loading(setting),
        "int8": _int8_error(setting, batches[-1]),
    }


def _int8_error(setting: Setting, batch: dict[str, Tensor]) -> dict[str, float]:
    """Loss and gradient of the prefix in 8 bits and in float32, from the same start on the same batch."""
    losses, gradients = [], []
    for name in ("ptv2-fp32", "ptv2-int8"):
        model = contenders.prepared(name, setting.backbone, setting.prefix_length, setting.seed).train()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.prefix_encoder.embedding.weight.grad.flatten())
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    return {"exact_loss": losses[0], "loss": losses[1], "gradient_cosine": cosine}


def _data_loading(setting: Setting) -> dict:
    """Share of padding in the batches of an epoch, and the time that one batch takes to make."""
    tokenizer = load_tokenizer(resolve_backbone(setting.backbone))
    features = make_features(load_examples(setting.data, "train"), tokenizer, WindowConfig())
    order = iter(LengthGroupedSampler(features["length"], setting.batch_size, setting.seed))
    groups = list(iter(lambda: list(itertools.islice(order, setting.batch_size)), []))
    lengths = features["length"]
    padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    took = [seconds(lambda g=group: collate([features[i] for i in g], tokenizer)) for group in groups[:20]]
    return {"padding": 1 - sum(lengths) / padded, "batch_seconds": spread(took)}
