"""P-tuning v2 for extractive question answering: a frozen encoder that learns from a trained prefix alone."""

from ptv2.answers import Answer, AnswerConfig, QuestionAnswerer
from ptv2.backbone import DEFAULT_BACKBONE
from ptv2.errors import InputError
from ptv2.features import WindowConfig
from ptv2.methods import METHODS, build_model, count_parameters, load_model
from ptv2.metrics import compare, score
from ptv2.model import PrefixModelForQuestionAnswering, SpanModel
from ptv2.prefix import PrefixConfig, PrefixEncoder, to_past_key_values
from ptv2.squad import Example, Span, load_examples
from ptv2.training import TrainingConfig, train

__all__ = [
    "DEFAULT_BACKBONE",
    "METHODS",
    "Answer",
    "AnswerConfig",
    "Example",
    "InputError",
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
