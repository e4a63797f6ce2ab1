"""What the page shows, as HTML. Everything that people, files or folders supply goes through `safe`."""

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from demo.checkpoints import Checkpoint

if TYPE_CHECKING:  # these need torch, which the first page does not wait for
    from demo.models import Inside, Reply
    from demo.scoring import Report

# Method -> its name, and in one sentence what it trained.
METHODS = {
    "p-tuning-v2": ("P-tuning v2", "The network stays as it was. A few trained vectors, the prefix, stand before the text in every layer."),
    "fine-tuning": ("Full fine-tuning", "Every number of the network was trained."),
    "head-only": ("Head only", "The network stays as it was. Only the last step, which picks the words, was trained."),
    "lora": ("LoRA", "The network stays as it was. Small trained matrices add to its own."),
    "prompt-tuning": (
        "Prompt tuning",
        "The network stays as it was. A few trained vectors stand before the text, at the input alone.",
    ),
    "bitfit": ("BitFit", "Only the network's bias terms were trained."),
}
# What a method adds to the network, in its picture: where, how wide, in which layers (5 is the text below them).
_ADDED = {
    "p-tuning-v2": (3, 12, range(5)),
    "prompt-tuning": (3, 12, range(5, 6)),
    "lora": (62, 6, range(5)),
    "bitfit": (56, 4, range(5)),
}
HINT = '<p class="hint">Press <strong>Ask</strong> to see what each method answers.</p>'
STOPPED = '<p class="hint" role="status">Stopped. Nothing was kept.</p>'
SCORING = (
    "<p>Upload questions with known answers, and see how often each method is right. The file must be in the "
    "<strong>SQuAD</strong> form, with at most {megabytes} MB and {characters} characters a text; up to {questions} of its questions are "
    "scored. It stays on the computer that serves this page, which deletes it after about an hour.</p>"
)
EXCERPT = 150  # characters shown on each side of an answer
MAX_ROWS = 200  # of the table of disagreements
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}  # ␀, ␁, ...
_CONTROL |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
_TEMPLATE = {ord(sign): f"&#{ord(sign)};" for sign in "{}$`"}  # the page's own template signs


def safe(text: str) -> str:
    """Any text as HTML that shows it, character for character: no markup, no template, no invisible control characters."""
    return html.escape(text.translate(_CONTROL)).translate(_TEMPLATE)


def method_title(checkpoint: Checkpoint) -> str:
    """A checkpoint's name for people: the method's, and for a run also its folder's."""
    title = METHODS.get(checkpoint.method, (checkpoint.method, ""))[0]
    return f"{title} ({checkpoint.name})" if "/" in checkpoint.name else title


def problem(sentence: str) -> str:
    """One sentence on what went wrong."""
    return f'<p class="problem" role="alert">{safe(sentence)}</p>'


def intro(checkpoints: Sequence[Checkpoint]) -> str:
    """What this page is, and how the methods differ, for someone who knows none of them."""
    methods = [method for method in dict.fromkeys(checkpoint.method for checkpoint in checkpoints) if method in METHODS]
    rows = "".join(
        f'<li class="{_css(method)}">{_picture(method)}<div><strong>{METHODS[method][0]}</strong>{METHODS[method][1]}</div></li>'
        for method in methods
    )
    return (
        "<h1>One network, taught in different ways</h1>"
        '<p class="lead">A language network that has read a lot of text can learn to answer questions by pointing at words of a text. '
        "How much of the network must change for that? Ask something, and compare the answers.</p>"
        f'<ul class="legend" aria-label="The methods">{rows}</ul>'
        '<p class="key"><span class="trained"></span> trained to answer <span class="frozen"></span> left as it was</p>'
    )


def _picture(method: str) -> str:
    """The network as a stack of layers above the text, the head on top; what was trained is in colour."""
    x, width, layers = _ADDED.get(method, (0, 0, range(0)))
    kind = "trained" if method == "fine-tuning" else "frozen"
    stack = "".join(_bar(kind, 18, 12 + 8 * layer, 42) for layer in range(5))
    added = "".join(_bar("trained", x, 12 + 8 * layer, width) for layer in layers)
    return (
        f'<svg viewBox="0 0 72 60" width="72" height="60" aria-hidden="true">{stack}{added}'
        f"{_bar('trained', 31, 3, 16)}{_bar('text', 18, 53, 42)}</svg>"
    )


