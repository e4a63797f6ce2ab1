"""The playground's page: ask, look inside, score a file. It is up before torch is imported, which happens meanwhile."""

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec
from pathlib import Path

# Before gradio is imported: nothing is sent out, no question is kept, uploads go with the process.
UPLOADS = tempfile.TemporaryDirectory(prefix="ptv2-playground-")
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=UPLOADS.name)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gradio as gr
from gradio.exceptions import ServerFailedToStartError

from demo import page
from demo.playground import MAX_FILE_BYTES, MAX_METHODS, MAX_QUESTIONS, MAX_TEXT, Playground, models
from ptv2.errors import InputError

WAITING = 40  # people in the queue; the next one is told that it is full
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "models"}
ONE_FILE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "files", "show_progress": "minimal"}
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
# After an answer, the address bar holds a link to the question.
LINK = """(question, text) => {
    const url = new URL(window.location.href);
    url.search = new URLSearchParams({question, context: text}).toString();
    if (question.trim() && url.href.length < 8000) window.history.replaceState(null, "", url);
}"""
log = logging.getLogger("ptv2.demo")


def sentence(error: Exception) -> str:
    """What a person is told of an error."""
    if isinstance(error, InputError):
        return str(error)
    log.error("The playground failed to answer.", exc_info=error)
    return "Something went wrong on the server, whose log says what: try again."


def shown(function: Callable[..., str]) -> Callable[..., str]:
    """A function for the page: a sentence in place of an exception."""

    @wraps(function)
    def call(*arguments) -> str:
        try:
            return function(*arguments)
        except Exception as error:
            return page.problem(sentence(error))

    return call


def told(error: Exception) -> gr.Error:
    """An error for the API's callers, in one sentence."""
    return gr.Error(sentence(error), print_exception=False)


def build(playground: Playground) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="ptv2 playground", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        intro = gr.HTML(page.intro(playground.checkpoints()), elem_id="intro")
        methods = gr.CheckboxGroup(**_choices(playground, None), label=f"Methods to compare, up to {MAX_METHODS}", elem_id="methods")
        with gr.Tabs():
            with gr.Tab("Ask"):
                question, text, answers = _ask_tab(playground, methods)
            with gr.Tab("Look inside") as inside_tab:
                prefix = _inside_tab(playground, inside_tab, question, text)
            with gr.Tab("Score a file"):
                _score_tab(playground, methods)
        _keep_up_to_date(playground, blocks, intro, methods, prefix)
        blocks.load(_from_link(playground), [question, text, methods], [question, text, answers], **HIDDEN, **ONE_AT_A_TIME)
        _api(playground)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=8)


def _choices(playground: Playground, chosen: list[str] | None) -> dict:
    """The methods there are, and which are ticked: as many as fit at first, later those that were."""
    found = playground.checkpoints()
    names = [checkpoint.name for checkpoint in found]
    ticked = names[:MAX_METHODS] if chosen is None else [name for name in chosen if name in names]
    return {"choices": [(page.method_title(checkpoint), checkpoint.name) for checkpoint in found], "value": ticked}


def _prefix_choices(playground: Playground, chosen: str | None) -> dict:
    found = [checkpoint for checkpoint in playground.checkpoints() if checkpoint.method == "p-tuning-v2"]
    names = [checkpoint.name for checkpoint in found]
    value = chosen if chosen in names else next(iter(names), None)
    return {"choices": [(page.method_title(checkpoint), checkpoint.name) for checkpoint in found], "value": value}


def _ask_tab(playground: Playground, methods: gr.CheckboxGroup) -> tuple[gr.Textbox, gr.Textbox, gr.HTML]:
    examples = playground.examples
    labels = [f"{e.title}: {e.question}{'' if e.answers else ' (the text does not say)'}" for e in examples]
    with gr.Row():
        example = gr.Dropdown(
            list(zip(labels, range(len(labels)), strict=True)), value=0, label="Examples", scale=5, min_width=320, elem_id="example",
            info="questions whose right answer is known",
        )  # fmt: skip
        following = gr.Button("Next example", size="sm", scale=1, min_width=120, elem_id="next")
    with gr.Row():
        with gr.Column(scale=3):
            info = f"any text in English, up to {MAX_TEXT:,} characters"
            text = gr.Textbox(examples[0].context, label="Text", info=info, lines=9, max_lines=16, elem_id="text")
        with gr.Column(scale=2):
            question = gr.Textbox(examples[0].question, label="Question", info="Enter asks", lines=1, max_lines=4, elem_id="question")
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
    answers = gr.HTML(page.HINT, elem_id="answers")

    def fill(index: int | None):
        chosen = examples[(index or 0) % len(examples)]
        return chosen.question, chosen.context, page.HINT

    filled = {"outputs": [question, text, answers], "queue": False, **HIDDEN}
    example.input(fill, example, **filled)
    following.click(lambda index: ((index or 0) + 1) % len(examples), example, example, queue=False, **HIDDEN).then(fill, example, **filled)
    asked = gr.on(
        [ask.click, question.submit], shown(playground.ask), [question, text, methods], answers, api_visibility="private", **ONE_AT_A_TIME
    )
    asked.then(None, [question, text], js=LINK, api_visibility="private")
    return question, text, answers


