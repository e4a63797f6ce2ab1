"""The embedded corpus: its size, its spans, the split by article, and how far its questions are from a mere search for words."""

import json
import re
from collections import Counter

from ptv2.squad import CORPUS, load_examples

DATA = {split: json.loads((CORPUS / f"{split}.json").read_text(encoding="utf-8"))["data"] for split in ("train", "dev")}
ARTICLES = [article for split in DATA.values() for article in split]
PARAGRAPHS = [paragraph for article in ARTICLES for paragraph in article["paragraphs"]]
QUESTIONS = [(paragraph["context"], entry) for paragraph in PARAGRAPHS for entry in paragraph["qas"]]
ANSWERABLE = [(context, entry) for context, entry in QUESTIONS if not entry["is_impossible"]]
IMPOSSIBLE = [(context, entry) for context, entry in QUESTIONS if entry["is_impossible"]]


def test_the_corpus_is_as_large_as_promised():
    assert len(ARTICLES) >= 60
    assert len(PARAGRAPHS) >= 150
    assert len(QUESTIONS) >= 900
    assert len(IMPOSSIBLE) >= 180
    assert all(5 <= len(paragraph["qas"]) <= 7 for paragraph in PARAGRAPHS)


def test_both_splits_hold_answerable_and_unanswerable_questions_in_like_shares():
    for split in ("train", "dev"):
        examples = load_examples("embedded", split)
        assert 0.2 < sum(example.is_impossible for example in examples) / len(examples) < 0.3


def test_paragraphs_are_clean_text_of_80_to_150_words():
    for context in (paragraph["context"] for paragraph in PARAGRAPHS):
        assert 80 <= len(context.split()) <= 150, context
        assert context == " ".join(context.split()) and context[-1] in ".”", context
        assert not re.search(r"[\x00-\x1f<>{}\[\]\\|_\"]| [,.;:!?]|\.\.|,,", context), context
        assert context.count("“") == context.count("”") and context.count("(") == context.count(")"), context


def test_every_answer_is_an_exact_span_that_cuts_no_word():
    for context, entry in QUESTIONS:
        for span in entry["answers"] + entry.get("plausible_answers", []):
            text, start = span["text"], span["answer_start"]
            end = start + len(text)
            assert context[start:end] == text == text.strip(), entry
            assert 1 <= len(text.split()) <= 15, entry
            for inner, outer in ((context[start], context[start - 1 : start]), (context[end - 1], context[end : end + 1])):
                assert not (inner.isalnum() and outer.isalnum()), entry


def test_accepted_answers_differ():
    for _, entry in ANSWERABLE:
        spans = [(span["answer_start"], span["answer_start"] + len(span["text"])) for span in entry["answers"]]
        assert 1 <= len(spans) == len(set(spans)) <= 3, entry
    assert sum(len(entry["answers"]) > 1 for _, entry in ANSWERABLE) >= len(ANSWERABLE) / 3


def test_unanswerable_questions_have_a_plausible_answer_and_no_other():
    for _, entry in IMPOSSIBLE:
        assert entry["answers"] == [] and len(entry["plausible_answers"]) == 1, entry
    assert not any("plausible_answers" in entry for _, entry in ANSWERABLE)


def test_ids_and_questions_are_used_once():
    for key in ("id", "question"):
        counts = Counter(" ".join(re.findall(r"\w+", entry[key].lower())) for _, entry in QUESTIONS)
        assert [text for text, count in counts.items() if count > 1] == []


def runs_of_eight_words(articles: list[dict]) -> set[str]:
    texts = [paragraph["context"].lower().split() for article in articles for paragraph in article["paragraphs"]]
    return {" ".join(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}


def test_no_article_or_text_is_in_both_splits():
    titles = Counter(article["title"] for article in ARTICLES)
    contexts = Counter(paragraph["context"] for paragraph in PARAGRAPHS)
    assert max(titles.values()) == max(contexts.values()) == 1
    assert not runs_of_eight_words(DATA["train"]) & runs_of_eight_words(DATA["dev"])


def test_questions_are_sentences_with_varied_first_words():
    first = Counter()
    for _, entry in QUESTIONS:
        question = entry["question"]
        assert question[0].isupper() and question[-1] == "?" and question == " ".join(question.split()), question
        assert 4 <= len(question.split()) <= 25, question
        first[question.split()[0].lower()] += 1
    assert max(first.values()) < 0.45 * len(QUESTIONS)
    for word in ("what", "which", "who", "when", "where", "why", "how"):
        assert first[word] >= 0.02 * len(QUESTIONS), word


def test_no_first_word_gives_unanswerable_questions_away():
    asked, impossible = Counter(), Counter()
    for _, entry in QUESTIONS:
        word = entry["question"].split()[0].lower()
        asked[word] += 1
        impossible[word] += entry["is_impossible"]
    assert all(impossible[word] < 0.67 * count for word, count in asked.items() if count >= 40)


# Questions must not be findable by looking for the sentence that shares their words.

STOP_WORDS = re.findall(
    r"\w+",
    """
    a about after all also an and any are as at be been before being between but by can could did do does done during each for
    from had has have he her him his how i if in into is it its many may might more most much must no not of off on one only or
    other our out over own same shall she should so some such than that the their them then there these they this those through to
    too two under up very was we were what when where which who whom whose why will with would you your
    """,
)
ENDINGS = ("ations", "ation", "ings", "ing", "edly", "ies", "ied", "ed", "es", "ly", "s", "e")


def content_words(text: str) -> set[str]:
    """Stems of all words but the commonest: an ending goes where at least three letters stay."""
    words = [word for word in re.findall(r"[\w']+", text.lower()) if word not in STOP_WORDS]
    return {next((w.removesuffix(e) for e in ENDINGS if w.endswith(e) and len(w) - len(e) >= 3), w) for w in words}


def sentence_at(context: str, place: int) -> str:
    ends = [match.end() for match in re.finditer(r"[.!?][”’)]?\s+(?=[A-Z0-9“])", context)]
    start = max((end for end in ends if end <= place), default=0)
    return context[start : min((end for end in ends if end > place), default=len(context))]


def repetition(context: str, entry: dict) -> float:
    """The share of the question's content words that stand in the sentence of its first answer."""
    words = content_words(entry["question"])
    return len(words & content_words(sentence_at(context, entry["answers"][0]["answer_start"]))) / len(words)


def test_repetition_is_measured_as_meant():
    context = "The oldest mills stood in Sistan. Their sails turned around an upright shaft."
    asked = {"question": "Around what did the sails of old mills turn?", "answers": [{"answer_start": context.index("upright")}]}
    assert content_words(asked["question"]) == {"around", "sail", "old", "mill", "turn"}
    assert sentence_at(context, 5) == "The oldest mills stood in Sistan. "
    assert repetition(context, asked) == 3 / 5


def test_questions_do_not_repeat_the_sentence_that_answers_them():
    shares = sorted(repetition(context, entry) for context, entry in ANSWERABLE)
    assert sum(share >= 0.6 for share in shares) <= 0.05 * len(shares)
    assert shares[len(shares) // 2] < 0.35
