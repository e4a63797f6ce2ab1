"""Questions made from plain text, so that a prefix and a head learn to select spans before they see a labelled question.

The idea is that of Gu et al., "PPT: Pre-trained Prompt Tuning for Few-shot Learning", ACL 2022
(https://aclanthology.org/2022.acl-long.576): pretrain the prompt on unlabelled text with a task of the same form, then tune it.
The objectives for extractive question answering are `recurring`, `cloze` and `mixed`. All draws are seeded by the text itself: it
gives the same questions wherever it stands. Question words, stop words and sentence ends are English.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ptv2.errors import InputError
from ptv2.phrases import ARTICLE, BEFORE_NOUN, PLACE, POSSESSIVE, Phrase, Sentence, Word, phrases_by_kind, recurring_phrases, sentences
from ptv2.squad import Example, Span, checked_examples
from ptv2.texts import Text

MIN_CLUES = 4  # content words that a question needs beside its cue
MAX_QUESTION_WORDS = 25
DROPPED = 0.1  # share of the plain words that a cloze question loses
_LINK = {"and", "or", "but", "which", "who", "that", "so", "where", "while", "because", "as"}  # a question neither begins nor ends so


@dataclass(frozen=True)
class PretrainingConfig:
    """How questions are made from text.

    Args:
        objective: recurring, cloze or mixed; `--show 5` prints examples.
        questions_per_text: at most so many from one text.
        max_texts: make them from so many of the texts, drawn at random and always the same; 0 for all.

    Raises:
        InputError: a value is out of its range.
    """

    objective: str = "mixed"
    questions_per_text: int = 5
    max_texts: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise InputError(f'objective is "{self.objective}"; choose one of {", ".join(OBJECTIVES)}.')
        if self.questions_per_text < 1:
            raise InputError(f"questions_per_text is {self.questions_per_text}; it must be at least 1.")
        if self.max_texts < 0:
            raise InputError(f"max_texts is {self.max_texts}; it must be 0 or more.")


@dataclass(frozen=True)
class Made:
    """A question, the text it is about, and where its answer stands there; the first span is the one to learn."""

    question: str
    context: str
    spans: tuple[Span, ...]


def make_questions(texts: list[Text], config: PretrainingConfig) -> list[Example]:
    """Questions of an objective about all texts, in their order, each answer checked against its text.

    Raises:
        InputError: the texts are too short or too plain for any.
    """

    def rows() -> Iterator[tuple[str, dict]]:
        seen = set()
        for text in texts:
            made = OBJECTIVES[config.objective](text.context, random.Random(text.context))
            for question in made[: config.questions_per_text]:
                key = f"{question.question}\0{question.context}"
                name = f"{config.objective}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
                if name not in seen:
                    seen.add(name)
                    answers = [{"text": span.text, "answer_start": span.start} for span in question.spans]
                    row = {"id": name, "title": text.title, "question": question.question, "context": question.context}
                    yield f"{text.title}, question {name}", {**row, "answers": answers, "is_impossible": False}

    return checked_examples(f'{len(texts)} texts, by the objective "{config.objective}",', rows())


def recurring(text: str, draw: random.Random) -> list[Made]:
    """A sentence whose recurring span gives way to a question word, about the text without that sentence, where the span recurs.

    Recurring spans are those of Ram et al., "Few-Shot Question Answering by Pretraining Span Selection" (Splinter), ACL 2021
    (https://aclanthology.org/2021.acl-long.239): word for word the same, with no stop word at either end and in no longer recurring
    span. There, a token stands for the span within the text; here, the sentence is taken out and asked, so that answering looks
    as it does later. That a question made from another sentence than the answer's is the better one for lack of common
    wording: Fabbri et al., "Template-Based Question Generation from Retrieved Sentences", ACL 2020. All other
    occurrences are right; the one whose sentence shares the most words with the question is the one to learn.
    """
    made = []
    groups = recurring_phrases(text)
    draw.shuffle(groups)
    asked: set[Sentence] = set()
    for phrases in sorted(groups, key=lambda group: group[0].kind == "phrase" and len(group[0].words) == 1):  # plain words last
        is_place = any(phrase.before in PLACE for phrase in phrases)
        for asking in draw.sample(phrases, len(phrases)):
            sentence = asking.sentence
            answers = [phrase for phrase in phrases if phrase.sentence is not sentence]
            question = _ask_in_place(text, asking, is_place)
            if not answers or sentence in asked or question is None:
                continue
            clues = _content(sentence)
            common = {phrase: len(clues & _content(phrase.sentence)) for phrase in answers}
            answers.sort(key=common.get, reverse=True)  # stable: the first in the text of equals
            cut = sentence.end - sentence.start
            spans = [Span(text[p.start : p.end], p.start - cut * (p.start >= sentence.end)) for p in answers]
            made.append(Made(question, text[: sentence.start] + text[sentence.end :], tuple(spans)))
            asked.add(sentence)
            break
    return made


def cloze(text: str, draw: random.Random) -> list[Made]:
    """A clause without one of its spans, behind a question word, about the whole text, where the clause stands with the span.

    Source: the noisy cloze questions of Lewis et al., "Unsupervised Question Answering by Cloze Translation", ACL 2019
    (https://aclanthology.org/P19-1484): the answer's kind decides the question word, and some words are dropped, so that the
    clause can't be found word for word. Names, numbers, dates and noun phrases are found by their surroundings rather than by
    a trained tagger, and the order of the words stays. At most one question is asked of a sentence.
    """
    made = []
    found = sentences(text)
    mid_sentence = {word.text for sentence in found for word in sentence.words[1:]}
    for sentence in draw.sample(found, len(found)):
        phrases = phrases_by_kind(sentence, mid_sentence)
        for phrase in draw.sample(phrases, len(phrases)):
            question = _ask_in_front(phrase, draw)
            if question is not None:
                made.append(Made(question, text, (Span(text[phrase.start : phrase.end], phrase.start),)))
                break
    return made


def mixed(text: str, draw: random.Random) -> list[Made]:
    """Questions of `recurring` and `cloze` in turn, until both are used up."""
    pairs = itertools.zip_longest(recurring(text, draw), cloze(text, draw))
    return [question for pair in pairs for question in pair if question is not None]


OBJECTIVES: dict[str, Callable[[str, random.Random], list[Made]]] = {"recurring": recurring, "cloze": cloze, "mixed": mixed}


def _question_word(phrase: Phrase, is_place: bool) -> str:
    """As Lewis et al. map an answer's kind: a person's or a group's name to who, though a name behind an article is a thing's."""
    if phrase.kind == "number":
        percent = phrase.words[-1].lower == "percent" or (phrase.after is not None and phrase.after.lower in ("percent", "per"))
        if phrase.before and not phrase.sentence.words[phrase.first - 1].is_stop and (phrase.after is None or phrase.after.is_stop):
            return "what number"  # "group 14 of"
        return "what percentage" if percent else "how many"
    if phrase.kind == "name":
        return "what" if phrase.before in ARTICLE else "where" if is_place else "who"
    return "when" if phrase.kind == "date" else "what"


def _ask_in_place(text: str, phrase: Phrase, is_place: bool) -> str | None:
    """The clause around a phrase, a question word where the phrase was; None if it says too little or gives the answer away."""
    words = phrase.sentence.words
    if phrase.kind == "phrase" and phrase.before and not words[phrase.first - 1].is_stop:
        return None  # the noun of a longer phrase
    left, right = _clause(phrase)
    first = phrase.first - (phrase.before in ARTICLE and phrase.first > left)
    cue = _question_word(phrase, is_place)
    if cue == "where":
        cue = "what place"
    elif cue == "when" and phrase.before:
        cue = "what time"  # "since what time"
    asked = f"{text[words[left].start : words[first].start]}{cue}{text[phrase.end : words[right - 1].end]}?"
    return _question(asked, (*words[left : phrase.first], *words[phrase.last : right]), phrase)


def _ask_in_front(phrase: Phrase, draw: random.Random) -> str | None:
    """A question word, then the clause without the phrase and some plain words; None as in `_ask_in_place`."""
    words = phrase.sentence.words
    left, right = _clause(phrase)
    before, after = list(words[left : phrase.first]), list(words[phrase.last : right])
    cue = _question_word(phrase, phrase.before in PLACE)
    if after and after[0].lower in POSSESSIVE:
        cue, after = "whose", after[1:]
    if before and (phrase.before in ARTICLE or cue in ("when", "where")):
        before.pop()  # the article or preposition went with the phrase
    if cue == "how many" and phrase.after is not None and after and not phrase.after.is_stop:
        cue = f"{cue} {after.pop(0).text}"  # "how many tons"
    kept = [word for word in (*before, *after) if word.is_capital or word.is_number or draw.random() >= DROPPED]
    plain = (word.lower if word.opens_sentence and word.is_stop else word.text for word in kept)
    asked = re.sub(r" (?=['’]s\b)", "", f"{cue} {' '.join(plain)}?")
    return _question(asked, tuple(kept), phrase)


def _clause(phrase: Phrase) -> tuple[int, int]:
    """The words [left, right) around a phrase up to punctuation; farther where too few clues are within, not beyond the longest."""
    words = phrase.sentence.words
    breaks = [0, *(i for i, word in enumerate(words) if word.breaks and i), len(words)]
    left, right = max(i for i in breaks if i <= phrase.first), min(i for i in breaks if i >= phrase.last)

    def clues() -> int:
        return sum(not word.is_stop for word in (*words[left : phrase.first], *words[phrase.last : right]))

    while clues() < MIN_CLUES and (left > 0 or right < len(words)):
        if left > 0:
            left = max(i for i in breaks if i < left)
        else:
            right = min(i for i in breaks if i > right)
    left, right = max(left, phrase.first - MAX_QUESTION_WORDS // 2), min(right, phrase.last + MAX_QUESTION_WORDS // 2)
    while left < phrase.first and (words[left].lower in _LINK | POSSESSIVE):
        left += 1
    while right > phrase.last and words[right - 1].lower in _LINK | BEFORE_NOUN:
        right -= 1
    return left, right


def _question(asked: str, clues: tuple[Word, ...], phrase: Phrase) -> str | None:
    """The question on one line, if it has clues enough and none of the answer's content words."""
    content = {word.lower for word in clues if not word.is_stop}
    if len(content) < MIN_CLUES or content & {word.lower for word in phrase.words if not word.is_stop}:
        return None
    asked = " ".join(asked.split())
    return asked[0].upper() + asked[1:]


def _content(sentence: Sentence) -> set[str]:
    return {word.lower for word in sentence.words if not word.is_stop}
