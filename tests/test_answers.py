"""Answers: exact n-best spans over windows, "no answer", text to the character, and what people can get wrong."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from ptv2.answers import MAX_CONTEXT_CHARACTERS, MAX_QUESTION_CHARACTERS, AnswerConfig, QuestionAnswerer, best_spans, predict
from ptv2.errors import InputError
from ptv2.features import WindowConfig, make_features
from ptv2.methods import build_model
from ptv2.model import DESCRIPTION_FILE
from ptv2.prefix import PrefixConfig
from ptv2.squad import Example, load_examples

WINDOWS = WindowConfig(max_length=64, stride=16, max_question_length=16)
LONG_TEXT = "\n".join(dict.fromkeys(example.context for example in load_examples("embedded", "dev")[:30]))


@pytest.fixture(scope="module")
def model(tiny_bert):
    """An untrained prefix model with a head large enough that logits differ clearly."""
    made = build_model("p-tuning-v2", str(tiny_bert), PrefixConfig(prefix_length=3), precision="fp32", seed=1)
    with torch.no_grad():
        made.qa_outputs.weight.mul_(30)
    return made


@pytest.fixture
def make_answerer(model):
    def make(windows: WindowConfig = WINDOWS, **answers) -> QuestionAnswerer:
        return QuestionAnswerer(model, windows, AnswerConfig(**answers))

    return make


@pytest.fixture(params=["tiny_bert", "tiny_roberta"])
def any_answerer(request) -> QuestionAnswerer:
    """WordPiece drops and folds characters, byte-level BPE cuts within them."""
    backbone = request.getfixturevalue(request.param)
    return QuestionAnswerer(build_model("head-only", str(backbone), precision="fp32"), WINDOWS)


@pytest.mark.parametrize("S, longest, n_best", [(1, 1, 1), (7, 1, 3), (12, 4, 20), (12, 12, 5), (9, 30, 200), (30, 7, 20)])
def test_best_spans_are_those_of_a_search_over_all_pairs(S, longest, n_best):
    generator = torch.Generator().manual_seed(S * longest)
    start, end = torch.randn(6, S, generator=generator), torch.randn(6, S, generator=generator)
    is_context = torch.rand(6, S, generator=generator) < 0.7
    is_context[0], is_context[1] = True, False  # all of a window, and nothing
    logits, first, last = best_spans(start, end, is_context, AnswerConfig(max_answer_length=longest, n_best=n_best))
    for b in range(6):
        allowed = [
            (float(start[b, i] + end[b, j]), i, j)
            for i, j in itertools.product(range(S), repeat=2)
            if i <= j < i + longest and is_context[b, i] and is_context[b, j]
        ]
        real = torch.isfinite(logits[b])
        found = list(zip(logits[b][real].tolist(), first[b][real].tolist(), last[b][real].tolist(), strict=True))
        assert found == sorted(allowed, reverse=True)[:n_best]


def spans_by_hand(answerer: QuestionAnswerer, question: str, context: str) -> tuple[dict[tuple[int, int], float], float]:
    """Every allowed span of every window with its best logit, and the least "no answer" logit, by plain loops."""
    features = make_features([Example("0", "", question, context, ())], answerer.tokenizer, answerer.windows, cache=False)
    spans, null = {}, math.inf
    for row in features:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            output = answerer.model(**inputs)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        null = min(null, start[0] + end[0])
        inside = [i for i, at in enumerate(row["context_start"]) if at >= 0]
        for i, j in itertools.product(inside, repeat=2):
            if i <= j < i + answerer.answers.max_answer_length:
                place = row["context_start"][i], row["context_end"][j]
                spans[place] = max(spans.get(place, -math.inf), start[i] + end[j])
    assert len(features) > 5
    return spans, null


def test_answers_over_many_windows_are_the_best_of_all_without_duplicates(make_answerer):
    # So many answers of so few windows that spans in an overlap are found twice.
    answerer = make_answerer(WindowConfig(max_length=64, stride=30, max_question_length=16), n_best=400)
    prediction = answerer.ask(["What is told here?"], [LONG_TEXT[:1000]])[0]
    spans, null = spans_by_hand(answerer, "What is told here?", LONG_TEXT[:1000])
    expected = sorted(spans.items(), key=lambda item: -item[1])[:400]
    places = [(answer.start, answer.end) for answer in prediction.answers]
    assert len(set(places)) == 400 and set(places) == {place for place, _ in expected}
    assert [answer.logit for answer in prediction.answers] == pytest.approx([logit for _, logit in expected], abs=1e-4)
    assert prediction.no_answer_odds == pytest.approx(null - expected[0][1], abs=1e-4)


TEXTS = {
    "accents": "Le café d'Ève coûte 3 €, señor Ñandú; l'œuvre naît à Łódź.",
    "emoji": "🐟 first, then 🧈! A family 👨‍👩‍👧‍👦 waved a flag 🏳️‍🌈 in 東京, thumbs up 👍🏽.",
    "right to left": "אבא הלך הביתה בשעה 7, ثم قال السلام عليكم ورحل.",
    "combining marks": "Cafe\u0301 and n\u0303andu\u0301 with a\u0308 stacked z\u0351\u036b\u0343\u036a mark.",
    "markup": "<p>Tom &amp; <b>Jerry</b></p>\n<script>alert('1 < 2')</script> & so on",
    "line ends": "One line.\r\nAnother\tline.\r\n\r\nA third one, \u00a0with\u200b odd\u2028spaces.",
    "one word": "Aalsund",
    "unknown tokens": "☃☄★ ⚀⚁⚂ \U0001f9ca\U0001f9cb",
    "control characters": "bell\x07 in\x00side\x1f the text",
}


@pytest.mark.parametrize("context", TEXTS.values(), ids=TEXTS)
def test_answers_are_the_context_to_the_character(context, any_answerer):
    answers = any_answerer("Who keeps the light?", context, top_k=20)
    assert answers
    for answer in answers:
        assert answer.text == context[answer.start : answer.end] != ""
        assert 0 <= answer.start < answer.end <= len(context)


@pytest.mark.parametrize("allow", [False, True])
def test_scores_fall_and_sum_to_one(allow, make_answerer):
    for threshold in (-30.0, -3.0, 0.0, 3.0, 30.0):
        answers = make_answerer(allow_no_answer=allow, no_answer_threshold=threshold).ask(["Who?"], [LONG_TEXT])[0].answers
        scores = [answer.score for answer in answers]
        assert sum(scores) == pytest.approx(1) and scores == sorted(scores, reverse=True)
        assert [answer.text for answer in answers].count("") == allow


def test_the_threshold_decides_between_the_best_span_and_no_answer(make_answerer):
    spans = make_answerer().ask(["Who?"], [LONG_TEXT])[0]
    odds = spans.no_answer_odds
    for threshold, declines in ((odds - 0.01, True), (odds, False), (odds + 0.01, False)):
        told = make_answerer(allow_no_answer=True, no_answer_threshold=threshold).ask(["Who?"], [LONG_TEXT])[0]
        assert (told.best.text == "") == declines
        assert told.no_answer_odds == odds
        assert told.best_span.text == spans.best.text
        (null,) = (answer for answer in told.answers if not answer.text)
        assert (null.start, null.end) == (0, 0) and null.logit == pytest.approx(odds + spans.best.logit)


def test_a_score_is_a_softmax_over_the_kept_logits(make_answerer):
    answers = make_answerer(allow_no_answer=True).ask(["Who?"], [LONG_TEXT])[0].answers
    expected = torch.tensor([answer.logit for answer in answers], dtype=torch.double).softmax(0)
    assert [answer.score for answer in answers] == pytest.approx(expected.tolist())


def test_a_text_without_a_token_has_no_answer_and_finite_odds(make_answerer):
    answer = make_answerer().ask(["Who?"], ["\x00 \x01\x02\u200b"])[0]
    assert [(a.text, a.start, a.end, a.score) for a in answer.answers] == [("", 0, 0, 1.0)]
    assert math.isfinite(answer.no_answer_odds) and answer.no_answer_odds > 1e6
    assert answer.best_span is answer.best


def test_top_k_is_the_head_of_the_list(make_answerer):
    answerer = make_answerer()
    twenty = answerer("Who?", LONG_TEXT, top_k=20)
    assert len(twenty) == 20
    assert answerer("Who?", LONG_TEXT) == twenty[:1] and answerer("Who?", LONG_TEXT, top_k=3) == twenty[:3]
    assert len(answerer("Who?", "Aalsund", top_k=500)) <= len("Aalsund") ** 2


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_in_any_order_answer_as_one_by_one(batch_size, make_answerer):
    answerer = make_answerer(WindowConfig(128, 32, 32), allow_no_answer=True)
    examples = load_examples("embedded", "dev")[:40:4]
    questions, contexts = [e.question for e in examples], [e.context for e in examples]
    alone = [answerer.ask([question], [context])[0] for question, context in zip(questions, contexts, strict=True)]
    together = answerer.ask(questions, contexts, batch_size)
    reversed_order = answerer.ask(questions[::-1], contexts[::-1], batch_size)[::-1]
    for one, other, third in zip(alone, together, reversed_order, strict=True):
        for prediction in (other, third):
            assert prediction.best.text == one.best.text
            assert [a.logit for a in prediction.answers] == pytest.approx([a.logit for a in one.answers], abs=1e-5)
            assert prediction.no_answer_odds == pytest.approx(one.no_answer_odds, abs=1e-5)


def test_examples_of_a_file_are_answered_as_questions_typed_in(make_answerer):
    answerer, examples, seen = make_answerer(), load_examples("embedded", "dev")[:6], []
    batches = answerer.predict_examples(examples, batch_size=2, progress=lambda batches: seen.append(len(batches)) or batches)
    assert batches == answerer.ask([e.question for e in examples], [e.context for e in examples], batch_size=2)
    assert seen[0] >= 3


def test_predicting_leaves_the_model_in_its_mode(model, make_answerer):
    answerer, examples = make_answerer(), load_examples("embedded", "dev")[:1]
    features = make_features(examples, answerer.tokenizer, WINDOWS, cache=False)
    for mode in (True, False):
        model.train(mode)
        predict(model, examples, features, answerer.tokenizer, [AnswerConfig()])
        assert model.training is mode


@pytest.mark.parametrize(
    "question, context, said",
    [
        ("", "A text.", "The question is empty; give it a text"),
        (" \n\t\u00a0", "A text.", "The question is empty; give it a text"),
        ("Who?", "", "The context is empty; give it a text"),
        ("Who?", "\r\n ", "The context is empty; give it a text"),
        ("Who?", None, "The context is empty; give it a text"),
        ("Who?", "x" * 10_000_000, r"The context has 10,000,000 characters; the limit is 1,000,000: shorten it"),
        ("Who?", "x" * (MAX_CONTEXT_CHARACTERS + 1), "The context has 1,000,001 characters"),
        ("w" * (MAX_QUESTION_CHARACTERS + 1), "A text.", r"The question has 10,001 characters; the limit is 10,000: shorten it"),
        ("Who\ud800?", "A text.", "The question is not Unicode text at character 3; give it as UTF-8"),
        ("Who?", "A text.\udcff", "The context is not Unicode text at character 7; give it as UTF-8"),
    ],
)  # fmt: skip
def test_an_empty_long_or_broken_text_has_its_sentence(question, context, said, make_answerer, monkeypatch):
    # Before anything is tokenised: a paste of 10 MB must not take minutes to be refused.
    monkeypatch.setattr("ptv2.answers.make_features", None)
    with pytest.raises(InputError, match=said):
        make_answerer()(question, context)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_has_its_sentence(top_k, make_answerer):
    with pytest.raises(InputError, match=f"top_k is {top_k}; it must be at least 1"):
        make_answerer()("Who?", "A text.", top_k=top_k)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"max_answer_length": 0}, "max_answer_length is 0; it must be at least 1"),
        ({"n_best": 0}, "n_best is 0; it must be at least 1"),
        ({"no_answer_threshold": math.nan}, "no_answer_threshold is nan; it must be a finite number"),
        ({"no_answer_threshold": -math.inf}, "no_answer_threshold is -inf; it must be a finite number"),
    ],
)
def test_an_answer_setting_out_of_range_has_its_sentence(changes, said):
    with pytest.raises(InputError, match=said):
        AnswerConfig(**changes)


def test_a_saved_answerer_answers_as_before(model, make_answerer, tmp_path):
    answers = AnswerConfig(max_answer_length=5, n_best=7, allow_no_answer=True, no_answer_threshold=-1.5)
    model.save_pretrained(tmp_path, windows=dataclasses.asdict(WINDOWS), answers=dataclasses.asdict(answers))
    loaded = QuestionAnswerer.from_pretrained(tmp_path, precision="fp32")
    assert (loaded.windows, loaded.answers) == (WINDOWS, answers)
    expected = make_answerer(**dataclasses.asdict(answers))("Who?", LONG_TEXT, top_k=8)
    assert loaded("Who?", LONG_TEXT, top_k=8) == expected


@pytest.mark.parametrize(
    "broken",
    [
        {"windows": {"max_length": "384"}},
        {"windows": [1, 2]},
        {"windows": {"width": 3}},
        {"answers": {"n_best": None}},
        {"answers": {"no_answer_threshold": "low"}},
        {"answers": "all"},
    ],
    ids=str,
)
def test_broken_settings_in_a_checkpoint_have_their_sentence(broken, model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / DESCRIPTION_FILE
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **broken}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{DESCRIPTION_FILE} is not a ptv2 description .*: save the checkpoint again"):
        QuestionAnswerer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, said", [(None, "holds no ptv2.json"), ("{", "is not valid JSON"), ("[]", "must hold a JSON object")])
def test_a_missing_or_broken_description_has_its_sentence(content, said, tmp_path):
    if content is not None:
        (tmp_path / DESCRIPTION_FILE).write_text(content)
    with pytest.raises(InputError, match=said):
        QuestionAnswerer.from_pretrained(tmp_path)
