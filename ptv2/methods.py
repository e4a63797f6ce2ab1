"""One table of methods: how each is built on a backbone, what it trains, how many numbers that is, and how fast it learns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PromptEmbedding, PromptTuningConfig, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel

from ptv2.attention import AttentionShape, attention_shape, text_positions
from ptv2.backbone import Backbone, fast_dtype, load_backbone, resolve_backbone
from ptv2.checkpoint import Description, start_from
from ptv2.errors import InputError
from ptv2.model import PrefixModelForQuestionAnswering, SpanModel
from ptv2.prefix import PrefixConfig, prefix_parameter_count


@dataclass(frozen=True)
class Build:
    """What a method is built from: a backbone, the prefix's (or prompt's) settings, LoRA's rank and a seed."""

    backbone: Backbone
    encoder: PreTrainedModel
    prefix: PrefixConfig
    lora_rank: int
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to teach a backbone to answer.

    Args:
        title: for tables and figures.
        build: makes the untrained model, the prefix not yet initialised.
        count: its trained numbers by formula, head apart.
        learning_rate: of what the method adds or changes. P-tuning v2's, its head's and its schedule were chosen on held-out training
            articles (results/README.md); the others are usual values, not tuned here.
        head_learning_rate: of the span head.
        source: where the method comes from.
        schedule, warmup: of both rates; see `ptv2.config.TrainingConfig`.
        weight_decay: of AdamW; P-tuning v2's was chosen over long trainings, which turn out better with a little of it.
    """

    title: str
    build: Callable[[Build], SpanModel]
    count: Callable[[Build], int]
    learning_rate: float
    head_learning_rate: float
    source: str
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0


class PromptModel(SpanModel):
    """Prompt tuning: P trained vectors before the word embeddings, at the input alone. PEFT holds the vectors.

    PEFT's own question-answering wrapper leaves the P extra positions in the logits and the labels unmoved, so the
    forward pass is written out here.
    """

    def __init__(self, build: Build):
        super().__init__(build.backbone, build.encoder, "prompt-tuning", build.seed)
        config = PromptTuningConfig(
            num_virtual_tokens=build.prefix.prefix_length,
            token_dim=build.encoder.get_input_embeddings().embedding_dim,  # ELECTRA's and ALBERT's is less than E
            num_transformer_submodules=1,
            prompt_tuning_init="SAMPLE_VOCAB",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(build.seed)
            self.prompt = PromptEmbedding(config, build.encoder.get_input_embeddings())
        self.prefix_length = build.prefix.prefix_length
        self.train_only(lambda name: name.startswith("prompt."))

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs int [B, S] each to the text's hidden states [B, S, E]; the prompt's P are cut off."""
        P, (B, S) = self.prefix_length, inputs["input_ids"].shape
        limit = text_positions(self.backbone)
        if limit < P + S:
            raise InputError(f"{P} prompt and {S} text tokens exceed the backbone's {limit} positions; lower max_length.")
        words = self.backbone.get_input_embeddings()(inputs["input_ids"])  # [B, S, E]
        prompt = self.prompt(torch.arange(P, device=words.device)).to(words.dtype).expand(B, -1, -1)  # [B, P, E]
        longer = {
            "inputs_embeds": torch.cat((prompt, words), dim=1),  # [B, P + S, E]
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (P, 0), value=1),
        }
        if "token_type_ids" in inputs:
            longer["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (P, 0), value=0)
        return self.backbone(**longer).last_hidden_state[:, P:]  # [B, S, E]

    def description(self) -> dict:
        return {**super().description(), "prefix": {"prefix_length": self.prefix_length}}


class LoraModel(SpanModel):
    """LoRA on the projections that PEFT names for the family (query and value for BERT)."""

    def __init__(self, build: Build):
        super().__init__(build.backbone, build.encoder, "lora", build.seed)
        self.rank = build.lora_rank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(build.seed)
            try:
                inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=2 * self.rank), build.encoder)
            except ValueError as error:
                raise InputError(f"PEFT has no LoRA targets for {build.encoder.config.model_type}: {error}") from error
        self.train_only(lambda name: ".lora_" in name)

    def description(self) -> dict:
        return {**super().description(), "lora_rank": self.rank}


def _plain(method: str, is_trained: Callable[[str], bool]) -> Callable[[Build], SpanModel]:
    return lambda build: SpanModel(build.backbone, build.encoder, method, build.seed).train_only(is_trained)


def _prefix(build: Build) -> SpanModel:
    return PrefixModelForQuestionAnswering(build.backbone, build.encoder, build.prefix, build.seed)


def _shape(build: Build) -> AttentionShape:
    return attention_shape(build.encoder.config)