def _bar(kind: str, x: int, y: int, width: int) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="6" rx="1"/>'


def results(replies: Sequence["Reply"], context: str, accepted: Sequence[str] | None) -> str:
    """The answers side by side.

    Args:
        accepted: of an example from the corpus, what counts as right (none: the text holds no answer); None for other questions.
    """
    groups = _groups(replies)
    cards = "".join(_card(reply, context, accepted, groups) for reply in replies)
    return f'<div role="status">{_verdict(replies, groups, accepted)}</div><div class="cards">{cards}</div>'


def _groups(replies: Sequence["Reply"]) -> dict[str, str]:
    """Checkpoint name -> a letter; the same letter means the same answer."""
    from ptv2.metrics import normalise

    letters: dict[str, str] = {}
    answers = {reply.checkpoint.name: normalise(reply.prediction.best.text) for reply in replies if reply.prediction}
    return {name: letters.setdefault(answer, chr(ord("A") + len(letters))) for name, answer in answers.items()}


def _verdict(replies: Sequence["Reply"], groups: dict[str, str], accepted: Sequence[str] | None) -> str:
    answered = [reply for reply in replies if reply.prediction]
    parts = []
    if len(answered) > 1:
        kinds: dict[str, list] = {}
        for reply in answered:
            kinds.setdefault(groups[reply.checkpoint.name], []).append(reply)
        if len(kinds) == 1:
            parts.append(f"<strong>All {len(answered)} agree.</strong>")
        else:
            told = "; ".join(f"{_badge(letter)} {_and([_title(r) for r in same])}" for letter, same in kinds.items())
            parts.append(f"<strong>{len(kinds)} different answers:</strong> {told}.")
    if accepted is not None:
        wanted = _or([f"“{_isolated(text)}”" for text in accepted]) if accepted else "the text does not say"
        parts.append(f"Right answer: {wanted}.")
    return f'<p class="verdict">{" ".join(parts)}</p>' if parts else ""


def _card(reply: "Reply", context: str, accepted: Sequence[str] | None, groups: dict[str, str]) -> str:
    checkpoint = reply.checkpoint
    head = f"<h2>{_title(reply)} {_badge(groups[checkpoint.name]) if len(groups) > 1 and reply.prediction else ''}</h2>"
    if not reply.prediction:
        return f'<article class="card {_css(checkpoint.method)}">{head}{problem(reply.error)}</article>'
    best = reply.prediction.best
    excerpt = highlighted(context, best.start, best.end)
    body = (
        f'<p class="answer">{_answer(best.text)}{_mark_of(best.text, accepted)}</p>'
        f'<p class="score"><meter min="0" max="1" value="{best.score:.4f}" aria-label="score"></meter> score {_percent(best.score)}</p>'
        f'<div class="excerpt" dir="auto" tabindex="0" aria-label="The answer in the text">{excerpt}</div>'
        f"{_candidates(reply)}{_facts(reply)}"
    )
    return f'<article class="card {_css(checkpoint.method)}">{head}{body}</article>'


def highlighted(context: str, start: int, end: int) -> str:
    """The text around characters start to end, which are marked; all of a short text. Nothing is marked where the two are equal."""
    left = start - EXCERPT if start > EXCERPT * 1.5 else 0
    right = end + EXCERPT if len(context) - end > EXCERPT * 1.5 else len(context)
    if left:  # begin and end between words, not within a letter of several characters
        left += (re.search(r"\s", context[left:start]) or re.search("", "")).end()
    if right < len(context):
        right = end + max(context.rfind(" ", end, right) - end, 0) or right
    before, inside, after = safe(context[left:start]), safe(context[start:end]), safe(context[end:right])
    marked = f"<mark>{inside}</mark>" if inside else ""
    return f"{'… ' if left else ''}{before}{marked}{after}{' …' if right < len(context) else ''}"


