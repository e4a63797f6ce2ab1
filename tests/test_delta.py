"""Fine-tuned weights as a difference: close to the weights, small, tied to the backbone, and refused where it does not fit."""

import json
import shutil

import pytest
import torch
from conftest import DATA, REPOSITORY
from safetensors.torch import load_file, save_file

from ptv2 import InputError, QuestionAnswerer, build_model, load_examples, load_model
from ptv2.cli import main
from ptv2.delta import export_delta, quantise
from ptv2.model import DELTA_FILE
from ptv2.report import read_results

WORDS = "backbone.embeddings.word_embeddings.weight"
TEXTS = sorted({example.context for example in load_examples("embedded", "dev")})
SHIPPED = REPOSITORY / "results" / "checkpoints"


@pytest.fixture(scope="module")
def tuned(tiny_bert, tmp_path_factory):
    """A checkpoint of full fine-tuning whose weights all moved a little."""
    model = build_model("fine-tuning", str(tiny_bert))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    export_delta(tuned, path, TEXTS, 100, "ptv2 export")
    return path


def test_eight_bits_are_within_half_a_step_of_every_row():
    matrix = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 50)[:, None]
    matrix[3] = 0
    steps, scale = quantise(matrix)
    assert steps.dtype == torch.int8 and steps.shape == matrix.shape and scale.shape == (50, 1)
    assert ((steps * scale - matrix).abs() <= 0.501 * scale).all()
    assert steps.abs().amax(dim=1).tolist() == [127 * (row != 3) for row in range(50)]  # the whole range is used
    steps, scale = quantise(matrix[0])
    assert steps.shape == (7,) and scale.shape == (1,)


def test_the_weights_come_back(tuned, exported, tiny_bert):
    full, back = load_model(tuned), load_model(exported)
    pretrained = load_file(tiny_bert / "model.safetensors")
    kept = load_file(exported / DELTA_FILE)[f"{WORDS}.rows"].long()
    assert len(kept) == 100
    for name, weight in full.named_parameters():
        found = back.get_parameter(name)
        if name.startswith("qa_outputs."):
            assert torch.equal(found, weight)
        elif name == WORDS:
            left_out = torch.ones(len(weight), dtype=torch.bool).index_fill(0, kept, False)
            assert torch.equal(found[left_out], pretrained["embeddings.word_embeddings.weight"][left_out])
            assert not torch.allclose(weight[left_out], found[left_out], atol=2e-4)
            assert torch.allclose(weight[kept], found[kept], atol=2e-4)
        else:
            assert torch.allclose(found, weight, atol=2e-4), name  # moved by 0.01 each: half of 1/127 of the largest of a row


def test_kept_are_the_rows_that_matter_to_the_texts(tuned, exported, tiny_bert):
    difference = load_model(tuned).get_parameter(WORDS) - build_model("fine-tuning", str(tiny_bert)).get_parameter(WORDS)
    tokenizer = QuestionAnswerer.from_pretrained(tuned).tokenizer
    error = torch.zeros(len(difference))  # that leaving a row out adds to these texts
    for text in TEXTS:
        for token in tokenizer(text)["input_ids"]:
            error[token] += difference[token].square().sum()
    kept = load_file(exported / DELTA_FILE)[f"{WORDS}.rows"].tolist()
    assert kept == sorted(error.topk(100).indices.tolist())


def test_every_row_of_the_words_can_be_kept(tuned, tmp_path):
    export_delta(tuned, tmp_path / "all", TEXTS, 10**6, "")
    assert torch.allclose(load_model(tmp_path / "all").get_parameter(WORDS), load_model(tuned).get_parameter(WORDS), atol=2e-4)


