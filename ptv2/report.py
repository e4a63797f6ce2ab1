"""What the records of runs say, as a table and a sentence; `ptv2.plots` draws them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ptv2 import records
from ptv2.errors import InputError
from ptv2.methods import METHODS
from ptv2.metrics import Interval
from ptv2.sweep_scores import f1_by_start, f1_over_seeds, gains_over, held_out_f1, shares_held_out, trial_f1
from ptv2.training import RUN_FILE

OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True)
class Result:
    """A training run and, where it was evaluated, its score on other questions.

    Args:
        name: of the run's directory or record.
        run: the content of run.json.
        evaluation: the content of evaluation.json beside it, or None.
    """

    name: str
    run: dict
    evaluation: dict | None

    @property
    def method(self) -> str:
        return self.run["config"]["method"]

    @property
    def is_pretrained(self) -> bool:
        """It started at another run's weights (`--init DIR`)."""
        return "init" in self.run

    @property
    def title(self) -> str:
        return METHODS[self.method].title + (", pretrained" if self.is_pretrained else "")

    @property
    def is_export(self) -> bool:
        """Another form of a run that has a record of its own (`ptv2 export`)."""
        return "export" in self.run

    @property
    def windows_per_step(self) -> int:
        """Of one process; runs that are compared had one."""
        return self.run["config"]["batch_size"] * self.run["config"]["gradient_accumulation"]

    @property
    def share(self) -> float:
        """Trained numbers, head included, in percent of the backbone's."""
        return 100 * self.run["parameters"]["trained"] / self.run["parameters"]["backbone"]


def read_results(paths: list[Path]) -> list[Result]:
    """All finished runs under the given directories, by method and name.

    Raises:
        InputError: there are none.
    """
    files = sorted({file for path in paths for file in path.rglob(RUN_FILE)})
    results = []
    for file in files:
        run = records.read_json(file)
        if run.get("status") != "finished":
            continue
        evaluation = file.with_name("evaluation.json")
        name = f"{run['export']['of']}, 8-bit difference" if "export" in run else file.parent.name
        results.append(Result(name, run, records.read_json(evaluation) if evaluation.is_file() else None))
    if not results:
        raise InputError(f"No finished run lies under {', '.join(map(str, paths))}.")
    order = list(METHODS)
    return sorted(results, key=lambda result: (order.index(result.method), result.name))


def results_table(results: list[Result]) -> str:
    """A Markdown table of runs: what was trained, what it reached on which questions, and how long it took.

    Where p-tuning-v2 and fine-tuning were both evaluated, a sentence sets their means over seeds side by side.
    """
    head = "| run | method | trained numbers | of the backbone | stored | windows seen | minutes | EM | F1 | questions |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    for result in results:
        parameters = result.run["parameters"]
        if result.evaluation:
            exact, f1 = (with_interval(result.evaluation[name]) for name in ("exact_match", "f1"))
            questions = f"{result.evaluation['n']:,} of {result.evaluation['data']}"
        else:
            exact, f1 = (f"{result.run['metrics'][name]:.1f}" for name in ("held_out_exact_match", "held_out_f1"))
            questions = f"{result.run['data']['held_out']['questions']:,} held out of training"
        lines.append(
            f"| {result.name} | {result.title} | {parameters['trained']:,} | {result.share:.3g} % "
            f"| {bytes_text(parameters['stored_bytes'])} | {result.run['steps'] * result.windows_per_step:,} "
            f"| {result.run['wall_seconds'] / 60:.1f} | {exact} | {f1} | {questions} |"
        )
    return "\n".join(lines + _against_fine_tuning(results))


def _against_fine_tuning(results: list[Result]) -> list[str]:
    """One sentence on how near the prefix comes, in a paragraph of its own; none if one of the two is missing."""
    evaluated = [result for result in results if result.evaluation and not result.is_export and not result.is_pretrained]
    data = {r.evaluation["data"] for r in evaluated if r.method == "fine-tuning"}  # means over different questions would say nothing
    prefix, full = (
        [r.evaluation["f1"]["value"] for r in evaluated if r.method == method and data == {r.evaluation["data"]}]
        for method in ("p-tuning-v2", "fine-tuning")
    )
    if not prefix or not full:
        return []
    mean, of = sum(prefix) / len(prefix), sum(full) / len(full)
    seeds = f" over {len(prefix)} seeds ({min(prefix):.1f} to {max(prefix):.1f})" if len(prefix) > 1 else ""
    return ["", f"P-tuning v2: mean F1 {mean:.1f}{seeds}, {100 * mean / of:.1f} % of full fine-tuning's {of:.1f}."]


