"""``stiv bench``: measure a bundle, and compare two measurements."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from stiv_deploy.runtime.command.terminal import Command, JsonTarget, answer, check_json, json_text, progress_bar

if TYPE_CHECKING:
    from stiv_deploy.runtime.command.bench.stage import Size

RUN = "run"
SIZE_PARTS = 3


class Measuring(TyperGroup):
    """A group whose first command is meant where none is named: ``stiv bench bundle``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the first command in front, where the arguments begin with another word."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=Measuring,
    help="""Measure how long a bundle takes, and refuse what would not be fair.

    stiv bench bundle --json bench.json --html bench.html
    """,
    add_completion=False,
    rich_markup_mode="rich",
)


@bench.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command(RUN, cls=Command)
def run(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    batch: Annotated[list[int] | None, typer.Option(help="Clips made at once (repeatable). Default: 1.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="FxHxW", help="Frames, height and width (repeatable). Default: the bundle's."),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Sampling steps (repeatable). Default: the bundle's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the bundle's.")] = None,
    guidance_mode: Annotated[
        Literal["jit", "sit", "none"] | None,
        typer.Option(help="Text and image together, separately, or no guidance. Default: the bundle's."),
    ] = None,
    solver: Annotated[
        Literal["euler", "heun", "ab2"] | None, typer.Option(help="Solver of the sampling ODE. Default: the bundle's.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture that every clip starts from.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to show, in turns (repeatable).")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file of more prompts, one a line; empty lines are none.")
    ] = None,
    percentile: Annotated[
        list[float] | None, typer.Option(help="Percentile of the latency (repeatable). Default: 50 and 90.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Samples of each work. Default: what the percentiles take, and until p50 is known to 2 %."),
    ] = None,
    scenario: Annotated[
        Literal["singlestream", "offline"] | None,
        typer.Option(help="Let MLPerf's LoadGen ask for clips: MLPerf-style, not an MLPerf result."),
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="Clips that a scenario asks for at least. Default: 64; offline 248.")
    ] = None,
    least_seconds: Annotated[float, typer.Option("--seconds", help="How long a scenario lasts at least.")] = 600.0,
    loadgen_logs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep LoadGen's own logs of a scenario in this folder.")
    ] = None,
    keep_texts: Annotated[
        bool, typer.Option("--keep-texts", help="Let prompts that come again cost nothing; the result says so.")
    ] = False,
    nvtx: Annotated[
        bool, typer.Option("--nvtx", help="Make phases and graphs ranges of NVTX, for Nsight Systems.")
    ] = False,
    cold: Annotated[bool, typer.Option(help="Measure a cold start and its peak memory, in a fresh process.")] = True,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Measure where it is not fair; every output then calls it invalid.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="Backend ('stiv doctor' lists them); default: the best.")] = None,
    device: Annotated[int, typer.Option(metavar="INDEX", help="GPU, as CUDA counts them.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Page of its own: every sample, stages, the machine.")
    ] = None,
    json: JsonTarget = None,
) -> None:
    """Measure the latency of clips by stage, the throughput, and a cold start.

    Every batch, size and number of steps is warmed up until it gets no faster, then sampled, each sample with a new
    seed. What would not be fair is refused: other work on the machine, too few samples, results that are kept.

    stiv bench run bundle --batch 1 --batch 4 --steps 10 --steps 30 --json bench.json
    """
    from stiv_deploy.runtime.command.bench import show, stage
    from stiv_deploy.runtime.command.bench.loadgen import check_logs
    from stiv_deploy.runtime.command.bench.page import bench_page, check_page
    from stiv_deploy.runtime.command.generation import requests_from_options
    from stiv_deploy.runtime.files import write_text

    check_json(json, bundle, prompts, image)
    check_page(html, json)
    check_logs(loadgen_logs)
    fixed = {"request": None, "seed": 0, "steps": None}
    read, _ = requests_from_options(context.params | fixed | {"prompt": prompt or (None if prompts else [""])})
    asked = stage.BenchRequest(
        bundle=bundle,
        template=read[0],
        prompts=tuple(each.prompt for each in read) if prompt or prompts else stage.PROMPTS,
        batches=tuple(dict.fromkeys(batch or [1])),
        sizes=tuple(dict.fromkeys(map(parse_size, size or []))),
        steps=tuple(dict.fromkeys(steps or [])),
        percentiles=tuple(each / 100 for each in sorted(set(percentile or [50, 90]))),
        count=samples,
        scenario=scenario,
        queries=queries,
        least_seconds=least_seconds,
        logs=loadgen_logs,
        texts=keep_texts,
        nvtx=nvtx,
        cold=cold,
        anyway=anyway,
        backend=backend,
        device=device,
        threads=threads,
    )
    with progress_bar("bench") as progress:
        report = stage.bench(asked, progress)
    if html is not None:
        write_text(html, bench_page(report), "choose another --html")
    answer(json, lambda: json_text(report), lambda: show.report(report))


def parse_size(text: str) -> "Size":
    """``16x256x256`` as a size; :class:`~stiv_deploy.runtime.errors.RequestError`."""
    from stiv_deploy.runtime.command.bench.stage import Size
    from stiv_deploy.runtime.errors import RequestError, briefly

    parts = text.split("x")
    if len(parts) != SIZE_PARTS or not all(each.isdecimal() and len(each) < 7 for each in parts):
        raise RequestError(f"--size {briefly(text)}: want FRAMESxHEIGHTxWIDTH, as in 16x256x256")
    return Size(*map(int, parts))


