"""What each efficiency switch of the trainer does to speed and memory: one at a time against the baseline, and all.

    python benchmarks/training_efficiency.py --out benchmarks/results/training-efficiency-DATE  # a CPU, small
    python benchmarks/training_efficiency.py --model XL --out benchmarks/results/training-efficiency-xl-DATE  # a GPU

Every variant runs the trainer's own step on latents of noise in a process of its own, so that its peak memory is its
own; rounds of all variants follow each other, and ratios are taken inside a round, so that a machine that slows down
slows all. Needs torch, numpy, safetensors, tokenizers, pydantic and typer, and matplotlib for the plot.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from stiv_deploy.stiv_ref.data.source import Batch
    from stiv_deploy.stiv_ref.recipe import Recipe
    from stiv_deploy.stiv_ref.training.run import Run

MIB = 2**20
SMALL = {
    "name": "small",
    "blocks": 8,
    "width": 192,
    "heads": 4,
    "text_width": 96,
    "base_frames": 8,
    "base_grid": [8, 8],
}
FULL_BLOCKS = 2
WARMUP = 1
"""Steps before the clock runs: compilation, the allocator, first touches of memory."""
WORDS = ("a", "clip", "of", "noise")
CAPTION = "a clip of noise"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, ``small`` or a config's name, on ``batch`` clips of ``frames`` frames and ``size`` pixels."""

    model: str
    frames: int
    size: int
    batch: int
    micro_batch: int
    steps: int
    threads: int


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "bf16 autocast": {"precision": "bfloat16"},
    "checkpointing of blocks": {"activation_checkpointing": "blocks"},
    "checkpointing but attention": {"activation_checkpointing": "attention"},
    "torch.compile": {"compile": True},
    "MaskDiT": {"mask_ratio": 0.5},
    "gradient accumulation": {"micro_batch": True},
    "Adafactor": {"optimizer": "adafactor"},
    "EMA on the CPU": {"ema_device": "cpu"},
}
VARIANTS["all together"] = {key: value for variant in VARIANTS.values() for key, value in variant.items()}
"""Name -> switches that differ from the baseline: fp32, AdamW, the whole batch at once, EMA beside the weights."""


def recipe_of(setting: Setting, switches: dict[str, Any]) -> "Recipe":
    """The recipe of a variant; MaskDiT adds its two blocks that see all tokens, as in the paper."""
    from stiv_deploy.stiv_ref.config import StivConfig, model_config, parse_config
    from stiv_deploy.stiv_ref.recipe import Recipe

    config = StivConfig.model_validate(SMALL) if setting.model == "small" else model_config(setting.model)
    if "mask_ratio" in switches:
        config = config.model_copy(update={"blocks": config.blocks + FULL_BLOCKS, "full_blocks": FULL_BLOCKS})
    efficiency = {
        key: switches[key]
        for key in ("precision", "activation_checkpointing", "compile", "ema_device")
        if key in switches
    }
    if switches.get("micro_batch"):
        efficiency["micro_batch"] = setting.micro_batch
    stage = {
        "task": "t2v",
        "steps": 1000,
        "batch": setting.batch,
        "frames": setting.frames,
        "resolution": (setting.size, setting.size),
        "learning_rate": 1e-4,
        "mask_ratio": switches.get("mask_ratio", 0.0),
    }
    return parse_config(
        Recipe,
        {
            "name": "efficiency",
            "model": config.model_dump(),
            "threads": setting.threads,
            "text": {"layers": 1, "heads": config.heads if config.text_width % config.heads == 0 else 1},
            "vae": {
                "channels": (8, 8, 8),
                "latent_channels": config.latent_channels,
                "steps": 1,
                "batch": 1,
                "learning_rate": 1e-3,
            },
            "data": {"noise": {"kind": "shards", "path": "none"}},
            "optimizer": {"name": switches.get("optimizer", "adamw")},
            "efficiency": efficiency,
            "sampling": {"frames": setting.frames, "height": setting.size, "width": setting.size},
            "stages": [stage],
        },
        "options",
    )


def batches_of(run: "Run", setting: Setting, parts: Sequence[range]) -> "list[Batch]":
    """Micro-batches of latents of noise."""
    import torch

    from stiv_deploy.stiv_ref.data.source import Batch

    side, channels = setting.size // 8, run.recipe.model.latent_channels
    return [
        Batch(
            latents=torch.randn(len(part), setting.frames, channels, side, side),
            captions=[CAPTION] * len(part),
            micro=torch.tensor([[setting.size, setting.size, 0, 0, 1, setting.frames]]).repeat(len(part), 1).float(),
            names=[f"noise {index}" for index in part],
        )
        for part in parts
    ]


