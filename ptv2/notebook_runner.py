"""Running the notebook suite: each notebook in a kernel of its own, what it left, the records and the stored copies."""

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from ptv2 import records
from ptv2.errors import InputError
from ptv2.notebooks import CHECK_MIME, Planned, deciding, number, records_path

ADDED_TAGS = {"injected-parameters", "papermill-error-cell-tag"}  # of cells that papermill puts in
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class KernelEngine(Engine):
    """papermill's usual engine, with the kernel's folder and environment given, and its kernels in reach of an interrupt."""

    running: list[PapermillNotebookClient] = []  # noqa: RUF012 -- papermill uses the class, never an instance

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, folder: Path, environment: dict[str, str], **_):
        client = PapermillNotebookClient(
            nb_man, kernel_name=kernel_name, resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=ERROR"],
            startup_timeout=300, iopub_timeout=60,  # seconds, for machines under load
        )  # fmt: skip
        cls.running.append(client)
        try:
            client.execute(env=environment)
        finally:
            cls.running.remove(client)

    @classmethod
    def stop_all(cls) -> None:
        """Kill the kernels, so that the threads that wait for them end."""
        for client in list(cls.running):
            if client.km is not None and client.km.has_kernel:
                client.km.provisioner.process.kill()


papermill_engines.register("ptv2", KernelEngine)


def run_notebooks(planned: list[Planned], run: Path, jobs: int, command: str) -> list[dict]:
    """Execute notebooks, `jobs` at once, each with its share of the cores; one that fails stops nothing else.

    Args:
        run: folder for RUN/NAME.ipynb (the executed copy), RUN/NAME.json (its outcome) and RUN/figures/NAME/. Those of other
            notebooks stay.
        command: that repeats this, for the record.

    Returns:
        The outcomes in the order of `planned`: notebook, title, status ("finished" or "failed"), error, seconds, checks,
        parameters, and what repeats the run.
    """
    environment = _environment(jobs)
    provenance = {
        "command": command, "date": records.now(), "versions": records.versions(), "git_commit": records.git_commit(),
        "machine": {**records.machine(), "threads": int(environment["OMP_NUM_THREADS"])},
    }  # fmt: skip
    outcomes = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(planned), desc="notebooks", unit="notebook", file=sys.stderr) as bar:
        waiting = {pool.submit(_run_one, notebook, run.resolve(), environment): notebook.name for notebook in planned}
        try:
            for future in as_completed(waiting):
                outcome = {**future.result(), **provenance}
                records.write_json(run / f"{outcome['notebook']}.json", outcome)
                outcomes[outcome["notebook"]] = outcome
                bar.write(f"{outcome['notebook']}: {outcome['error'] or outcome['status']}", file=sys.stderr)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            KernelEngine.stop_all()
            raise
    return [outcomes[notebook.name] for notebook in planned]


def _environment(jobs: int) -> dict[str, str]:
    """That of a kernel, with its share of the cores unless the number of threads is set from outside."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}


def _run_one(notebook: Planned, run: Path, environment: dict[str, str]) -> dict:
    figures = run / "figures" / notebook.name
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    parameters = {**notebook.parameters, "output_dir": str(figures)}
    output, started = run / notebook.path.name, time.monotonic()
    error = _execute(notebook.path, output, parameters, environment)
    executed = nbformat.read(output, 4) if output.is_file() else nbformat.read(notebook.path, 4)
    return {
        "notebook": notebook.name,
        "title": title(executed),
        "status": "failed" if error else "finished",
        "error": error,
        "seconds": round(time.monotonic() - started, 1),
        "parameters": deciding(notebook.parameters),
        "checks": collect_checks(executed),
    }


def _execute(path: Path, output: Path, parameters: dict[str, object] | None, environment: dict[str, str]) -> str | None:
    """Run a notebook in its own folder into `output`, which keeps an error; the error in a line, or None."""
    output.unlink(missing_ok=True)
    try:
        execute_notebook(
            path, output, parameters, engine_name="ptv2", folder=path.parent.resolve(), environment=environment,
            progress_bar={"desc": path.stem, "leave": False, "file": sys.stderr},
        )  # fmt: skip
    except PapermillExecutionError as failed:
        return f"{failed.ename} in cell {failed.exec_count}: {failed.evalue}".partition("\n")[0]
    except Exception as failed:  # the kernel died or never came up; the others go on
        return f"{type(failed).__name__}: {failed}".partition("\n")[0]
    return None


def title(notebook: NotebookNode) -> str:
    """The first heading, as plain text."""
    lines = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    return next((line[2:].replace("`", "") for line in lines if line.startswith("# ")), "")


def collect_checks(notebook: NotebookNode) -> list[dict]:
    """What the notebook's Reproduction left in its outputs, in order."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [dict(output.data[CHECK_MIME]) for output in outputs if CHECK_MIME in output.get("data", {})]


