"""What decides a training run's result, the machine aside: one config, checked when it is made."""

from dataclasses import asdict, dataclass, field

from ptv2.backbone import DEFAULT_BACKBONE, fast_dtype
from ptv2.errors import InputError
from ptv2.features import WindowConfig
from ptv2.methods import METHODS
from ptv2.prefix import PrefixConfig
from ptv2.pretraining import PretrainingConfig

# Their names here, and in transformers.
OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor", "rmsprop": "rmsprop"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides a run's result, the machine aside.

    Args:
        method: p-tuning-v2, fine-tuning, head-only, lora, prompt-tuning or bitfit.
        backbone: directory or hub name of the pretrained encoder.
        train_data: SQuAD files, hub data sets or "embedded"; several are joined.
        answerable_only: leave unanswerable questions out, of the held-out ones too.
        eval_data: questions on which the best checkpoint is picked; none holds out a part of the training articles.
        held_out: share of the training questions to hold out where eval_data is not given.
        max_train_questions: train on this many of the remaining questions, drawn with the seed; 0 for all.
        epochs: passes over the training windows.
        max_steps: stop after this many optimiser steps instead; 0 for epochs.
        batch_size: windows per device and forward pass.
        gradient_accumulation: forward passes per optimiser step.
        learning_rate: of what the method trains beside the head; 0 for the method's default.
        head_learning_rate: of the span head; 0 for the method's default.
        weight_decay: of AdamW, on weights that are not biases or norms; None for the method's default.
        optimizer: "adamw", "adafactor" or "rmsprop".
        schedule: how the learning rate falls after the warm-up: "linear" or "cosine", to 0 at the end, or "constant"; "" for the
            method's default.
        warmup: share of the steps over which the learning rate rises; None for the method's default.
        max_grad_norm: to which the gradient is clipped; 0 for no clipping.
        evaluations: how often per run the held-out questions are answered and a checkpoint is kept.
        seed: of initialisation, order and dropout.
        precision: "fp32", "bf16", "int8" or "auto" (bf16 where the machine has it built in, or else fp32).
        lora_rank: of lora.
        prefix: the prefix of p-tuning-v2; prefix_length also counts prompt-tuning's vectors.
        windows: how texts are cut.
        pretraining: make the questions from plain text, which train_data and eval_data then name; None where they hold questions.

    Raises:
        InputError: a value is out of its range.
    """

    method: str = "p-tuning-v2"
    backbone: str = DEFAULT_BACKBONE
    train_data: tuple[str, ...] = ("embedded",)
    answerable_only: bool = False
    eval_data: str | None = None
    held_out: float = 0.05
    max_train_questions: int = 0
    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 0.0
    head_learning_rate: float = 0.0
    weight_decay: float | None = None
    optimizer: str = "adamw"
    schedule: str = ""
    warmup: float | None = None
    max_grad_norm: float = 1.0
    evaluations: int = 5
    seed: int = 0
    precision: str = "auto"
    lora_rank: int = 8
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    pretraining: PretrainingConfig | None = None

    def __post_init__(self):
        sources = (self.train_data,) if isinstance(self.train_data, str) else tuple(self.train_data)
        object.__setattr__(self, "train_data", sources)
        if self.method not in METHODS:
            raise InputError(f'method is "{self.method}"; choose one of {", ".join(METHODS)}.')
        # A record shall hold the values themselves.
        left_open = {"learning_rate": 0, "head_learning_rate": 0, "weight_decay": None, "schedule": "", "warmup": None}
        for name, value in left_open.items():
            if getattr(self, name) == value:
                object.__setattr__(self, name, getattr(METHODS[self.method], name))
        if not self.train_data:
            raise InputError("train_data is empty; name a file, a hub data set or embedded.")
        for name in ("batch_size", "gradient_accumulation", "evaluations", "lora_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        not_negative = "learning_rate", "head_learning_rate", "weight_decay", "max_grad_norm", "max_steps", "max_train_questions", "seed"
        for name in not_negative:
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.seed >= 2**32:  # NumPy's limit
            raise InputError(f"seed is {self.seed}; it must be below 2**32.")
        if not 0 < self.epochs < float("inf"):
            raise InputError(f"epochs is {self.epochs}; it must be above 0.")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is {self.warmup}; it must be at least 0 and below 1.")
        if self.eval_data is None and not 0 < self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}; it must be above 0 and below 1, or give eval_data.")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise InputError(f'{name} is "{getattr(self, name)}"; choose one of {", ".join(known)}.')
        fast_dtype(self.precision)  # names the allowed values

    def to_dict(self) -> dict:
        return {**asdict(self), "train_data": list(self.train_data), "prefix": self.prefix.to_dict()}
