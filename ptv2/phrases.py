"""Sentences and words of a plain English text, and the phrases in them that may be answers, found by their surroundings.

A trained tagger would find them better; it would also bring labels into what is meant to do without.
"""

import calendar
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

MAX_ANSWER_WORDS = 5

PLACE = {"in", "at", "near", "through", "across", "into", "outside", "throughout", "towards"}
ARTICLE = {"a", "an", "the"}
POSSESSIVE = {"'s", "’s"}
BEFORE_NOUN = PLACE | ARTICLE | {"of", "on", "by", "with", "for", "from", "their", "its", "his", "her", "this", "these", "between"}
_INSIDE_NAME = {"of", "de", "la", "von", "van", "der", "del", "di", "da"}
_MONTHS = set(calendar.month_name[1:])
_MAGNITUDE = {"hundred", "thousand", "million", "billion", "trillion", "percent"}
_OF_A_PEOPLE = ("ish", "ese", "ian", "ean", "ican")
_YEAR = re.compile(r"1[0-9]{3}s?|20[0-9]{2}s?")
_WORD = re.compile(r"(?:[^\W\d_]\.){2,}(?!\w)|\d+(?:[.,]\d+)*(?:st|nd|rd|th|s)?(?![\w])|['’]s\b|\w+(?:[-–/'’](?!s\b)\w+)*")
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s+["'“‘(\[]*([^\W_]))|\n\s*\n""")
_ABBREVIATION = re.compile(r"(?:\b[^\W\d_]|\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Gen|Col|Capt|Lt|Sgt|Jr|Sr|No|vs|ca|cf|al|approx|e\.g|i\.e))$")
_STOP_WORDS = """
    's a about above across after again against ago all almost alone along already also although always am among an and another any
    anyone anything are around as at away back be became because become becomes been before began begin begins behind being below beside
    besides between beyond both but by called came can cannot come comes could despite did different do does done down due during each
    early eight either else enough especially etc even ever every except far few first five for form former forms found four from full
    further gave get gets give given gives go goes good got great had has have he held hence her here hers herself high him himself his
    how however i if in include includes including indeed inside instead into is it its itself just kept knew known large largely last
    late later least led left less like likely little long low made main mainly make makes making many may me might more most mostly
    much must my near nearly neither never new next nine no nobody none nor not nothing now of off often old on once one ones only onto
    or other others our out outside over own part per perhaps put quite rather really right s said same saw say says second see seem
    seemed seems seen set seven several shall she should show shown shows since six small so some someone something sometimes soon still
    such t take taken takes ten than that the their them then there therefore these they thing things third this those though three
    through throughout thus time times to today together told too took toward towards two under until up upon upwards us use used uses
    using usually various very via was way ways we well went were what whatever when whenever where wherever whether which whichever
    while who whole whom whose why will with within without would yet you your yours ’s
"""
_STOP = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, eq=False)  # a place, so equal to itself alone
class Word:
    """A word of a text at [start, end); `breaks` says that punctuation stands before it, `opens_sentence` that it is the first."""

    text: str
    start: int
    breaks: bool
    opens_sentence: bool

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def is_stop(self) -> bool:
        """Too common to say what a sentence is about; "New" within one is a part of a name."""
        return self.lower in _STOP and (self.opens_sentence or not self.is_capital or self.text == "I")

    @property
    def is_number(self) -> bool:
        return self.text[0].isdigit()

    @property
    def is_capital(self) -> bool:
        return self.text[0].isupper()

    @property
    def looks_verbal(self) -> bool:
        """A participle, a past form or an adverb, by its ending."""
        return not self.is_capital and len(self.text) > 4 and self.text.endswith(("ed", "ing", "ly"))


@dataclass(frozen=True, eq=False)
class Sentence:
    """The characters [start, end) of a text, white space after it included, and the words there."""

    start: int
    end: int
    words: tuple[Word, ...]


def sentences(text: str) -> list[Sentence]:
    """All of a text, cut behind full stops, question and exclamation marks that end a sentence, and at empty lines."""
    ends = []
    for match in _SENTENCE_END.finditer(text):
        follows = match.group(1)
        is_abbreviation = match.group().startswith(".") and _ABBREVIATION.search(text, max(0, match.start() - 8), match.start())
        if follows is None or ((follows.isupper() or follows.isdigit()) and not is_abbreviation):
            ends.append(match.end() + len(re.match(r"\s*", text[match.end() :]).group()))
    starts = [0, *ends]
    cut = [(start, end) for start, end in zip(starts, [*ends, len(text)], strict=True) if text[start:end].strip()]
    return [Sentence(start, end, _words(text, start, end)) for start, end in cut]


def _words(text: str, start: int, end: int) -> tuple[Word, ...]:
    words, before = [], start
    for match in _WORD.finditer(text, start, end):
        breaks = bool(text[before : match.start()].strip())
        words.append(Word(match.group(), match.start(), breaks, not words))
        before = match.end()
    return tuple(words)


