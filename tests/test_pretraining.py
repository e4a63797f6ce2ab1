"""Questions made from plain text: exact spans, no answer in its question, the same ones twice; where texts come from; runs on them."""

import json
import random
import re
import shlex

import pytest
from conftest import DATA, REAL_SOURCES

from ptv2 import cli, pretraining, records, training
from ptv2.errors import InputError
from ptv2.features import WindowConfig
from ptv2.model import DESCRIPTION_FILE
from ptv2.phrases import MAX_ANSWER_WORDS, phrases_by_kind, recurring_phrases, sentences
from ptv2.prefix import PrefixConfig
from ptv2.pretraining import OBJECTIVES, PretrainingConfig, make_questions
from ptv2.squad import examples_sha256, load_examples
from ptv2.texts import PASSAGE_CHARACTERS, Text, load_texts, passages
from ptv2.training import RUN_FILE, QATrainer, TrainingConfig, read_questions, train

STORY = (
    "Henry Smith built the stone harbour of Whitby in 1837. Fishermen landed 1,200 tons of herring there every summer. "
    "The council paid Henry Smith with copper, since silver was scarce in the north. Later the stone harbour silted up, and "
    "the herring boats moved to Hull."
)


def words_of(text: str) -> list[str]:
    return [word.lower for sentence in sentences(text) for word in sentence.words]


def content_words(text: str) -> set[str]:
    return {word.lower for sentence in sentences(text) for word in sentence.words if not word.is_stop}


@pytest.mark.parametrize("source", REAL_SOURCES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_made_questions_hold_for_real_texts(source, objective):
    texts = load_texts((source,))[:150]
    contexts = {text.context for text in texts}
    made = make_questions(texts, PretrainingConfig(objective, questions_per_text=4))
    assert len(made) > len(texts) / 2
    for example in made:
        asked = content_words(f"a {example.question}")
        assert len(asked) >= pretraining.MIN_CLUES and re.fullmatch(r"[^a-z\n].*\?", example.question)
        for span in example.answers:
            assert example.context[span.start : span.end] == span.text
            around = example.context[: span.start][-1:] + example.context[span.end :][:1]
            assert not re.search(r"\w", around), (span, example.context)  # whole words
            answer = content_words(f"a {span.text}")  # "US" within a sentence is no "us"
            assert answer and not answer & asked, example
            assert len(words_of(span.text)) <= MAX_ANSWER_WORDS
        assert len(words_of(example.question)) <= pretraining.MAX_QUESTION_WORDS + 4  # the cue beside the clause
        if objective == "cloze":
            assert example.context in contexts and len(example.answers) == 1
    shuffled = random.Random(0).sample(texts, len(texts))
    again = make_questions(shuffled, PretrainingConfig(objective, questions_per_text=4))
    assert examples_sha256(sorted(again, key=lambda e: e.id)) == examples_sha256(sorted(made, key=lambda e: e.id))


def test_the_sentence_asked_by_a_recurring_span_is_taken_out_of_the_text():
    made = pretraining.recurring(STORY, random.Random(0))
    assert {question.spans[0].text for question in made} >= {"Henry Smith", "stone harbour"}
    for question in made:
        (taken,) = [s for s in sentences(STORY) if STORY[: s.start] + STORY[s.end :] == question.context]
        start, end = sorted(words_of(STORY[taken.start : taken.end])), words_of(question.question)
        assert len(set(end) & set(start)) >= pretraining.MIN_CLUES  # it is that sentence which is asked
        answer = question.spans[0].text
        assert STORY[taken.start : taken.end].count(answer) == 1 and answer not in question.question
        assert len(question.spans) == question.context.count(answer)


def test_the_occurrence_to_learn_is_the_one_whose_sentence_shares_most_with_the_question():
    text = (
        "Miners of the valley sold copper to traders. Gold was found near the river. "
        "The council of the town paid traders with copper each year. In winter the council and town paid guards with copper, too."
    )
    shared = {}
    for seed in range(20):
        for question in pretraining.recurring(text, random.Random(seed)):
            if question.spans[0].text == "copper":
                place = question.spans[0].start
                learned = next(s for s in sentences(question.context) if s.start <= place < s.end)
                shared[question.question.split()[0]] = question.context[learned.start : learned.end].split()[0]
    assert shared["In"] == "The"  # rather than the first occurrence, "Miners"


def test_a_cloze_question_asks_for_a_span_of_its_clause_with_a_fitting_word():
    asked = {}
    for seed in range(60):
        for question in pretraining.cloze(STORY, random.Random(seed)):
            assert question.context == STORY
            (span,) = question.spans
            asked.setdefault(span.text, set()).add(question.question.split()[0])
    assert {answer: asked[answer] for answer in ("1837", "1,200", "Henry Smith", "Whitby", "copper")} == {
        "1837": {"When"}, "1,200": {"How"}, "Henry Smith": {"Who"}, "Whitby": {"Who"}, "copper": {"What"},
    }  # fmt: skip


def test_words_are_dropped_from_cloze_questions_at_the_stated_rate(monkeypatch):
    texts = [text.context for text in load_texts(("embedded",))]

    def plain_words(dropped: float) -> int:
        monkeypatch.setattr(pretraining, "DROPPED", dropped)
        made = [question for text in texts for question in pretraining.cloze(text, random.Random(text))]
        return sum(len(words_of(question.question)) for question in made) / len(made)

    whole, usual = plain_words(0.0), plain_words(0.1)
    assert 0.85 < usual / whole < 0.97  # names and numbers stay


def test_mixed_takes_both_in_turn():
    text = load_texts(("embedded",))[0].context
    first, second = pretraining.recurring(text, random.Random(text)), pretraining.mixed(text, random.Random(text))
    assert first and second[0] == first[0]
    assert second[1].context == text and len(second) > 2 * len(first)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Dr. Ada King met J. S. Mill in the U.S. Senate. They ate 3.5 kg of fish.", 2),
        ('He said "stop!" and left. "Why?" She did not know.', 3),
        ("A heading\n\nA paragraph goes on. e.g. here it stays.", 2),
        ("no end", 1),
        ("", 0),
    ],
)
def test_sentences_cover_the_text_and_end_where_they_should(text, found):
    cut = sentences(text)
    assert len(cut) == found
    assert "".join(text[s.start : s.end] for s in cut) == text
    for sentence in cut:
        for word in sentence.words:
            assert text[word.start : word.end] == word.text and sentence.start <= word.start < word.end <= sentence.end