@bench.command("against", cls=Command)
def against(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="torch-eager, torch-compile, a backend, or another bundle (repeatable). Default: both of torch."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="What the bundle was exported from. Default: the one in checkpoints/.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Clips made at once.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the bundle's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the bundle's.")] = None,
    guidance_mode: Annotated[
        Literal["jit", "sit", "none"] | None,
        typer.Option(help="Text and image together, separately, or no guidance. Default: the bundle's."),
    ] = None,
    solver: Annotated[
        Literal["euler", "heun", "ab2"] | None, typer.Option(help="Solver of the sampling ODE. Default: the bundle's.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds of 6 turns, each of new processes, 2 to 12. Default: 4, or until ratios are known to 2 %."
        ),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Measure where it is not fair; every output then calls it invalid.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="Backend of the bundle; default: the best.")] = None,
    device: Annotated[int, typer.Option(metavar="INDEX", help="GPU, as CUDA counts them.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each; default: all cores.")] = None,
    json: JsonTarget = None,
) -> None:
    """Measure a bundle against PyTorch, other backends or other bundles: the same clips, by turns.

    Each has a process of its own. Times are from prompts to frames in memory. Refused is what makes other clips than
    the bundle does of the same prompts and seeds, and all that 'stiv bench run' refuses of a machine.

    stiv bench against bundle --baseline torch-eager --baseline torch-compile
    stiv bench against bundle-fp8 --baseline bundle
    """
    from stiv_deploy.runtime.command.bench import against as rivalry
    from stiv_deploy.runtime.command.bench import show
    from stiv_deploy.runtime.command.bench.rivals import TORCH
    from stiv_deploy.runtime.command.generation import requests_from_options

    check_json(json, bundle)
    read, _ = requests_from_options(context.params | {"request": None, "seed": 0, "prompt": [""], "prompts": None})
    asked = rivalry.AgainstRequest(
        bundle=bundle,
        template=read[0],
        baselines=tuple(dict.fromkeys(baseline or TORCH)),
        checkpoint=checkpoint,
        batch=batch,
        rounds=rounds,
        backend=backend,
        device=device,
        threads=threads,
        anyway=anyway,
    )
    with progress_bar("against") as progress:
        found = rivalry.against(asked, progress)
    answer(json, lambda: json_text(found), lambda: show.against(found))


@bench.command("plan", cls=Command)
def plan(
    what: Annotated[str, typer.Argument(metavar="BUNDLE|XL|XXL|M", help="Bundle folder, or a size of the paper.")],
    size: Annotated[
        str | None, typer.Option(metavar="FxHxW", help="Frames, height and width. Default: the bundle's; 20x256x256.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Guidance branches. Default: the bundle's; 2.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Of the model. Default: the bundle's; 50.")] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="GPU (repeatable). Default: all that are known.")] = None,
    precision: Annotated[
        Literal["bfloat16", "fp8", "int8"] | None, typer.Option(help="Of the linear layers. Default: all.")
    ] = None,
    form: Annotated[
        Literal["native", "plugins"] | None, typer.Option(help="Without or with our kernels. Default: both.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(metavar="REPORT.json", help="Report of 'stiv bench' to compare (repeatable).")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="LIST", help="Also one clip on so many GPUs together, as 1,2,4,8.")
    ] = None,
    link: Annotated[
        Literal["nvlink", "pcie5", "pcie4"], typer.Option(help="What is between the GPUs of --gpus.")
    ] = "nvlink",
    json: JsonTarget = None,
) -> None:
    """Predict how long denoising would take on GPUs, from operations and bytes; nothing is run.

    stiv bench plan XL --size 20x512x512 --gpu H100 --gpu "RTX 5090" --precision fp8
    stiv bench plan M --size 20x512x512 --gpu H100 --gpus 1,2,4,8 --link pcie5
    """
    from stiv_deploy.runtime.command.bench import plan as planning
    from stiv_deploy.runtime.command.bench import show
    from stiv_deploy.runtime.command.bench.predict import EFFICIENCIES, FORMS, PRECISIONS
    from stiv_deploy.runtime.command.bench.scale import parse_counts

    check_json(json, *(measured or []))
    asked = planning.PlanRequest(
        what=what,
        size=None if size is None else parse_size(size),
        rows=rows,
        evaluations=evaluations,
        gpus=tuple(dict.fromkeys(gpu or EFFICIENCIES)),
        precisions=PRECISIONS if precision is None else (precision,),
        forms=FORMS if form is None else (form,),
        measured=tuple(measured or ()),
        counts=() if gpus is None else parse_counts(gpus),
        link=link,
    )
    found = planning.plan(asked)
    answer(json, lambda: json_text(found), lambda: show.plan(found))


@bench.command("compare", cls=Command)
def compare(
    base: Annotated[Path, typer.Argument(metavar="A.json", help="What to compare with.", show_default=False)],
    ours: Annotated[Path, typer.Argument(metavar="B.json", help="What to compare.", show_default=False)],
    differ: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[steps|guidance|solver|caches|machine]", help="What differs on purpose (repeatable); it is told."
        ),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare what does not compare; every output then calls it invalid.")
    ] = False,
    json: JsonTarget = None,
) -> None:
    """Compare two measurements: seconds of B over those of A, with intervals of 95 %.

    Refused are measurements that are invalid, and those of different work, threads, clocks, transport or caches.

    stiv bench compare A.json B.json
    """
    from stiv_deploy.runtime.command.bench import show
    from stiv_deploy.runtime.command.bench.compare import compare as compared
    from stiv_deploy.runtime.command.bench.record import BenchReport

    check_json(json, base, ours)
    found = compared(BenchReport.read(base), BenchReport.read(ours), differ or [], anyway=anyway)
    answer(json, lambda: json_text(found), lambda: show.comparison(found))