def resident(key: str = "VmRSS") -> int:
    """Resident bytes of this process; with ``VmHWM`` the most there ever were, or since :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status: memory on a CPU is measured on Linux only")


def forget_peak(device: "torch.device") -> None:
    """Begin to measure the peak memory anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: "torch.device", before: int) -> int:
    """Bytes: the most that torch had allocated on the GPU, or the peak resident set above ``before``."""
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before


def measure(setting: Setting, switches: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps of a variant in this process: median tokens a second, and peak memory in bytes.

    One thread on a CPU is measured by the processor time that it took, so that other processes hardly matter.
    """
    import torch

    from stiv_deploy.stiv_ref.training.parallel import Team
    from stiv_deploy.stiv_ref.training.run import new_run
    from stiv_deploy.stiv_ref.training.stages import begin_stage
    from stiv_deploy.stiv_ref.training.step import training_step

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    team = Team()
    before = 0 if team.device.type == "cuda" else resident()
    run = new_run(recipe_of(setting, switches), Path("unused"), team, WORDS)
    run.stage = 1
    begin_stage(run)
    parts = team.parts(setting.batch, run.recipe.efficiency.micro_batch)
    batches = batches_of(run, setting, parts)
    clock = time.process_time if _by_processor_time(team.device.type, setting) else time.perf_counter
    seconds, tokens = [], 0
    for step in range(WARMUP + setting.steps):
        if step == WARMUP:
            forget_peak(team.device)
        started = clock()
        result = training_step(run, batches, parts)  # ends with values on the CPU, so the GPU has ended, too
        if team.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
        tokens = result.tokens
    return {
        "tokens_per_second": tokens / statistics.median(seconds[WARMUP:]),
        "memory": peak_memory(team.device, before),
        "seconds": [round(each, 4) for each in seconds],
        "loss": result.values["loss"],
    }


def _by_processor_time(device: str, setting: Setting) -> bool:
    return device == "cpu" and setting.threads == 1


def in_process(setting: Setting, name: str) -> dict[str, Any]:
    """:func:`measure` in a process of its own; ``error`` is the last line of one that failed, as without memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps([asdict(setting), VARIANTS[name]])]
    # The second: an error in plain lines, of which the last says what it was.
    own = {"OMP_NUM_THREADS": str(setting.threads), "_TYPER_STANDARD_TRACEBACK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **own})
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def summary(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds by variant, and of the ratios to the baseline of the same round, with their range."""
    found: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        errors = [each[name]["error"] for each in rounds if "error" in each[name]]
        if errors:
            found[name] = {"error": errors[0]}
            continue
        row: dict[str, Any] = {}
        for key in ("tokens_per_second", "memory"):
            row[key] = statistics.median(each[name][key] for each in rounds)
            if all("error" not in each["baseline"] for each in rounds):
                ratios = [each[name][key] / each["baseline"][key] for each in rounds]
                row[f"{key}_ratio"] = statistics.median(ratios)
                row[f"{key}_range"] = [min(ratios), max(ratios)]
        found[name] = row
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| switch | tokens/s | of the baseline | peak memory | of the baseline |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | |")
            continue
        cells = [name, f"{row['tokens_per_second']:,.0f}", _ratio(row, "tokens_per_second")]
        cells += [f"{row['memory'] / MIB:,.0f} MiB", _ratio(row, "memory")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], key: str) -> str:
    """The ratio to the baseline with its range over the rounds."""
    if f"{key}_ratio" not in row:
        return ""
    low, high = row[f"{key}_range"]
    return f"{row[f'{key}_ratio']:.2f} ({low:.2f} to {high:.2f})"


def draw(rows: dict[str, dict[str, Any]], out: Path, heading: str) -> None:
    """Bars of both ratios to the PNG file ``out``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: row for name, row in rows.items() if "memory_ratio" in row}
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("tokens_per_second", "memory"), ("tokens / s", "peak memory"), strict=True):
        values = [row[f"{key}_ratio"] for row in shown.values()]
        ranges = [row[f"{key}_range"] for row in shown.values()]
        low = [value - each[0] for value, each in zip(values, ranges, strict=True)]
        high = [each[1] - value for value, each in zip(values, ranges, strict=True)]
        axes.barh(list(shown), values, xerr=[low, high], color="#9db4d6", ecolor="#444444", capsize=2)
        axes.axvline(1, color="#444444", linewidth=0.8)
        axes.set(title=f"{title}, of the baseline")
        axes.grid(True, axis="x", linewidth=0.3)
    panels[0].invert_yaxis()
    figure.suptitle(heading, fontsize=9)
    figure.savefig(out, format="png", dpi=110)


