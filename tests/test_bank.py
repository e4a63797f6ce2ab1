"""Many prefixes in one batch: each example as if it had been read alone with its own prefix and head."""

from dataclasses import asdict

import pytest
import torch

from ptv2.answers import AnswerConfig, QuestionAnswerer
from ptv2.bank import PrefixBank
from ptv2.errors import InputError
from ptv2.features import WindowConfig
from ptv2.methods import build_model
from ptv2.prefix import PrefixConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = {  # what may differ between the prefixes of one bank
    "long": {"prefix_length": 7},
    "short": {"prefix_length": 2},
    "first layer": {"prefix_length": 3, "layers": (0,)},
    "last layer": {"prefix_length": 4, "layers": (1,)},
    "shifted": {"prefix_length": 5, "shift_positions": True},
    "head alone": None,
}
WINDOWS = WindowConfig(max_length=48, stride=16, max_question_length=16)
CONTEXT = "The keeper tends the lamp at night. In winter the harbour freezes, and no ship comes in before the ice breaks in March. " * 3


def make_models(path, kinds=tuple(KINDS), attention=None):
    models = []
    for seed, kind in enumerate(kinds):
        settings = KINDS[kind]
        method = "head-only" if settings is None else "p-tuning-v2"
        config = PrefixConfig(init="normal", **(settings or {}))
        model = build_model(method, str(path), config, precision="fp32", seed=seed, attn_implementation=attention).eval()
        with torch.no_grad():
            model.qa_outputs.weight *= 15
            model.qa_outputs.bias += seed
        models.append(model)
    return models


def make_batch(model, lengths):
    config = model.backbone.config
    B, S = len(lengths), max(lengths)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, config.vocab_size, (B, S), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids.masked_fill(~mask, config.pad_token_id or 0), "attention_mask": mask.long()}
    if config.type_vocab_size > 1:
        batch["token_type_ids"] = (torch.arange(S) >= 3).long() * mask
    return batch


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kinds", [tuple(KINDS), ("long",), ("long", "long"), ("short", "long"), ("head alone", "head alone")])
@pytest.mark.parametrize("lengths", [(12, 7, 4, 12, 9, 5, 11), (9,) * 7])  # with padding, and without a mask
def test_a_mixed_batch_equals_one_example_at_a_time(tiny_backbone, attention, kinds, lengths):
    models = make_models(tiny_backbone, kinds, attention)
    batch = make_batch(models[0], lengths)
    index = torch.arange(7).flip(0) % len(models)
    alone = [models[n](**{k: v[i : i + 1, : lengths[i]] for k, v in batch.items()}) for i, n in enumerate(index.tolist())]
    together = PrefixBank(models)(**batch, prefix_index=index)
    for i, length in enumerate(lengths):
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(together[name][i, :length], alone[i][name][0], **CLOSE)
            assert (together[name][i, length:] == torch.finfo(torch.float32).min).all()


def test_the_prefixes_of_a_bank_really_differ(tiny_bert):
    bank = PrefixBank(make_models(tiny_bert))
    batch = {name: part.expand(len(KINDS), -1) for name, part in make_batch(bank, (12,)).items()}
    logits = bank(**batch, prefix_index=torch.arange(len(KINDS))).start_logits
    assert len({tuple(row) for row in logits.tolist()}) == len(KINDS) == len(bank)


def save(models, folder, **answers):
    paths = []
    for n, model in enumerate(models):
        paths.append(folder / str(n))
        model.save_pretrained(paths[-1], windows=asdict(WINDOWS), answers=asdict(AnswerConfig(**answers)))
    return paths


def test_checkpoints_answer_together_as_each_alone(tiny_backbone, tmp_path):
    models = make_models(tiny_backbone)
    paths = save(models[:3], tmp_path / "plain") + save(models[3:], tmp_path / "declining", allow_no_answer=True, no_answer_threshold=1.0)
    prefixes = [4, 0, 5, 3, 0, 1, 2]
    questions = [f"Who tends the {thing}?" for thing in ("lamp", "ice", "ship", "night", "harbour", "winter", "March")]
    contexts = [CONTEXT[20 * n :] for n in range(7)]
    together = QuestionAnswerer.from_pretrained(paths, precision="fp32").ask(questions, contexts, batch_size=3, prefixes=prefixes)
    for prediction, question, context, n in zip(together, questions, contexts, prefixes, strict=True):
        alone = QuestionAnswerer.from_pretrained(paths[n], precision="fp32").ask([question], [context])[0]
        assert [(a.text, a.start, a.end) for a in prediction.answers] == [(a.text, a.start, a.end) for a in alone.answers]
        assert [a.logit for a in prediction.answers] == pytest.approx([a.logit for a in alone.answers], abs=1e-4)
        assert any(a.text == "" for a in prediction.answers) == (n >= 3)  # only these may decline


def test_the_first_prefix_answers_where_none_is_named(tiny_bert, tmp_path):
    answerer = QuestionAnswerer.from_pretrained(save(make_models(tiny_bert), tmp_path), precision="fp32")
    asked = ["Who tends the lamp?"], [CONTEXT]
    assert answerer(asked[0][0], CONTEXT)[0] == answerer.ask(*asked, prefixes=[0])[0].best != answerer.ask(*asked, prefixes=[1])[0].best


@pytest.mark.parametrize("prefixes", [[6], [-1], [0, 1], []])
def test_a_prefix_that_does_not_exist_has_its_sentence(prefixes, tiny_bert):
    answerer = QuestionAnswerer(PrefixBank(make_models(tiny_bert)), WINDOWS)
    with pytest.raises(InputError, match="prefixes must name one of 0 to 5 for each of the 1 questions"):
        answerer.ask(["Who?"], [CONTEXT], prefixes=prefixes)


def test_a_single_model_has_no_prefixes_to_choose(tiny_bert):
    with pytest.raises(InputError, match="prefixes are for a bank"):
        QuestionAnswerer(make_models(tiny_bert)[0], WINDOWS).ask(["Who?"], [CONTEXT], prefixes=[0])


def test_models_that_do_not_go_together_are_refused(tiny_bert, tiny_roberta, tmp_path):
    with pytest.raises(InputError, match="at least one model"):
        PrefixBank([])
    with pytest.raises(InputError, match="stand on different backbones"):
        PrefixBank([*make_models(tiny_bert, ("long",)), *make_models(tiny_roberta, ("long",))])
    lora = build_model("lora", str(tiny_bert), lora_rank=2)
    with pytest.raises(InputError, match="A lora model cannot share its backbone"):
        PrefixBank([lora])
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(InputError, match="lora holds a lora model; a bank holds p-tuning-v2 and head-only"):
        PrefixBank.from_pretrained([tmp_path / "lora"])
    longer = save(make_models(tiny_bert, ("long",)), tmp_path / "longer", max_answer_length=9)
    with pytest.raises(InputError, match="other window or answer lengths"):
        QuestionAnswerer.from_pretrained(save(make_models(tiny_bert, ("long",)), tmp_path) + longer)
    other = save(make_models(tiny_roberta, ("long",)), tmp_path / "other")
    with pytest.raises(InputError, match="was trained on a backbone with sha256"):
        PrefixBank.from_pretrained([tmp_path / "0", *other])
