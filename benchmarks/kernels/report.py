"""The files of a run: a report in markdown, all numbers in JSON, and a plot."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.cases import GOALS
from kernels.contenders import TITLES
from kernels.machine import slug
from kernels.outcome import Outcome, table, to_json
from kernels.step import verdict
from stiv_deploy.stiv_ref.plots import legend_below

TITLE_OF_PART = {
    "check": "Right?",
    "sanitizer": "compute-sanitizer",
    "speed": "Speed of the kernels",
    "step": "Guidance step",
    "blocks": "One whole block in PyTorch",
    "sweep": "Other heuristics",
}
OUTPUTS = {False: "bf16 out", True: "FP8 out"}
DRY = "**Dry run on a CPU with the emulated kernels: every time and rate below is meaningless.**"
METHOD = (
    "Times are medians over rounds in which all contenders of a case take turns, each a CUDA graph of 20 launches over "
    "buffers that together exceed 150 MB and three times the L2, with the first and ninth decile. Bytes are the least "
    "traffic: packed qkv read once, outputs written once (8 D bytes a token for temporal attention, 7 D with FP8 "
    "output; 12 D and 9 D for spatial pre-processing). The copy moves as many bytes, read and written together, in the "
    "same rounds. The chain is bias, QK-norm, RoPE, change of layout, attention and change back, with the inputs and "
    "outputs of the kernel."
)


@dataclass(frozen=True)
class Run:
    """What the parts found, and on what."""

    date: str
    command: str
    machine: Mapping[str, Any]
    clocks: dict[str, dict[str, str]]
    build: Mapping[str, Any]
    outcomes: list[Outcome]
    dry: bool

    @property
    def stem(self) -> str:
        """Of the files' names."""
        return f"{self.date}-{'dry-run' if self.dry else slug(str(self.machine['device']))}-kernels"

    def part(self, name: str) -> Outcome | None:
        """The outcome of part ``name``, if it was run."""
        return next((outcome for outcome in self.outcomes if outcome.part == name), None)


def summary(run: Run) -> str:
    """A table of the parts."""
    rows = [(each.part, each.status, f"{each.seconds:.0f}", each.message.replace("|", "/")) for each in run.outcomes]
    return table(("part", "status", "seconds", "message"), rows)


def markdown(run: Run, plot: str | None) -> str:
    """The whole report."""
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items() if value is not None)
    clocks = [f"{when}: {', '.join(f'{k} {v}' for k, v in found.items())}" for when, found in run.clocks.items()]
    sections = [
        f"# Attention kernels on {run.machine['device']} ({run.date})",
        *([DRY] if run.dry else []),
        f"Made by `{run.command}`. {machine}. Built in {run.build['seconds']:.0f} s by {run.build['compiler']}"
        f"; registers a thread: {run.build['registers']}.",
        *(f"nvidia-smi {line}." for line in clocks if not line.endswith(": ")),
        summary(run),
    ]
    for outcome in run.outcomes:
        text = outcome.markdown or outcome.message or "nothing"
        sections += [f"## {TITLE_OF_PART[outcome.part]}", *([METHOD] if outcome.part == "speed" else []), text]
        if outcome.part == "speed":
            sections.append("Contenders: " + "; ".join(f"{name}: {title}" for name, title in TITLES.items()) + ".")
            sections += [f"![share of the copy rate by bytes]({plot})"] if plot else []
        if outcome.part == "step":
            sections += _verdict(run, outcome)
    return "\n\n".join(sections) + "\n"


def _verdict(run: Run, step: Outcome) -> list[str]:
    blocks = run.part("blocks")
    lines = verdict(step.data, blocks.data.get("rows", []) if blocks else [])
    return (
        ["Of a whole sampling step, against the fastest block in the last section:\n\n" + "\n".join(lines)]
        if lines
        else []
    )


def draw(run: Run, path: Path) -> bool:
    """Plot share of the copy rate by bytes; False where there is nothing to draw or matplotlib is missing."""
    speed = run.part("speed")
    rows = [row for row in speed.data.get("rows", []) if "share_of_copy" in row] if speed else []
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kernel, marker, color in (("temporal", "o", "C0"), ("spatial", "s", "C1")):
        for fp8 in (False, True):
            chosen = [row for row in rows if (row["kernel"], row["fp8"]) == (kernel, fp8)]
            x, y = [row["bytes"] / 1e6 for row in chosen], [100 * row["share_of_copy"] for row in chosen]
            face = "none" if fp8 else color
            axes.scatter(x, y, marker=marker, edgecolors=color, facecolors=face, label=f"{kernel}, {OUTPUTS[fp8]}")
    ends = [least / 1e6 for least, _ in GOALS]
    for (_, share), start, end in zip(GOALS, ends, (3000, ends[0]), strict=True):
        axes.plot((start, end), (100 * share, 100 * share), "k--", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("MB moved")
    axes.set_ylabel("% of the rate of a copy of as many bytes")
    axes.set_title(f"{run.machine['device']}, {run.date}" + (" - dry run, meaningless" if run.dry else ""))
    axes.set_ylim(bottom=0)
    legend_below(figure)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def write(run: Run, folder: Path) -> list[Path]:
    """Write the files of ``run`` into ``folder``; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"{run.stem}.png"
    unfinished = folder / f".{run.stem}.part.png"
    drawn = draw(run, unfinished)
    written = [unfinished.replace(image)] if drawn else []
    numbers = {
        "date": run.date,
        "command": run.command,
        "dry_run": run.dry,
        "machine": dict(run.machine),
        "clocks": dict(run.clocks),
        "build": dict(run.build),
        "parts": {
            each.part: {key: value for key, value in asdict(each).items() if key != "markdown"} for each in run.outcomes
        },
    }
    texts = {".md": markdown(run, image.name if drawn else None), ".json": to_json(numbers)}
    for suffix, text in texts.items():
        path = folder / f"{run.stem}{suffix}"
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        written.append(part.replace(path))
    return written