def machine() -> str:
    """The GPU's name, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    return f"{names[0]}, {os.cpu_count()} cores, no GPU"


def report(result: dict[str, Any]) -> str:
    """The whole result as a Markdown page."""
    setting = result["setting"]
    seconds = " (seconds of processor time)" if not result["gpu"] and setting["threads"] == 1 else ""
    memory = "what torch allocated" if result["gpu"] else "the resident set above that after the imports"
    caution = (
        ""
        if result["gpu"]
        else "\nA CPU says little about GPUs: bf16 has no tensor cores like theirs, `torch.compile` makes C++, and\n"
        "EMA is on the CPU anyhow. Token dropping, recomputation, accumulation and the optimizer's state carry over.\n"
    )
    return f"""# Training efficiency, one switch at a time ({result["date"]})

{result["machine"]}; torch {result["versions"]["torch"]}, {setting["threads"]} thread(s); {result["command"]}.
Model {setting["model"]}, {setting["frames"]} frames of {setting["size"]} pixels ({result["tokens"]} tokens a clip),
{setting["batch"]} clips a step; baseline: fp32, AdamW, the whole batch at once, EMA beside the weights. Medians of
{len(result["rounds"])} rounds of {setting["steps"]} steps after {WARMUP}; ratios to the baseline of the same round,
with their range. Tokens are those of the video, dropped or not{seconds}. Peak memory is {memory}.
MaskDiT drops half the spatial tokens and has {FULL_BLOCKS} more blocks; accumulation takes
{setting["micro_batch"]} clip(s) at a time.
{caution}
{table(result["summary"])}
"""


DEFAULTS = {"small": (8, 128, 4, 1), "large": (20, 256, 2, 1)}
"""Frames, pixels, batch and micro-batch of the small model and of the others."""


def main(
    out: Annotated[Path | None, typer.Option(help="Write NAME.json, .md and .png here.", metavar="NAME")] = None,
    model: Annotated[str, typer.Option(help="'small', or a config such as XL.")] = "small",
    frames: Annotated[int | None, typer.Option(min=2, help="Frames of a clip.")] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Height and width in pixels, a multiple of 16.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Clips a step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Clips at a time with accumulation.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all variants are measured.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of a variant in a round.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what every efficiency switch does to tokens a second and to peak memory."""
    if worker is not None:
        setting, switches = json.loads(worker)
        typer.echo(json.dumps(measure(Setting(**setting), switches)))
        return
    import torch

    usual = DEFAULTS["small" if model == "small" else "large"]
    chosen = [given or default for given, default in zip((frames, size, batch, micro_batch), usual, strict=True)]
    setting = Setting(
        model=model,
        frames=chosen[0],
        size=chosen[1],
        batch=chosen[2],
        micro_batch=chosen[3],
        steps=steps,
        threads=threads,
    )
    for switches in VARIANTS.values():
        recipe_of(setting, switches)  # bad sizes are an error here, not in every process
    options = f"--model {model} --frames {setting.frames} --size {setting.size} --batch {setting.batch}"
    more = f"--micro-batch {setting.micro_batch} --rounds {rounds} --steps {steps} --threads {threads}"
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"`python benchmarks/training_efficiency.py {options} {more}`",
        "machine": machine(),
        "gpu": torch.cuda.is_available(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "setting": asdict(setting),
        "tokens": setting.frames * (setting.size // 16) ** 2,
        "rounds": [],
    }
    for number in range(rounds):
        result["rounds"].append(one_round(setting, number))
        result["summary"] = summary(result["rounds"])
        if out is not None:
            write(result, out)  # after every round: a machine may be taken away
    typer.echo(report(result))


def one_round(setting: Setting, number: int) -> dict[str, dict[str, Any]]:
    """All variants once, one after the other."""
    measured: dict[str, dict[str, Any]] = {}
    for name in VARIANTS:
        measured[name] = row = in_process(setting, name)
        shown = row.get("error") or f"{row['tokens_per_second']:,.0f} tokens/s, {row['memory'] / MIB:,.0f} MiB"
        typer.echo(f"round {number + 1}, {name}: {shown}", err=True)
    return measured


def write(result: dict[str, Any], out: Path) -> None:
    """Write JSON, Markdown and, unless all failed, a plot."""
    out.with_name(out.name + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_name(out.name + ".md").write_text(report(result), encoding="utf-8")
    if any("memory_ratio" in row for row in result["summary"].values()):
        draw(result["summary"], out.with_name(out.name + ".png"), f"{result['machine']}, {result['setting']['model']}")


if __name__ == "__main__":
    from command import run

    run(main)
