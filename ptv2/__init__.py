"""P-tuning v2 for extractive question answering: a frozen encoder that learns from a trained prefix alone."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; at run time a name is imported when it is first used, as torch and transformers take seconds
    from ptv2.answers import Answer, AnswerConfig, QuestionAnswerer
    from ptv2.backbone import DEFAULT_BACKBONE
    from ptv2.bank import PrefixBank
    from ptv2.errors import InputError
    from ptv2.features import WindowConfig
    from ptv2.methods import METHODS, build_model, count_parameters, load_model
    from ptv2.metrics import compare, score
    from ptv2.model import PrefixModelForQuestionAnswering, SpanModel
    from ptv2.prefix import PrefixConfig, PrefixEncoder, to_past_key_values
    from ptv2.squad import Example, Span, load_examples
    from ptv2.training import TrainingConfig, train

_HOMES = {
    "answers": ("Answer", "AnswerConfig", "QuestionAnswerer"),
    "backbone": ("DEFAULT_BACKBONE",),
    "bank": ("PrefixBank",),
    "errors": ("InputError",),
    "features": ("WindowConfig",),
    "methods": ("METHODS", "build_model", "count_parameters", "load_model"),
    "metrics": ("compare", "score"),
    "model": ("PrefixModelForQuestionAnswering", "SpanModel"),
    "prefix": ("PrefixConfig", "PrefixEncoder", "to_past_key_values"),
    "squad": ("Example", "Span", "load_examples"),
    "training": ("TrainingConfig", "train"),
}

__all__ = [
    "DEFAULT_BACKBONE",
    "METHODS",
    "Answer",
    "AnswerConfig",
    "Example",
    "InputError",
    "PrefixBank",
    "PrefixConfig",
    "PrefixEncoder",
    "PrefixModelForQuestionAnswering",
    "QuestionAnswerer",
    "Span",
    "SpanModel",
    "TrainingConfig",
    "WindowConfig",
    "build_model",
    "compare",
    "count_parameters",
    "load_examples",
    "load_model",
    "score",
    "to_past_key_values",
    "train",
]


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"ptv2.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
