"""A checkpoint as the start of another model: what it hands on, what is refused, and what the record says of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DATA

from ptv2 import cli, records
from ptv2.backbone import weights_sha256
from ptv2.errors import InputError
from ptv2.features import WindowConfig
from ptv2.methods import METHODS, build_model, load_model
from ptv2.model import DESCRIPTION_FILE, PrefixModelForQuestionAnswering, SpanModel
from ptv2.prefix import PrefixConfig
from ptv2.training import RUN_FILE, QATrainer, TrainingConfig, train

DRAWN = PrefixConfig(prefix_length=3, init="normal")
RUN_WINDOWS = WindowConfig(512, 64, 32)


@pytest.fixture(scope="module")
def checkpoint(tiny_bert, tmp_path_factory):
    """A function from a method to a checkpoint of it with random weights."""
    made = {}

    def make(method: str) -> Path:
        if method not in made:
            torch.manual_seed(5)
            model = build_model(method, str(tiny_bert), DRAWN, seed=5, precision="fp32")
            with torch.no_grad():
                for name in model.trained_names:
                    model.get_parameter(name).normal_(std=0.3)
            made[method] = tmp_path_factory.mktemp("checkpoint") / method
            model.save_pretrained(made[method])
        return made[method]

    return make


def same_state(one: SpanModel, other: SpanModel) -> bool:
    mine, theirs = one.trained_state(), other.trained_state()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("method", METHODS)
def test_all_that_a_method_trains_starts_at_the_checkpoint_of_that_method(method, tiny_bert, checkpoint):
    started = build_model(method, str(tiny_bert), replace(DRAWN, init=str(checkpoint(method))), seed=1, precision="fp32")
    assert same_state(started, load_model(checkpoint(method), precision="fp32"))
    assert not same_state(started, build_model(method, str(tiny_bert), DRAWN, seed=1, precision="fp32"))
    # Fine-tuning hands on the backbone's own weights, too.
    trains_embeddings = "backbone.embeddings.word_embeddings.weight" in started.trained_state()
    assert trains_embeddings == (method == "fine-tuning")


def test_a_model_built_without_the_table_of_methods_starts_there_too(tiny_bert, checkpoint):
    config = replace(DRAWN, init=checkpoint("p-tuning-v2"))  # a Path is as good as its text
    started = PrefixModelForQuestionAnswering.from_backbone(str(tiny_bert), config, precision="fp32")
    assert same_state(started, load_model(checkpoint("p-tuning-v2"), precision="fp32"))


def test_a_reparameterised_prefix_starts_at_plain_keys_and_values(tiny_bert, checkpoint):
    config = replace(DRAWN, init=str(checkpoint("p-tuning-v2")), prefix_projection=True, prefix_hidden_size=16)
    started = build_model("p-tuning-v2", str(tiny_bert), config, precision="fp32")
    wanted = load_model(checkpoint("p-tuning-v2"), precision="fp32").prefix_encoder()
    torch.testing.assert_close(started.prefix_encoder(), wanted, atol=1e-5, rtol=0)


def test_all_layers_written_out_are_all_layers(tiny_bert, checkpoint):
    config = replace(DRAWN, init=str(checkpoint("p-tuning-v2")), layers=(0, 1))
    started = build_model("p-tuning-v2", str(tiny_bert), config, precision="fp32")
    assert same_state(started, load_model(checkpoint("p-tuning-v2"), precision="fp32"))


@pytest.mark.parametrize(
    ("method", "other", "changes", "said"),
    [
        ("p-tuning-v2", "p-tuning-v2", {"prefix_length": 4}, "with prefix_length 3, not 4; give one trained with 4"),
        ("p-tuning-v2", "p-tuning-v2", {"layers": (1,)}, r"with layers \(0, 1\), not \(1,\)"),
        ("p-tuning-v2", "p-tuning-v2", {"shift_positions": True}, "with shift_positions False, not True"),
        ("prompt-tuning", "prompt-tuning", {"prefix_length": 4}, "with prefix_length 3, not 4"),
        ("fine-tuning", "p-tuning-v2", {}, "with method p-tuning-v2, not fine-tuning; give one trained with fine-tuning"),
        ("p-tuning-v2", "head-only", {}, "with method head-only, not p-tuning-v2"),
    ],
)
def test_a_checkpoint_of_another_method_or_prefix_is_refused(method, other, changes, said, tiny_bert, checkpoint):
    path = checkpoint(other)
    with pytest.raises(InputError, match=f"init names the checkpoint {path} {said}"):
        build_model(method, str(tiny_bert), replace(DRAWN, init=str(path), **changes), precision="fp32")


def test_a_checkpoint_of_another_rank_or_backbone_is_refused(tiny_bert, tiny_roberta, checkpoint):
    with pytest.raises(InputError, match="with lora_rank 8, not 4"):
        build_model("lora", str(tiny_bert), replace(DRAWN, init=str(checkpoint("lora"))), lora_rank=4, precision="fp32")
    with pytest.raises(InputError, match=r"with backbone sha256 [0-9a-f]{64}, not [0-9a-f]{64}; give one"):
        build_model("p-tuning-v2", str(tiny_roberta), replace(DRAWN, init=str(checkpoint("p-tuning-v2"))), precision="fp32")


def test_a_directory_that_is_no_checkpoint_is_refused(tiny_bert, tmp_path):
    for path, said in ((tmp_path / "none", "is no directory; give one that"), (tmp_path, f"holds no {DESCRIPTION_FILE}")):
        with pytest.raises(InputError, match=said):
            build_model("p-tuning-v2", str(tiny_bert), replace(DRAWN, init=str(path)), precision="fp32")
    for init in ("", "zeros"):
        with pytest.raises(InputError, match=f'init is "{init}"; it must be .* or a directory with a checkpoint'):
            PrefixConfig(init=init)


def make_config(backbone: Path, init: Path, method: str = "p-tuning-v2", **changes) -> TrainingConfig:
    data = str(DATA / "squad_v1.json")
    usual = {"max_steps": 4, "batch_size": 2, "evaluations": 2, "precision": "fp32", "windows": RUN_WINDOWS}
    prefix = replace(DRAWN, init=str(init))
    return TrainingConfig(method=method, backbone=str(backbone), train_data=(data,), eval_data=data, prefix=prefix, **{**usual, **changes})


@pytest.mark.parametrize("method", ["p-tuning-v2", "fine-tuning"])
def test_a_run_records_its_checkpoint_and_is_repeated_and_loaded_without_its_path(method, tiny_bert, checkpoint, tmp_path, capsys):
    start = shutil.copytree(checkpoint(method), tmp_path / "start")
    config = make_config(tiny_bert, start, method)
    record = train(config, tmp_path / "one", cli.command_line(config, tmp_path / "one"))
    assert record["init"] == {"name": str(start), "sha256": weights_sha256(start)}
    assert f"--init {start}" in record["command"]
    words = record["command"].split()
    assert cli.main([*words[1:-1], str(tmp_path / "two")]) == 0
    capsys.readouterr()
    assert weights_sha256(tmp_path / "two") == weights_sha256(tmp_path / "one") != weights_sha256(start)
    shutil.rmtree(start)
    described = (tmp_path / "one" / DESCRIPTION_FILE).read_text(encoding="utf-8")
    assert str(tmp_path) not in described
    if method == "p-tuning-v2":
        assert json.loads(described)["prefix"]["init"] == ".../start"
    assert same_state(load_model(tmp_path / "one", precision="fp32"), load_model(tmp_path / "two", precision="fp32"))
    assert train(config, tmp_path / "one", "") == record  # finished, so it is told again


def test_weights_drawn_as_before_leave_no_checkpoint_in_the_record(tiny_bert, tmp_path):
    config = replace(make_config(tiny_bert, tmp_path), prefix=DRAWN)
    assert "init" not in train(config, tmp_path / "run", "")


def test_a_run_does_not_go_on_where_its_checkpoint_has_changed_or_gone(tiny_bert, checkpoint, tmp_path, monkeypatch):
    start = shutil.copytree(checkpoint("p-tuning-v2"), tmp_path / "start")
    config = make_config(tiny_bert, start)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QATrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, tmp_path / "run", "")
    (weights,) = start.glob("*.safetensors")
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(InputError, match="or from another checkpoint's weights; give it those"):
        train(config, tmp_path / "run", "")
    weights.unlink()
    with pytest.raises(InputError, match="holds no safetensors weights"):
        train(config, tmp_path / "run", "")
    weights.write_bytes(kept)
    assert train(config, tmp_path / "run", "")["status"] == records.read_json(tmp_path / "run" / RUN_FILE)["status"] == "finished"