def markdown_table(head: list[str], rows: Iterable[list]) -> str:
    """A Markdown table; the first column is aligned to the left, the others, which hold numbers, to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def sweep_table(record: dict) -> str:
    """A Markdown table of a sweep's points, by name: what was trained, and mean F1 over seeds with its spread, on the evaluation's
    questions, if there are any, and on held-out ones, if all runs share those."""
    trained = {trial["point"]: trial["parameters"]["trained"] for trial in record["trials"]}
    seeds = Counter(trial["point"] for trial in record["trials"])
    evaluation = record["trials"][0]["evaluation"]
    columns = {f"F1 on {short_name(evaluation['data'])}, %": f1_over_seeds(record)} if evaluation else {}
    if shares_held_out(record):
        columns["F1 on held-out articles, %"] = f1_over_seeds(record, held_out_f1)
    rows = [
        [point, f"{trained[point]:,}", seeds[point], *(_with_spread(f1[point]) for f1 in columns.values())]
        for point in f1_over_seeds(record)
    ]
    return markdown_table(["point", "trained numbers", "seeds", *columns], rows)


def gains_table(record: dict, reference: str) -> str:
    """A Markdown table of how a sweep's points do beside one of them with the same seeds: the mean difference of F1, in points, from
    the lowest to the highest seed, and how many seeds are ahead; on held-out questions and on the evaluation's, if there are any.

    Raises:
        InputError: no other point shares a seed with the reference.
    """
    gains = {"held-out articles": gains_over(record, reference)}
    if not gains["held-out articles"]:
        points = ", ".join(f1_over_seeds(record))
        raise InputError(f'The sweep "{record["name"]}" has nothing to compare with "{reference}"; its points are {points}.')
    if evaluation := record["trials"][0]["evaluation"]:
        gains[short_name(evaluation["data"])] = gains_over(record, reference, trial_f1)
    rows = []
    for point in gains["held-out articles"]:
        rows.append([point])
        for runs in (of_points[point] for of_points in gains.values()):
            rows[-1] += [f"{mean(runs):+.1f} [{min(runs):+.1f}, {max(runs):+.1f}]", f"{sum(gain > 0 for gain in runs)} of {len(runs)}"]
    columns = [column for data in gains for column in (f"F1 on {data}, points more", "seeds ahead")]
    return markdown_table([f"beside {reference}", *columns], rows)


def few_shot_table(record: dict) -> str:
    """A Markdown table of a record of `join_by_start`: mean F1 over seeds for each start and number of questions, and its spread."""
    counts = sorted({trial["train_questions"] for trial in record["trials"]})
    rows = [[start, *(_with_spread(f1.get(count)) for count in counts)] for start, f1 in f1_by_start(record).items()]
    return markdown_table(["start", *(f"{count:,} questions" for count in counts)], rows)


def _with_spread(f1: Interval | None) -> str:
    """ "36.2 [33.0, 40.8]", or "36.2" where nothing is known of its spread, or "" where nothing was run."""
    if f1 is None:
        return ""
    return f"{f1.value:.1f}" if f1.low == f1.high else with_interval(vars(f1))


def put_into(file: Path, table: str, opening: str = OPENING, closing: str = CLOSING) -> None:
    """Replace what stands between two marks of a Markdown file by a table.

    Raises:
        InputError: the file lacks these two marks.
    """
    before, found, rest = file.read_text(encoding="utf-8").partition(opening)
    _, end, after = rest.partition(closing)
    if not end:
        raise InputError(f"{file} lacks the marks {opening} and {closing}; put them where the table shall stand.")
    file.write_text(f"{before}{found}\n\n{table}\n\n{end}{after}", encoding="utf-8")


def with_interval(value: dict) -> str:
    """ "54.0 [51.6, 56.2]" of {"value", "low", "high"}."""
    return f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def short_name(source: str) -> str:
    """A data set's name as people read it: without folder, version and suffix."""
    name = source.rstrip("/").rpartition("/")[2].partition(".json")[0]
    return name.removeprefix("squadshifts_").partition("_v1.")[0]


def bytes_text(count: int) -> str:
    """ "90.3 MB" or "593 kB"."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