def _candidates(reply: "Reply") -> str:
    rows = "".join(
        f"<tr><td>{_answer(answer.text)}</td><td>{_percent(answer.score)}</td><td>{answer.start:,}–{answer.end:,}</td></tr>"
        for answer in reply.prediction.answers
    )
    head = '<tr><th scope="col">answer</th><th scope="col">score</th><th scope="col">characters</th></tr>'
    count = len(reply.prediction.answers)
    return f"<details><summary>Its {count} best answers</summary><table><thead>{head}</thead><tbody>{rows}</tbody></table></details>"


def _facts(reply: "Reply") -> str:
    together = f" for {reply.in_pass} methods in one pass" if reply.in_pass > 1 else ""
    declines = "" if reply.declines else "<p>Learned from answerable questions only: it always picks something.</p>"
    share = 100 * reply.share
    return (
        f'<div class="facts"><div class="share" aria-hidden="true"><span style="width:{min(share, 100):.3f}%"></span></div>'
        f"<p>{reply.trained:,} trained numbers, {share:.3g} % of the network’s · {size(reply.checkpoint.stored_bytes)} stored · "
        f"{reply.seconds:.2f} s{together}</p>{declines}</div>"
    )


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _answer(text: str) -> str:
    return f"<bdi>{safe(text)}</bdi>" if text else "<em>no answer in this text</em>"


def _isolated(text: str) -> str:
    return f"<bdi>{safe(text)}</bdi>"


def _title(reply: "Reply") -> str:
    return safe(method_title(reply.checkpoint))


def _badge(letter: str) -> str:
    return f'<span class="badge" title="methods with the same letter gave the same answer">{letter}</span>'


def _mark_of(text: str, accepted: Sequence[str] | None) -> str:
    """Whether an answer to an example is right; word of its own beside the sign, for those who don't see the sign."""
    if accepted is None:
        return ""
    from ptv2.metrics import normalise

    right = normalise(text) in [normalise(one) for one in accepted or [""]]
    return '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ not an accepted answer</span>'


def _questions(count: int) -> str:
    return f"{count:,} question{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "&lt; 1 %"


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _or(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _css(method: str) -> str:
    return f"method-{method}" if method in METHODS else "method-other"


def inside(found: "Inside", question: str, context: str, picture: str) -> str:
    """The heat map, and where the answer may start and end.

    Args:
        picture: the heat map's PNG in base64.
    """
    H = found.attention.shape[1]
    rows = "".join(
        f'<tr><th scope="row">{layer + 1}</th>{"".join(f"<td>{100 * share:.0f}</td>" for share in heads)}</tr>'
        for layer, heads in enumerate(found.attention.tolist())
    )
    columns = "".join(f'<th scope="col">{head + 1}</th>' for head in range(H))
    part = f" Shown is the one of the text’s {found.windows} windows that holds the answer." if found.windows > 1 else ""
    mean, highest = found.attention.mean().item(), found.attention.max().item()
    return (
        f'<section class="inside"><p>Question: <strong><bdi>{safe(question)}</bdi></strong></p><h2>How much it looks at the prefix</h2>'
        "<p>Each layer of the network has several <em>attention heads</em>. For every word, a head looks at the other words and at "
        f"the prefix. Here the prefix takes {_percent(mean)} of the attention on average, and up to {_percent(highest)} in one head.</p>"
        f'<img src="data:image/png;base64,{picture}" alt="Heat map: share of attention that goes to the prefix, by layer and head; '
        'the table below holds its numbers.">'
        f"<details><summary>The numbers, in percent</summary><table><caption>Layers down, heads across</caption>"
        f"<thead><tr><td></td>{columns}</tr></thead><tbody>{rows}</tbody></table></details>"
        "<h2>Where the answer starts, and where it ends</h2>"
        "<p>The network gives every word two scores: how well the answer would <em>start</em> there, and how well it would "
        f"<em>end</em> there. The darker a word, the higher the score.{part}</p>"
        f"<h3>Start</h3>{_shaded(found, context, found.start, 'start')}"
        f"<h3>End</h3>{_shaded(found, context, found.end, 'end')}</section>"
    )


def _shaded(found: "Inside", context: str, scores: list[float], kind: str) -> str:
    """The window's text, each token shaded by its score; the square root keeps low scores visible."""
    if not found.tokens:
        return "<p>This text has no words that the network knows.</p>"
    parts, at = [], found.tokens[0][0]
    for (start, end), score in zip(found.tokens, scores, strict=True):
        parts.append(safe(context[at:start]))
        word = safe(context[max(at, start) : end])  # several tokens may share one character
        shade = f'<span style="--share:{100 * score**0.5:.0f}%" title="{100 * score:.1f} %">{word}</span>'
        parts.append(shade if score >= 0.001 else word)
        at = max(at, end)
    box = f'<div class="excerpt shaded {kind}" dir="auto" tabindex="0" aria-label="{kind} scores">{"".join(parts)}</div>'
    return box + _top(found, context, scores)


def _top(found: "Inside", context: str, scores: list[float]) -> str:
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:3]
    told = ", ".join(f"<bdi>{safe(context[slice(*found.tokens[i])])}</bdi> {_percent(scores[i])}" for i in best)
    return f'<p class="top">Highest: {told}</p>'