def _from_link(playground: Playground) -> Callable:
    """Fills in and asks what the page's address says: ?question=...&context=..."""

    def open_page(question: str, text: str, methods: list[str], request: gr.Request):
        linked = dict(request.query_params)
        if not linked.get("question") and not linked.get("context"):
            return gr.skip()
        question, text = linked.get("question", question), linked.get("context", text)
        return question, text, shown(playground.ask)(question, text, methods) if linked.get("question") else page.HINT

    return open_page


def _inside_tab(playground: Playground, tab: gr.Tab, question: gr.Textbox, text: gr.Textbox) -> gr.Dropdown:
    prefix = gr.Dropdown(**_prefix_choices(playground, None), label="Prefix to look at", info="with the text and question of the first tab")
    look = gr.Button("Look again", size="sm")
    found = gr.HTML(elem_id="inside")
    gr.on(
        [tab.select, prefix.input, look.click], shown(playground.look_inside), [question, text, prefix], found,
        api_visibility="private", **ONE_AT_A_TIME,
    )  # fmt: skip
    return prefix


def _score_tab(playground: Playground, methods: gr.CheckboxGroup) -> None:
    gr.HTML(page.SCORING.format(megabytes=MAX_FILE_BYTES // 2**20, questions=f"{MAX_QUESTIONS:,}", characters=f"{MAX_TEXT:,}"))
    with gr.Row():
        file = gr.File(label="SQuAD file (JSON, version 1.1 or 2.0)", file_types=[".json"], elem_id="file")
        with gr.Column():
            limit = gr.Slider(1, MAX_QUESTIONS, value=100, step=1, label="Questions to score, from the start of the file", elem_id="limit")
            score = gr.Button("Score", variant="primary", elem_id="score")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
    report = gr.HTML(elem_id="report")
    with gr.Row():
        table = gr.DownloadButton("Download as CSV", visible=False, elem_id="csv")
        record = gr.DownloadButton("Download as JSON", visible=False, elem_id="json")

    def run(file: str | None, methods: list[str], limit: float) -> Iterator[tuple]:
        hidden = gr.DownloadButton(visible=False)
        try:
            for step in playground.score(file, methods, limit):
                if isinstance(step, tuple):
                    yield page.progress(*step), hidden, hidden
            from demo.scoring import write_report  # loaded by now, with torch

            titles = {checkpoint.name: page.method_title(checkpoint) for checkpoint in playground.checkpoints()}
            with tempfile.TemporaryDirectory() as folder:  # Gradio takes copies, which it deletes in time
                paths = write_report(step, Path(folder))
                yield page.report(step, titles), *(gr.DownloadButton(value=path, visible=True) for path in paths)
        except Exception as error:
            yield page.problem(sentence(error)), hidden, hidden

    scored = score.click(run, [file, methods, limit], [report, table, record], api_visibility="private", **ONE_FILE_AT_A_TIME)
    stop.click(lambda: page.STOPPED, outputs=report, cancels=scored, queue=False, **HIDDEN)


def _keep_up_to_date(playground: Playground, blocks: gr.Blocks, intro: gr.HTML, methods: gr.CheckboxGroup, prefix: gr.Dropdown) -> None:
    """New runs appear on open pages, and deleted ones go."""
    seen = gr.State([checkpoint.name for checkpoint in playground.checkpoints()])

    def look(seen: list[str], chosen: list[str], inside: str | None):
        found = playground.checkpoints()
        names = [checkpoint.name for checkpoint in found]
        if names == seen:
            return gr.skip()
        new = [name for name in names if name not in seen]
        ticked = [*(name for name in chosen if name in names), *new][:MAX_METHODS]
        boxes, dropdown = _choices(playground, ticked), _prefix_choices(playground, inside)
        return names, page.intro(found), gr.CheckboxGroup(**boxes), gr.Dropdown(**dropdown)

    triggers = [blocks.load, *([gr.Timer(3).tick] if playground.runs else [])]
    gr.on(triggers, look, [seen, methods, prefix], [seen, intro, methods, prefix], queue=False, **HIDDEN)


def _api(playground: Playground) -> None:
    def answer(question: str, text: str, method: str = "p-tuning-v2") -> dict:
        """One method's answer to a question about a text.

        Args:
            question: in English.
            text: that holds the answer.
            method: a name, as /compare gives them.

        Returns:
            the answer ("" for "no answer"), its place in the text (characters start to end), its score, the n best
            answers, the seconds it took, how many numbers were trained and how many bytes are stored.
        """
        return compare(question, text, [method])[method]

    def compare(question: str, text: str, methods: list[str] | None = None) -> dict:
        """What several methods answer to a question about a text.

        Args:
            question: in English.
            text: that holds the answer.
            methods: their names; all that ship if None.

        Returns:
            by method's name, what /answer gives.
        """
        try:
            return playground.replies(question, text, methods)
        except Exception as error:
            raise told(error) from error

    def evaluate(file: str | None, methods: list[str] | None = None, limit: float = 100) -> Iterator[dict]:
        """Exact match and F1 of methods on a file of questions, with 95 % intervals, and every answer.

        Args:
            file: questions with answers in SQuAD's form, as JSON.
            methods: their names; all that ship if None.
            limit: how many questions to score, from the start of the file.

        Returns:
            {"done", "of"} again and again while it goes on, and at last the report.
        """
        try:
            from demo.scoring import report_dict  # needs torch

            for step in playground.score(file, methods, limit):
                yield {"done": step[0], "of": step[1]} if isinstance(step, tuple) else report_dict(step)
        except Exception as error:
            raise told(error) from error

    gr.api(answer, api_name="answer", **ONE_AT_A_TIME)
    gr.api(compare, api_name="compare", **ONE_AT_A_TIME)
    # Of components only a file's is checked to lie where uploads do; these are not on the page.
    given = [gr.File(label="file", visible=False), gr.JSON(label="methods", visible=False), gr.Number(100, label="limit", visible=False)]
    report = gr.JSON(label="report", visible=False)
    gr.Button(visible=False).click(evaluate, given, report, api_name="evaluate", **ONE_FILE_AT_A_TIME)


def _theme() -> gr.themes.Base:
    """Fonts of the machine, nothing from the network; hints dark enough to read."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")]
    theme = gr.themes.Base(font=fonts, font_mono=gr.themes.Font("monospace"), primary_hue="blue")
    subdued = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    return theme.set(**subdued, body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")


def serve(runs: Path | None = None, host: str = "127.0.0.1", port: int | None = None, share: bool = False, mcp: bool = False) -> None:
    """Serve the page until Ctrl-C.

    Args:
        runs: a directory of runs to offer beside what ships.
        host: address to listen on; "0.0.0.0" for other machines, too.
        port: the first free one from 7860 on if None.
        share: open a public link through Gradio's servers.
        mcp: also serve the API as tools for language models (needs `pip install 'gradio[mcp]'`).

    Raises:
        InputError: the port is taken, or something that an option needs is missing.
    """
    if mcp and find_spec("mcp") is None:
        raise InputError("--mcp needs Gradio's extra of this name: pip install 'gradio[mcp]'.")
    blocks = build(Playground(runs))
    try:
        _, local, public = blocks.launch(
            server_name=host, server_port=port, share=share, mcp_server=mcp, prevent_thread_lock=True, quiet=True, ssr_mode=False,
            pwa=False, run_history=False, enable_monitoring=False, footer_links=["api", "settings"], max_file_size=MAX_FILE_BYTES,
            theme=_theme(),
            css_paths=Path(__file__).with_name("style.css"),
        )  # fmt: skip
    except (OSError, ServerFailedToStartError) as error:
        raise InputError(f"The playground cannot listen on {host}: {error}") from error
    print(f"The playground is at {public or local} (Ctrl-C ends it).", flush=True)
    threading.Thread(target=models, daemon=True).start()  # the page is up: now import what answers
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely, it takes its temporary files along
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    blocks.close(verbose=False)  # ends open connections first, which block_thread() would wait for
