"""The three files of a study: JSON with every number, Markdown with question, table and verdicts, and a plot."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import above  # noqa: F401  # isort: split
import typer
from digit_scores import cpu_name
from ground import Ground
from grounds import suffixed
from records import paired, write_text

from stiv_deploy.stiv_ref.files import replaced_file
from stiv_deploy.stiv_ref.plots import legend_below

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results/studies")
Result = dict[str, Any]
Smallest = Annotated[bool, typer.Option(help="A few steps, and a clip, of seed 0: shows that it runs.")]
Seeds = Annotated[str, typer.Option(help="Seeds, with commas.")]
Out = Annotated[Path | None, typer.Option(help="JSON file; table and plots go beside it. [default: dated]")]
Work = Annotated[Path, typer.Option(help="Folder of finished parts, with which a stopped run goes on.")]
RULE = (
    "A difference is taken seed by seed. It is called **clear** when the two-sided t-test over the seeds gives "
    "p < 0.05 (not corrected for the number of rows), **likely** when all seeds agree on its sign but p is larger, and "
    "otherwise **too small to say**."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question to the numbers: ``first`` minus ``second``, seed by seed."""

    what: str
    first: Sequence[float]
    second: Sequence[float]
    unit: str = ""
    digits: int = 1

    def row(self) -> str:
        """A table row: what, difference with its range, verdict."""
        found = paired(self.first, self.second)
        low, mean, high = (f"{found[key]:+.{self.digits}f}" for key in ("low", "mean", "high"))
        return f"| {self.what} | {mean} ({low}..{high}) {self.unit} | {verdict(self.first, self.second)} |"


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """'clear', 'likely' or 'too small to say', by :data:`RULE`; 'one seed' says nothing."""
    from scipy.stats import t

    found = paired(first, second)
    count = len(first)
    if count < 2:
        return "one seed"
    if found["sd"] == 0:
        return "clear" if found["mean"] else "no difference"
    p = 2 * float(t.sf(abs(found["mean"]) * count**0.5 / found["sd"], count - 1))
    if p < 0.05:
        return "clear"
    return "likely" if found["one_sign"] else "too small to say"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything of a study's result but the plot; ``tables`` are Markdown lines, ``data`` goes to the JSON file."""

    title: str
    question: str
    setup: str
    paper: str
    tables: Sequence[str]
    comparisons: Sequence[Comparison]
    data: Result
    seeds: Sequence[int]
    notes: Sequence[str] = field(default_factory=tuple)

    def markdown(self, picture: str, sheet: str | None) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}, {date.today().isoformat()}", "", f"**Question.** {self.question}", ""]
        lines += [f"**Set-up.** {self.setup}", "", f"**The paper.** {self.paper}", ""]
        lines += [f"`{command_line()}`", "", f"{machine()}. Mean (lowest..highest) over {len(self.seeds)} seeds.", ""]
        lines += [*self.tables, "", f"![plot]({picture})", ""]
        if sheet:
            lines += [f"![clips]({sheet})", ""]
        lines += ["## What we found", "", RULE, "", "| what | difference | verdict |", "|---|---|---|"]
        lines += [comparison.row() for comparison in self.comparisons]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*lines, ""])


def machine() -> str:
    """Processor and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("stiv-deploy", "torch", "numpy", "scikit-learn"))
    return f"{cpu_name()}; {versions}"


def command_line() -> str:
    """The command of this process."""
    return f"python {shlex.join(sys.argv)}"


def default_out(name: str, ground: Ground) -> Path:
    """The dated result file of the study ``name`` on ``ground``."""
    return RESULTS / f"{suffixed(name, ground)}-{date.today().isoformat()}.json"


def save_plot(path: Path, draw: Callable[["Figure"], None], size: tuple[float, float]) -> None:
    """Draw a figure of ``size`` inches into the PNG file ``path``, its legend below all panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    legend_below(figure)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def save(
    report: Report, out: Path, draw: Callable[["Figure"], None], size: tuple[float, float], sheet: str | None = None
) -> str:
    """Write the JSON file ``out``, and beside it table and plot; returns the Markdown. ``sheet`` is its file name."""
    data = {
        "title": report.title,
        "command": command_line(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "seeds": list(report.seeds),
        "setup": report.setup,
        "comparisons": [
            {"what": one.what, **paired(one.first, one.second), "verdict": verdict(one.first, one.second)}
            for one in report.comparisons
        ],
        **report.data,
    }
    picture = out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_plot(picture, draw, size)
    text = report.markdown(picture.name, sheet)
    write_text(out, json.dumps(rounded(data), indent=1) + "\n")
    write_text(out.with_suffix(".md"), text)
    return text


def rounded(value: Any) -> Any:
    """``value`` with all floats at five significant digits: a result file for readers."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def band(axes: Any, x: Sequence[float], by_seed: Sequence[Sequence[float]], **style: Any) -> None:
    """A line of the mean over seeds with a band from the lowest to the highest; ``by_seed`` [seeds][len(x)]."""
    columns = list(zip(*by_seed, strict=True))
    (line,) = axes.plot(x, [sum(column) / len(column) for column in columns], marker="o", markersize=3, **style)
    axes.fill_between(
        x, list(map(min, columns)), list(map(max, columns)), alpha=0.18, color=line.get_color(), linewidth=0
    )