@dataclass(frozen=True, eq=False)
class Phrase:
    """Neighbouring words of a sentence that may be an answer: words[first:last]; kind is name, number, date or phrase."""

    sentence: Sentence
    first: int
    last: int
    kind: str

    @property
    def words(self) -> tuple[Word, ...]:
        return self.sentence.words[self.first : self.last]

    @property
    def start(self) -> int:
        return self.words[0].start

    @property
    def end(self) -> int:
        return self.words[-1].end

    @property
    def before(self) -> str:
        """The word before it, lower case; empty where punctuation or nothing is there."""
        return self.sentence.words[self.first - 1].lower if self.first and not self.words[0].breaks else ""

    @property
    def after(self) -> Word | None:
        """The word after it; None where punctuation or nothing is there."""
        word = self.sentence.words[self.last] if self.last < len(self.sentence.words) else None
        return None if word is None or word.breaks else word

    @property
    def is_whole(self) -> bool:
        """Whether it is no part of a longer name or noun phrase, as far as its neighbours tell."""
        before, after = self.sentence.words[self.first - 1] if self.before else None, self.after
        if before is not None and (self.before in POSSESSIVE or (before.is_capital and not before.is_stop)):
            return False
        if self.kind == "phrase" and self.before == "in" and len(self.words) == 1:
            return False  # "in turn", "in addition"
        if self.kind in ("number", "date") or after is None or after.is_stop or after.looks_verbal:
            return True
        return self.kind == "name" and not after.is_capital and not self.words[-1].text.endswith(_OF_A_PEOPLE)


def recurring_phrases(text: str) -> list[list[Phrase]]:
    """Whole phrases that stand in more than one sentence, grouped by their words; longer ones claim their places first."""
    found = sentences(text)
    mid_sentence = {word.text for sentence in found for word in sentence.words[1:]}
    places: dict[tuple[str, ...], list[Phrase]] = defaultdict(list)
    for sentence in found:
        for phrase in _all_phrases(sentence):
            first, *others = phrase.words
            plain = first.opens_sentence and first.lower in mid_sentence
            places[(first.lower if plain else first.text, *(word.text for word in others))].append(phrase)
    groups, claimed = [], set()
    for key in sorted(places, key=len, reverse=True):
        free = [phrase for phrase in places[key] if not claimed.intersection(phrase.words)]
        if len({phrase.sentence for phrase in free}) < 2:
            continue
        claimed.update(word for phrase in free for word in phrase.words)
        whole = [phrase for phrase in free if phrase.is_whole]
        if len({phrase.sentence for phrase in whole}) > 1:
            groups.append(whole)
    return groups


def _all_phrases(sentence: Sentence) -> Iterator[Phrase]:
    """All runs of words that may answer, without punctuation in them."""
    words = sentence.words
    for first, word in enumerate(words):
        if word.is_stop:
            continue
        for last in range(first + 1, min(first + MAX_ANSWER_WORDS, len(words)) + 1):
            if last > first + 1 and words[last - 1].breaks:
                break
            if _may_answer(words[first:last]):
                yield Phrase(sentence, first, last, _kind(words[first:last]))


def phrases_by_kind(sentence: Sentence, mid_sentence: set[str]) -> list[Phrase]:
    """Names, numbers, dates and noun phrases of a sentence, none inside another.

    Args:
        mid_sentence: words as they stand within sentences, to tell a name at the beginning from any other word.
    """
    phrases, first, words = [], 0, sentence.words
    while first < len(words):
        last = _end_of_phrase(words, first, mid_sentence)
        if last > first:
            phrase = Phrase(sentence, first, last, _kind(words[first:last]))
            if _may_answer(phrase.words) and phrase.is_whole:
                phrases.append(phrase)
        first = max(first + 1, last)
    return phrases


def _end_of_phrase(words: tuple[Word, ...], first: int, mid_sentence: set[str]) -> int:
    """Where the phrase that begins with words[first] ends; `first` if none begins there."""
    word, others = words[first], list(itertools.takewhile(lambda other: not other.breaks, words[first + 1 :]))
    if word.is_number or word.text in _MONTHS:
        more = itertools.takewhile(lambda w: w.is_number or w.text in _MONTHS or w.lower in _MAGNITUDE, others)
        return first + 1 + len(list(more))
    if word.is_capital and not word.is_stop and (first or word.text in mid_sentence or (others and others[0].is_capital)):
        last = first + 1
        while others[last - first - 1 :]:
            ahead = others[last - first - 1 :]
            if ahead[0].is_capital:
                last += 1
            elif ahead[0].lower in _INSIDE_NAME and len(ahead) > 1 and ahead[1].is_capital:
                last += 2
            else:
                break
        return last
    if first and words[first - 1].lower in BEFORE_NOUN and not (word.breaks or word.is_stop or word.looks_verbal):
        more = itertools.takewhile(lambda w: not (w.is_stop or w.is_number or w.looks_verbal), others)
        return first + 1 + len(list(more))
    return first


def _may_answer(words: tuple[Word, ...]) -> bool:
    """Not too many words, no stop word, verb form or adverb at either end, and no short plain word alone."""
    if len(words) > MAX_ANSWER_WORDS or any(word.is_stop or word.looks_verbal for word in (words[0], words[-1])):
        return False
    return len(words) > 1 or len(words[0].text) > (1 if words[0].is_capital or words[0].is_number else 3)


def _kind(words: tuple[Word, ...]) -> str:
    if any(_YEAR.fullmatch(word.lower) for word in words) or any(word.text in _MONTHS for word in words):
        return "date"
    if words[0].is_number:
        return "number"
    return "name" if any(word.is_capital for word in words[words[0].opens_sentence :]) else "phrase"