def test_phrases_are_whole_names_numbers_and_noun_phrases():
    (sentence,) = sentences("In 1837 the University of York's old printing house sold 12 million copies to Anna Lee in New York City.")
    found = {" ".join(word.text for word in phrase.words): phrase.kind for phrase in phrases_by_kind(sentence, set())}
    assert found == {"1837": "date", "12 million": "number", "Anna Lee": "name", "New York City": "name", "University of York": "name"}


def test_recurring_phrases_are_the_longest_and_no_stop_words_alone():
    found = {" ".join(word.text for word in group[0].words): len(group) for group in recurring_phrases(STORY)}
    assert found == {"Henry Smith": 2, "stone harbour": 2}  # "herring boats" is another phrase than "herring"
    assert not recurring_phrases("It was there, and they were with it. And it was with them, as they were there.")


def test_texts_come_from_files_folders_contexts_and_data_sets(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "Été in Nice.\r\nIt was hot.".encode())
    (tmp_path / "more" / "b.txt").write_text("One. " * 1000, encoding="utf-8")
    (tmp_path / "more" / "c.md").write_text("No text file.", encoding="utf-8")
    assert load_texts((str(tmp_path / "a.txt"),)) == [Text("a.txt", "Été in Nice.\nIt was hot.")]
    found = load_texts((str(tmp_path),))
    assert {text.title for text in found} == {"a.txt", "b.txt"}
    assert all(len(text.context) <= PASSAGE_CHARACTERS for text in found)
    contexts = [text.context for text in load_texts((str(DATA / "squad_v1.json"), str(DATA / "squad_v1.json")))]
    assert contexts == list(dict.fromkeys(example.context for example in load_examples(DATA / "squad_v1.json")))
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("Some text.", "", " = Head = ")), encoding="utf-8"
    )
    assert [text.context for text in load_texts((str(hub),))] == ["Some text.", "= Head ="]
    drawn = load_texts(("embedded",), max_texts=7)
    assert len(drawn) == 7 and drawn == load_texts(("embedded",), max_texts=7) and drawn != load_texts(("embedded",))[:7]


def test_a_long_text_is_cut_between_sentences_and_nothing_is_lost():
    text = " ".join(f"Sentence number {i} tells of the town." for i in range(200))
    cut = passages(text)
    assert " ".join(cut) == text and len(cut) > 4
    assert all(len(piece) <= PASSAGE_CHARACTERS and piece.startswith("Sentence") and piece.endswith("town.") for piece in cut)