def _size(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _lora_count(build: Build) -> int:
    """2 projections a layer, each with A [rank, E] and B [E, rank]; BERT and RoBERTa only, others differ in targets."""
    return _shape(build).num_layers * 2 * 2 * build.lora_rank * build.encoder.config.hidden_size


METHODS: dict[str, Method] = {
    "p-tuning-v2": Method(
        "P-tuning v2",
        _prefix,
        lambda b: prefix_parameter_count(b.prefix, _shape(b)),
        5e-2,
        2e-1,
        "Liu et al., ACL 2022",
        schedule="cosine",
        warmup=0.3,
        weight_decay=0.01,
    ),
    "fine-tuning": Method(
        "full fine-tuning",
        _plain("fine-tuning", lambda name: True),
        lambda b: _size(b.encoder.parameters()),
        1e-4,
        1e-4,
        "Devlin et al., NAACL 2019",
    ),
    "head-only": Method("head only", _plain("head-only", lambda name: False), lambda b: 0, 1e-2, 1e-2, "linear probe"),
    "lora": Method("LoRA", LoraModel, _lora_count, 1e-3, 1e-2, "Hu et al., ICLR 2022"),
    "prompt-tuning": Method(
        "prompt tuning",
        PromptModel,
        lambda b: b.prefix.prefix_length * b.encoder.get_input_embeddings().embedding_dim,
        1e-1,
        1e-2,
        "Lester et al., EMNLP 2021",
    ),
    "bitfit": Method(
        "BitFit",
        _plain("bitfit", lambda name: name.endswith(".bias")),
        lambda b: _size(p for name, p in b.encoder.named_parameters() if name.endswith(".bias")),
        1e-3,
        1e-2,
        "Ben Zaken et al., ACL 2022",
    ),
}


def build_model(
    method: str,
    backbone: str,
    prefix: PrefixConfig | None = None,
    *,
    lora_rank: int = 8,
    texts: list[str] | None = None,
    seed: int = 0,
    precision: str = "auto",
    attn_implementation: str | None = None,
) -> SpanModel:
    """An untrained model of any method.

    Args:
        method: a name in METHODS.
        backbone: directory or hub name.
        prefix: of p-tuning-v2; its prefix_length is also the number of prompt-tuning's vectors, and its init, where it
            names a checkpoint, any method's start.
        lora_rank: of lora.
        texts: training text for init="activations"; the embedded corpus if None.
        seed: of everything drawn at the start.
        precision: dtype of the frozen weights: "auto", "fp32", "bf16" or "int8".
        attn_implementation: "sdpa", "eager", ...; None takes the fastest one.

    Raises:
        InputError: unknown method or backbone, or a checkpoint to start from that is not of these.
    """
    found, prefix = resolve_backbone(backbone), prefix or PrefixConfig()
    model = _build(method, found, load_backbone(found, attn_implementation), prefix, lora_rank, seed)
    if isinstance(model, PrefixModelForQuestionAnswering):
        model.initialise(texts, seed)
    elif prefix.checkpoint is not None:
        start_from(model, prefix.checkpoint)
    return model.freeze_in(fast_dtype(precision))


def _build(method: str, found: Backbone, encoder: PreTrainedModel, prefix: PrefixConfig, lora_rank: int, seed: int) -> SpanModel:
    if method not in METHODS:
        raise InputError(f'The method "{method}" is unknown; choose one of {", ".join(METHODS)}.')
    if not isinstance(lora_rank, int) or lora_rank < 1:
        raise InputError(f"lora_rank is {lora_rank}; it must be at least 1, a whole number.")
    return METHODS[method].build(Build(found, encoder, prefix, lora_rank, seed))


def load_model(
    path: str | Path, *, precision: str = "auto", attn_implementation: str | None = None, beside: SpanModel | None = None
) -> SpanModel:
    """A trained model of any method, from a checkpoint directory, on the backbone that it names.

    Args:
        precision, attn_implementation: as in `build_model`.
        beside: share the frozen encoder of this model, rather than load it again.

    Raises:
        InputError: the checkpoint is broken, or the backbone found is not the one it was trained on.
    """
    path = Path(path)
    described = Description.read(path)
    backbone = resolve_backbone(described.backbone) if beside is None else beside.source
    if backbone.sha256 != described.sha256:
        raise InputError(
            f"{path} was trained on a backbone with sha256 {described.sha256[:12]}..., but {backbone.name} is {backbone.sha256[:12]}...: "
            "give the backbone it was trained on, or train again."
        )
    encoder = load_backbone(backbone, attn_implementation) if beside is None else beside.backbone
    model = _build(described.method, backbone, encoder, described.prefix, described.lora_rank, 0)
    model.load_pretrained(path)
    return model.freeze_in(fast_dtype(precision)).eval()


@dataclass(frozen=True)
class ParameterCount:
    """Trained numbers of a model: of what the method adds, of the head, by formula, and of the whole backbone."""

    method: str
    trained: int
    head: int
    formula: int
    backbone: int
    total: int
    stored_bytes: int

    @property
    def share(self) -> float:
        """Trained numbers, head included, over the backbone's."""
        return self.trained / self.backbone


def count_parameters(model: SpanModel, stored_bytes: int = 0) -> ParameterCount:
    """Count a model's parameters and set them beside the closed formula of its method."""
    plain = load_backbone(model.source)
    prefix = model.prefix_encoder.config if isinstance(model, PrefixModelForQuestionAnswering) else PrefixConfig()
    if isinstance(model, PromptModel):
        prefix = replace(prefix, prefix_length=model.prefix_length)
    rank = model.rank if isinstance(model, LoraModel) else 8
    head = _size(model.qa_outputs.parameters())
    backbone = _size(plain.parameters())
    formula = METHODS[model.method].count(Build(model.source, plain, prefix, rank, 0))
    own = {f"backbone.{name}" for name, _ in plain.named_parameters()}
    trained = {name: model.get_parameter(name).numel() for name in model.trained_names}
    total = backbone + sum(count for name, count in trained.items() if name not in own)
    return ParameterCount(model.method, sum(trained.values()), head, formula, backbone, total, stored_bytes)