def progress(done: int, total: int) -> str:
    """How far the scoring of a file is."""
    bar = f'<progress max="{total}" value="{done}" aria-label="questions scored"></progress>'
    return f'<p class="progress" role="status">{bar} {done:,} of {total:,} questions</p>'


def report(found: "Report", titles: dict[str, str]) -> str:
    """Scores by method, and the questions on which the methods disagree.

    Args:
        titles: a checkpoint's name for people, by its name.
    """
    problems = "".join(problem(sentence) for sentence in found.problems)
    if not found.scores:
        return problems
    rows = "".join(
        f'<tr><th scope="row">{safe(titles[name])}</th><td>{_interval(scores.exact_match)}</td><td>{_interval(scores.f1)}</td></tr>'
        for name, scores in found.scores.items()
    )
    n = len(found.examples)
    count = f"{n:,} of the file’s {found.of:,} questions" if found.of > n else _questions(n)
    return (
        f'{problems}<section class="report" role="status"><h2>{count} scored</h2><table class="scores"><thead><tr>'
        '<th scope="col">method</th><th scope="col">exact match, %</th><th scope="col">F1, %</th></tr></thead>'
        f"<tbody>{rows}</tbody></table><p>Exact match: the answer is an accepted one, word for word. F1: how many words they share. In "
        "brackets, 95 % intervals: where they would lie with other questions of this kind.</p></section>"
        f"{_disagreements(found, titles)}"
    )


def _interval(value) -> str:
    return f"{value.value:.1f} <small>[{value.low:.1f}, {value.high:.1f}]</small>"


def _disagreements(found: "Report", titles: dict[str, str]) -> str:
    indices = found.disagreements
    if not indices:
        return "<p>The methods gave the same answer to every question.</p>" if len(found.answers) > 1 else ""
    head = "".join(f'<th scope="col">{safe(titles[name])}</th>' for name in found.answers)
    rows = []
    for i in indices[:MAX_ROWS]:
        example = found.examples[i]
        accepted = dict.fromkeys(span.text for span in example.answers)
        cells = "".join(f"<td>{_answer(given[i])}{_mark_of(given[i], list(accepted))}</td>" for given in found.answers.values())
        wanted = " / ".join(map(_isolated, accepted)) or "<em>no answer in this text</em>"
        text = f"<details><summary>text</summary>{safe(example.context[:2000])}</details>"
        rows.append(f'<tr><th scope="row"><bdi>{safe(example.question)}</bdi>{text}</th><td>{wanted}</td>{cells}</tr>')
    more = f" The first {MAX_ROWS} are shown; the files below hold all." if len(indices) > MAX_ROWS else ""
    return (
        f'<h2 id="disagreements">They disagree on {_questions(len(indices))}</h2><p>{more}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="disagreements"><table class="disagreements"><thead><tr>'
        f'<th scope="col">question</th><th scope="col">accepted</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