def test_what_is_no_text_has_its_sentence(tmp_path):
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "plain.txt").write_text("It is. So it was.")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"words": "a"}\n')
    for name, said in (
        ("latin.txt", "latin.txt is not UTF-8 text"), ("empty.txt", "empty.txt holds no text"), ("none", "is no file, and as a data set"),
        ("hub", "hub has the columns words, but neither text nor context"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            load_texts((str(tmp_path / name),))
    with pytest.raises(InputError, match='1 texts, by the objective "recurring", holds no questions'):
        make_questions(load_texts((str(tmp_path / "plain.txt"),)), PretrainingConfig("recurring"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "gaps"}, 'objective is "gaps"; choose one of recurring, cloze, mixed'),
        ({"questions_per_text": 0}, "questions_per_text is 0; it must be at least 1"),
        ({"max_texts": -1}, "max_texts is -1; it must be 0 or more"),
    ],
)
def test_a_value_out_of_range_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        PretrainingConfig(**changes)


@pytest.fixture
def make_config(tiny_bert):
    def make(**changes) -> TrainingConfig:
        usual = {
            "backbone": str(tiny_bert), "max_steps": 8, "batch_size": 4, "evaluations": 2, "precision": "fp32", "held_out": 0.02,
            "max_train_questions": 32, "prefix": PrefixConfig(prefix_length=3), "windows": WindowConfig(512, 64, 32),
            "pretraining": PretrainingConfig(questions_per_text=2),
        }  # fmt: skip
        return TrainingConfig(**{**usual, **changes})

    return make


def test_texts_are_held_out_whole(make_config):
    read = read_questions(make_config(max_train_questions=0))
    titles = {name: {example.title for example in part} for name, part in read.items()}
    assert titles["held_out"] and not titles["held_out"] & titles["train"]
    assert not {example.context for example in read["held_out"]} & {example.context for example in read["train"]}


def test_a_pretraining_run_is_recorded_repeated_and_gone_on_with_and_starts_another(make_config, tmp_path, capsys, monkeypatch):
    config = make_config()
    record = train(config, tmp_path / "one", cli.command_line(config, tmp_path / "one"))
    assert record["config"]["pretraining"] == {"objective": "mixed", "questions_per_text": 2, "max_texts": 0}
    assert record["data"]["train"]["questions"] == 32
    assert record["command"].startswith("ptv2 pretrain ") and "--objective mixed --questions-per-text 2" in record["command"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QATrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, tmp_path / "two", "")
    words = shlex.split(record["command"])[1:-1]
    assert cli.main([*words, str(tmp_path / "two")]) == 0
    capsys.readouterr()
    again = records.read_json(tmp_path / "two" / RUN_FILE)
    assert again["data"] == record["data"] and again["metrics"] == record["metrics"]
    (mine,), (theirs,) = ((tmp_path / run).glob("*.safetensors") for run in ("one", "two"))
    assert mine.read_bytes() == theirs.read_bytes()
    with pytest.raises(InputError, match=r"holds a run with pretraining = .*; choose another output directory"):
        train(make_config(pretraining=PretrainingConfig("cloze")), tmp_path / "one", "")

    labelled = make_config(
        pretraining=None, prefix=PrefixConfig(prefix_length=3, init=str(tmp_path / "one")), max_train_questions=0,
        train_data=(str(DATA / "squad_v1.json"),), eval_data=str(DATA / "squad_v1.json"),
    )  # fmt: skip
    tuned = train(labelled, tmp_path / "tuned", cli.command_line(labelled, tmp_path / "tuned"))
    assert tuned["init"]["name"] == str(tmp_path / "one") and tuned["config"]["pretraining"] is None
    assert tuned["command"].startswith("ptv2 train ")
    assert str(tmp_path) not in (tmp_path / "tuned" / DESCRIPTION_FILE).read_text(encoding="utf-8")


def test_show_prints_questions_and_stops(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "train", lambda *_: pytest.fail("it trained"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "--objective", "recurring", "--show", "5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown) == 5 and not any(tmp_path.iterdir())
    assert all(one["context"][a["start"] :].startswith(a["text"]) for one in shown for a in one["answers"])
    assert shown[0]["id"] in {example.id for example in training.read_questions(cli.config_from(_options("recurring")))["train"]}
    for words, said in ((["--show", "0"], "--show is 0; it must be at least 1"), ([], "Give --output-dir")):
        assert cli.main(["pretrain", *words]) == 2
        assert said in capsys.readouterr().err


def _options(objective: str):
    return cli._parser().parse_args(["pretrain", "--objective", objective])
