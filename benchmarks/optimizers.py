"""A short training under four optimizers: AdamW, Adafactor (the paper's, and torch's, which scales by size), Muon.

    python benchmarks/optimizers.py --out benchmarks/results/optimizers-DATE

A small text-to-video model on moving digits, from new weights, with the paper's learning rate (2e-4, constant after
warm-up); all see the same clips, noise and times. The head starts at zero, so that the velocity does, and so do
the gates of temporal attention. Text encoder and VAE are those of the shipped checkpoint, frozen. Nothing is timed.
"""

import json
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from command import run
from torch import Tensor

from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training.optimizer import allocate
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.run import Run, new_run
from stiv_deploy.stiv_ref.training.stages import begin_stage
from stiv_deploy.stiv_ref.training.step import training_step

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
RATE, WARMUP = 2e-4, 50
ROWS = 10
"""So many times of a training are shown."""


def recipe_of(optimizer: str, steps: int, batch: int, checkpoint: Path) -> Recipe:
    """One T2V stage of the mini model from scratch."""
    frozen = {"kind": "checkpoint", "path": str(checkpoint)}
    stage = {
        "task": "t2v",
        "frames": 8,
        "steps": steps,
        "batch": batch,
        "learning_rate": RATE,
        "warmup": WARMUP,
        "schedule": "constant",
        "logit_normal": False,
        "time_shift": 3.0,
        "spatial_from": "scratch",
    }
    values = {
        "name": "optimizers",
        "model": {"base": "tiny", "blocks": 4, "width": 96, "heads": 3},
        "threads": 1,
        "text": frozen,
        "vae": frozen,
        "optimizer": {"name": optimizer, "betas": (0.9, 0.999)},
        "stages": [stage],
    }
    return parse_config(Recipe, values, "options")


def torchs(started: Run) -> torch.optim.Optimizer:
    """torch's Adafactor for the run, its moments allocated."""
    optimizer = torch.optim.Adafactor(started.parameters.values(), lr=RATE)
    allocate(optimizer, started.parameters)
    return optimizer


Arm = tuple[str, Callable[[Run], torch.optim.Optimizer] | None]
ARMS: dict[str, Arm] = {
    "AdamW": ("adamw", None),
    "Adafactor, the paper's": ("adafactor", None),
    "Adafactor of torch, scaled by size": ("adamw", torchs),
    "Muon for the blocks' matrices": ("muon", None),
}
"""Name -> the recipe's optimizer, and what replaces it."""


def begun(arm: Arm, steps: int, batch: int, checkpoint: Path) -> Run:
    """A run of ``arm`` before its first step."""
    optimizer, other = arm
    started = new_run(
        recipe_of(optimizer, steps, batch, checkpoint), Path("unused"), Team(device=torch.device("cpu")), ()
    )
    started.stage = 1
    begin_stage(started)
    if other is not None:
        started.optimizer = other(started)
    return started


def sizes(started: Run) -> dict[str, float]:
    """Root mean square of what started at zero: the head, and the gates of temporal attention."""
    weights = {name: parameter.detach() for name, parameter in started.parameters.items()}
    gates = torch.cat([weight for name, weight in weights.items() if name.endswith("temporal_gate")])
    return {"head": _rms(weights["model.head.out.weight"]), "gates": _rms(gates)}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def trained(started: Run, steps: int) -> Iterator[float]:
    """The losses of ``steps`` steps."""
    source = open_source(started.recipe, started.current, started.stage)
    parts = started.team.parts(started.current.batch, None)
    for batches in source.batches(range(steps), parts):
        yield training_step(started, batches, parts).values["loss"]


def measure(arm: Arm, steps: int, batch: int, checkpoint: Path) -> dict[str, Any]:
    """Train ``arm``: mean losses and the sizes of what started at zero, at :data:`ROWS` times."""
    started, span = begun(arm, steps, batch, checkpoint), max(1, steps // ROWS)
    rows: list[dict[str, float]] = []
    losses: list[float] = []
    for step, loss in enumerate(trained(started, steps), 1):
        losses.append(loss)
        if step % span == 0:
            rows.append({"step": step, "loss": sum(losses[-span:]) / span, **sizes(started)})
    assert started.optimizer is not None
    moments = sum(value.numel() for state in started.optimizer.state.values() for value in state.values())
    return {"rows": rows, "moments_per_weight": moments / sum(each.numel() for each in started.parameters.values())}


def table(result: dict[str, Any]) -> str:
    """The end of every training as Markdown."""
    lines = ["| optimizer | loss | size of the head | of the gates | moments a weight |", "|---|---:|---:|---:|---:|"]
    for name, arm in result["arms"].items():
        last = arm["rows"][-1]
        cells = [name, f"{last['loss']:.3f}", f"{last['head']:.1e}", f"{last['gates']:.1e}"]
        lines.append(f"| {' | '.join(cells)} | {arm['moments_per_weight']:.2f} |")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """The whole result as a Markdown page."""
    return f"""# Optimizers, and what starts at zero ({result["date"]})

`{result["command"]}`; {result["machine"]}, torch {result["torch"]}. A T2V model (4 blocks, width 96) on moving digits
from new weights, {result["steps"]} steps of batch {result["batch"]}, learning rate {RATE:g} after {WARMUP} steps of
warm-up; the same draws for all. Loss: mean of the last tenth; sizes: root mean square after the last step; moments:
numbers that the optimizer keeps, by weight.

{table(result)}

torch's Adafactor multiplies a step by the size of the parameter, at least 1e-3: what starts at zero moves by 2e-7 a
step, and neither the velocity nor temporal attention begins.
"""


def main(
    out: Annotated[Path | None, typer.Option(help="Write NAME.json and NAME.md here.", metavar="NAME")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each optimizer.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 16,
    checkpoint: Annotated[Path, typer.Option(help="Its text encoder and VAE are used.")] = CHECKPOINT,
) -> None:
    """Train the same model with each optimizer, and look at what started at zero."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/optimizers.py --steps {steps} --batch {batch}",
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "steps": steps,
        "batch": batch,
        "arms": {},
    }
    for name, arm in ARMS.items():
        result["arms"][name] = measure(arm, steps, batch, checkpoint)
        typer.echo(f"{name}: loss {result['arms'][name]['rows'][-1]['loss']:.3f}", err=True)
    typer.echo(report(result))
    if out is not None:
        out.with_name(out.name + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_name(out.name + ".md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    run(main)