def summary(outcomes: list[dict]) -> tuple[list[str], int]:
    """What went wrong, a line each, then how many notebooks finished and values were reproduced; and the exit status."""
    lines = [f"{outcome['notebook']} failed: {outcome['error']}" for outcome in outcomes if outcome["error"]]
    checks = [(outcome["notebook"], check) for outcome in outcomes for check in outcome["checks"]]
    for notebook, check in checks:
        if check["passed"] is False:
            lines.append(
                f"{notebook} did not reproduce {check['name']}: {number(check['new'])}, recorded {number(check['recorded'])}, "
                f"tolerance {number(check['tolerance'])}"
            )
    passed = [check["passed"] for _, check in checks]
    failed = sum(outcome["error"] is not None for outcome in outcomes)
    counts = f"{len(outcomes) - failed} of {len(outcomes)} notebooks finished; {passed.count(True)} values reproduced, "
    counts += f"{passed.count(False)} not, {passed.count(None)} not compared."
    return [*lines, counts], int(bool(lines))


def record(planned: list[Planned], outcomes: list[dict]) -> list[Path]:
    """Write the values of the finished notebooks into their profile's record; entries of other notebooks stay.

    Returns:
        The files written.
    """
    written = set()
    for notebook, outcome in zip(planned, outcomes, strict=True):
        if outcome["error"]:
            continue
        path = records_path(notebook.path.parent / notebook.parameters["results_dir"], notebook.parameters["profile"])
        entry = {key: outcome[key] for key in ("parameters", "seconds", "command", "date", "versions", "git_commit", "machine")}
        entry = {"values": {check["name"]: check["new"] for check in outcome["checks"]}, "seed": notebook.parameters["seed"], **entry}
        everything = {**(records.read_json(path) if path.is_file() else {}), notebook.name: entry}
        records.write_json(path, dict(sorted(everything.items())))
        written.add(path)
    return sorted(written)


def store(planned: list[Planned], outcomes: list[dict], run: Path) -> list[Path]:
    """Put the outputs of finished notebooks whose checks did not fail back into the suite, cleaned; run and store their solutions.

    Returns:
        The notebooks written; a solution that fails is named on stderr and stays as it was.

    Raises:
        InputError: a notebook was changed while it ran.
    """
    written = []
    for notebook, outcome in zip(planned, outcomes, strict=True):
        if outcome["error"] or any(check["passed"] is False for check in outcome["checks"]):
            continue
        written.append(_store_one(run / notebook.path.name, notebook.path, notebook.path.parent))
        solution, executed = (folder / "solutions" / notebook.path.name for folder in (notebook.path.parent, run))
        if not solution.is_file():
            continue
        executed.parent.mkdir(exist_ok=True)
        if error := _execute(solution, executed, None, _environment(jobs=1)):
            print(f"{solution} is not stored: {error}", file=sys.stderr)
        else:
            written.append(_store_one(executed, solution, notebook.path.parent))
    return written


def _store_one(executed: Path, path: Path, folder: Path) -> Path:
    notebook = cleaned(nbformat.read(executed, 4), folder.resolve().parent)
    if [cell.source for cell in notebook.cells] != [cell.source for cell in nbformat.read(path, 4).cells]:
        raise InputError(f"{path} was changed while it ran; run it again.")
    nbformat.write(notebook, path)
    return path


def cleaned(notebook: NotebookNode, repository: Path) -> NotebookNode:
    """A copy without what differs between runs and machines.

    Kept are sources, tags, and outputs other than stderr and widgets; code cells are numbered from 1, and paths stand
    relative to the repository.
    """
    notebook = NotebookNode(nbformat.from_dict(notebook))
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernelspec, language_info={"name": "python"})
    notebook.cells = [cell for cell in notebook.cells if not ADDED_TAGS & set(cell.metadata.get("tags", ()))]
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = _cleaned_outputs(cell.outputs, count, f"{repository}{os.sep}")
    return notebook


def _cleaned_outputs(outputs: list[NotebookNode], count: int, root: str) -> list[NotebookNode]:
    kept = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET_MIME in output.get("data", {}):
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text  # how the kernel cut its output up differs between runs
        else:
            kept.append(output)
    for output in kept:
        if "text" in output:
            output.text = output.text.replace(root, "")
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                output.data[kind] = content.replace(root, "")
    return kept
