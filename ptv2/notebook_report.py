"""One HTML page of a run of the notebook suite: index, what was reproduced, every figure, and the notebooks themselves.

The page needs no network and no script: pictures are embedded, and formulas become MathML, which browsers draw themselves
(nbconvert's own way, MathJax, is 3 MB fetched from elsewhere).
"""

import base64
import re
from importlib.resources import files
from pathlib import Path

import nbformat
from jinja2 import Environment, pass_context
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from ptv2 import records
from ptv2.errors import InputError
from ptv2.notebooks import number, verdict


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the outcomes and executed notebooks in RUN, those of earlier runs included.

    Raises:
        InputError: there are none.
    """
    outcomes = [records.read_json(path) for path in sorted(run.glob("[0-9][0-9]_*.json"))]
    if not outcomes:
        raise InputError(f"No notebook was run into {run}; run ptv2 notebooks first.")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "verdict": verdict}
    template = environment.from_string(files("ptv2").joinpath("notebook_report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        outcomes=outcomes,
        bodies={outcome["notebook"]: _executed_body(run / f"{outcome['notebook']}.ipynb") for outcome in outcomes},
        figures={outcome["notebook"]: _figures(run / "figures" / outcome["notebook"]) for outcome in outcomes},
        code_style=Markup(HtmlFormatter().get_style_defs(".highlight")),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def formula(latex: str, display: str) -> str:
    """MathML of a formula.

    Args:
        display: "inline" or "block".

    Raises:
        InputError: it holds a command that MathML cannot be made of.
    """
    mathml = convert(latex.replace("{aligned}", "{split}"), display=display)  # the same, and known to the converter
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        raise InputError(f"The formula {latex.strip()} cannot be turned into MathML; write it with simpler commands.")
    return mathml


class _Renderer(IPythonRenderer):
    """Markdown whose formulas are MathML, and whose links to other notebooks stay within the page."""

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if re.fullmatch(r"\d\d_\w+\.ipynb", url):
            return super().link(text, f"#{url.removesuffix('.ipynb')}", title)
        return super().link(text, url, title) if re.match(r"https?://|#", url) else text


class _Exporter(HTMLExporter):
    """A notebook as a fragment of a page."""

    template_name = "basic"
    exclude_input_prompt = exclude_output_prompt = True

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        attachments = context["cell"].get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
        return MarkdownWithMath(renderer=renderer).render(source)


def notebook_body(notebook: NotebookNode) -> Markup:
    """A notebook as a fragment of a page, without what was written to stderr and what papermill put in on errors."""
    notebook = nbformat.from_dict(notebook)
    notebook.cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", ())]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return Markup(_Exporter().from_notebook_node(notebook)[0])


def _executed_body(path: Path) -> Markup:
    """Empty where the kernel never came up, so that nothing was executed."""
    return notebook_body(nbformat.read(path, 4)) if path.is_file() else Markup("")


def _figures(folder: Path) -> list[tuple[str, str]]:
    """Name and content (base64) of each figure's PNG, in the order in which they were drawn."""
    pictures = sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    return [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in pictures]