def test_it_is_a_checkpoint_like_any_other(tuned, exported, capsys):
    size = (exported / DELTA_FILE).stat().st_size
    parameters = sum(parameter.numel() for parameter in load_model(tuned).parameters())
    words = load_model(tuned).get_parameter(WORDS).numel()
    assert size < 1.5 * (parameters - words) + 20_000  # a byte a weight; scales, names and these small rows beside it
    assert main(["params", str(exported)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stored_bytes"] == size and told["trained"] == parameters
    example = load_examples(DATA / "squad_v1.json")[0]
    answers = [QuestionAnswerer.from_pretrained(path)(example.question, example.context)[0] for path in (tuned, exported)]
    assert answers[0].logit == pytest.approx(answers[1].logit, abs=0.05)


def test_the_command_exports_a_run_with_its_record(tiny_bert, tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "small"
    words = ["train", "--method", "fine-tuning", "--backbone", str(tiny_bert), "--train-data", str(DATA / "squad_v1.json"), "--eval-data"]
    assert main([*words, str(DATA / "squad_v1.json"), "--max-steps", "4", "--output-dir", str(run)]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--delta", "--output", str(output), "--word-rows", "9"]) == 0
    size = (output / DELTA_FILE).stat().st_size
    assert json.loads(capsys.readouterr().out) == {"checkpoint": str(output), "stored_bytes": size}
    record, before = (json.loads((path / "run.json").read_text()) for path in (output, run))
    assert record["parameters"] == {**before["parameters"], "stored_bytes": size} and size < before["parameters"]["stored_bytes"]
    assert record["export"]["of"] == "run" and record["export"]["command"].endswith("--texts embedded --word-rows 9")
    assert [result.name for result in read_results([tmp_path])] == ["run", "run, 8-bit difference"]
    with pytest.raises(SystemExit):
        main(["export", str(run), "--output", str(tmp_path / "other")])
    assert "--delta" in capsys.readouterr().err and not (tmp_path / "other").exists()


def _changed(path, to, change):
    """A copy of an exported checkpoint, its tensors and metadata changed."""
    shutil.copytree(path, to)
    tensors, metadata = load_file(to / DELTA_FILE), {"backbone_sha256": json.loads((to / "ptv2.json").read_text())["backbone"]["sha256"]}
    change(tensors, metadata)
    save_file(tensors, to / DELTA_FILE, metadata)
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, metadata: metadata.update(backbone_sha256="f" * 64), "with sha256 ffffffffffff..., but"),
        (lambda tensors, metadata: metadata.clear(), "with sha256 none..., but"),
        (lambda tensors, metadata: tensors.pop("qa_outputs.bias"), "does not hold the difference"),
        (lambda tensors, metadata: tensors.pop(f"{WORDS}.rows"), "does not hold the difference"),
        (lambda tensors, metadata: tensors[f"{WORDS}.rows"].fill_(10**6), "does not hold the difference"),
        (lambda tensors, metadata: tensors[f"{WORDS}.rows"].fill_(-1), "does not hold the difference"),
        (lambda tensors, metadata: tensors.update(more=torch.zeros(1)), "does not hold the difference"),
    ],
)
def test_a_difference_that_does_not_fit_is_refused(exported, tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        load_model(_changed(exported, tmp_path / "changed", change))


def test_a_truncated_file_and_other_mistakes_have_their_sentence(exported, tuned, tiny_bert, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / DELTA_FILE).write_bytes((exported / DELTA_FILE).read_bytes()[:-9])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_model(broken)
    with pytest.raises(InputError, match="is the run itself"):
        export_delta(tuned, tuned, TEXTS, 9, "")
    with pytest.raises(InputError, match="word_rows is -1"):
        export_delta(tuned, tmp_path / "new", TEXTS, -1, "")
    build_model("head-only", str(tiny_bert)).save_pretrained(tmp_path / "head")
    with pytest.raises(InputError, match="only fine-tuning's does"):
        export_delta(tmp_path / "head", tmp_path / "new", TEXTS, 9, "")


def test_what_ships_is_small_and_as_good_as_the_full_weights():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 12e6
    full, small = (
        json.loads((path / "evaluation.json").read_text())
        for path in (REPOSITORY / "results" / "runs" / "fine-tuning-seed-0", SHIPPED / "fine-tuning")
    )
    assert small["data_sha256"] == full["data_sha256"] and small["n"] == full["n"]
    assert abs(small["f1"]["value"] - full["f1"]["value"]) < 0.2
    without = json.loads((REPOSITORY / "results" / "exports" / "without-words" / "evaluation.json").read_text())
    assert without["data_sha256"] == full["data_sha256"] and full["f1"]["value"] - without["f1"]["value"] > 0.2  # so words are kept
    record = json.loads((SHIPPED / "fine-tuning" / "run.json").read_text())
    assert record["parameters"]["stored_bytes"] == (SHIPPED / "fine-tuning" / DELTA_FILE).stat().st_size


def test_the_shipped_difference_answers():
    context = "They were paid in herring and copper, because silver was scarce that year."
    assert (
        "herring and copper" in QuestionAnswerer.from_pretrained(SHIPPED / "fine-tuning")("What were the men paid with?", context)[0].text
    )
