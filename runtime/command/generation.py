"""From the options of ``stiv generate`` to requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiv_deploy.runtime.errors import OutputError, RequestError, briefly
from stiv_deploy.runtime.files import check_apart, read_text

if TYPE_CHECKING:
    from stiv_deploy.runtime.bundle.manifest import SamplingDefaults
    from stiv_deploy.runtime.pipeline.long_stage import LongRequest
    from stiv_deploy.runtime.pipeline.records import Recorded
    from stiv_deploy.runtime.pipeline.request import GenerationRequest

INDEX_DIGITS = 6
"""Most digits of a frame number, without its sign."""
FIELDS = {
    "negative_prompt": "negative_prompt",
    "fit": "fit",
    "background": "background",
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "fps": "fps",
    "stride": "stride",
    "original_height": "original_height",
    "original_width": "original_width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "image_guidance": "image_guidance_scale",
    "guidance_mode": "guidance_mode",
    "renorm": "guidance_renorm",
    "guidance_from": "guidance_from",
    "guidance_until": "guidance_until",
    "unseen": "unseen",
    "solver": "solver",
    "time_shift": "time_shift",
    "late_stretch": "late_stretch",
    "skip_blocks": "skip_blocks",
    "count": "count",
    "decode_tile": "decode_tile",
}
"""Parameters of the command that are fields of a request, with the field's name.

Besides them ``prompt`` and each line of ``prompts`` make a request, ``image`` and ``frame`` are the field ``frames``,
``resize`` is a ``fit``, ``seed`` counts on over all videos, and ``request`` reads whole requests, the only way to
``latents``, ``noise``, ``solver_weights`` and ``skipped_steps``.
"""


def default_rows(defaults: "SamplingDefaults") -> list[tuple[str, str]]:
    """Each option that a bundle has a default for, as it is typed, and that default."""
    from stiv_deploy.runtime.pipeline.plan import RECOMMENDED

    return [
        _typed(name, getattr(defaults, RECOMMENDED[field])) for name, field in FIELDS.items() if field in RECOMMENDED
    ]


def _typed(name: str, value: Any) -> tuple[str, str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}, --no-{option}", f"--{option}" if value else f"--no-{option}"
    return f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)


def requests_from_options(options: Mapping[str, Any]) -> "tuple[list[GenerationRequest], set[str]]":
    """Requests of the command's ``options``, and the hashes of the bundles that read ones were made with.

    What is given as an option replaces what a read request says. Raises :class:`RequestError`.
    """
    from stiv_deploy.runtime.pipeline.request import in_a_row, new_seed

    read = _read(options["request"])
    values = {field: options[name] for name, field in FIELDS.items() if options.get(name) is not None}
    frames = parse_frames(options.get("image"), options.get("frame") or [])
    values |= {"frames": frames} if frames else {}
    values |= {"fit": _resized(options["fit"])} if options.get("resize") else {}
    prompts = [*(options["prompt"] or []), *_lines(options["prompts"])]
    requests = _with_prompts([each.request for each in read], prompts, values)
    if options["seed"] is not None:
        requests = in_a_row(requests, options["seed"])
    elif not read:
        requests = in_a_row(requests, new_seed())
    return requests, {each.bundle for each in read if each.bundle is not None}


def _lines(path: Path | None) -> list[str]:
    """Prompts of a text file; :class:`RequestError` if there are none."""
    if path is None:
        return []
    try:
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except ValueError as error:
        raise RequestError(f"{path}: not a file of prompts ({error})") from None
    if not prompts:
        raise RequestError(f"{path}: no prompt in it; write one a line")
    return prompts


def _read(path: Path | None) -> "Sequence[Recorded]":
    from stiv_deploy.runtime.pipeline.records import read_requests

    return [] if path is None else read_requests(path)


def _with_prompts(
    read: "Sequence[GenerationRequest]", prompts: Sequence[str], values: dict[str, Any]
) -> "list[GenerationRequest]":
    """Each request of ``read`` with each of ``prompts``; if either is empty, the others as they are."""
    from stiv_deploy.runtime.pipeline.request import GenerationRequest

    if not (read or prompts):
        raise RequestError("no prompt given; give --prompt, --prompts FILE, or --request with a file that has one")
    if not read:
        return [GenerationRequest(prompt=prompt, **values) for prompt in prompts]
    if not prompts:
        return [request.changed(**replaced(dict(request), values)) for request in read]
    return [
        request.changed(**replaced(dict(request), values | {"prompt": prompt}))
        for request in read
        for prompt in prompts
    ]


def replaced(read: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that were ``read`` of a request, with ``values`` in place of some.

    Weights of a solver and skipped steps are left out where that, the steps or the times become others than theirs;
    these times too where ``skip_blocks`` asks for the bundle's skipped steps, or for none in place of some.
    """
    from stiv_deploy.runtime.pipeline.plan import FOUND, TIMES

    decided = (name for name in ("num_inference_steps", "solver", *TIMES) if name in values)
    others = any(read.get(name) not in (None, values[name]) for name in decided)
    switched = "skip_blocks" in values and (values["skip_blocks"] or bool(read.get("skipped_steps")))
    left_out = (*TIMES, *FOUND) if switched else FOUND if others else ()
    return dict(read) | dict.fromkeys(left_out) | dict(values)


def _resized(fit: str | None) -> str:
    """What ``--resize`` means, beside ``--fit``."""
    if fit == "exact":
        raise RequestError("--resize is given, and --fit exact resizes nothing; give one of them")
    return fit or "crop"


def parse_frames(image: Path | None, frames: Sequence[str]) -> dict[int, Path]:
    """Pictures by frame number from --image and the --frame INDEX=FILE options."""
    given = {} if image is None else {0: image}
    for item in frames:
        index, _, file = item.partition("=")
        digits = index.strip().removeprefix("-")
        if not (file and digits.isdecimal() and len(digits) <= INDEX_DIGITS):
            raise RequestError(f"--frame {briefly(item)}: want INDEX=FILE, as in --frame 7=last.png")
        if int(index) in given:
            raise RequestError(f"frame {int(index)} is given twice; --image is frame 0")
        given[int(index)] = Path(file)
    return given


def recorded_options(path: Path | None, *, pictures: bool) -> dict[str, Any]:
    """Keywords of a call for the one request in ``path``, if that is given, with or without the ``pictures`` it has.

    Raises :class:`RequestError`.
    """
    from stiv_deploy.runtime.pipeline.call import options_of
    from stiv_deploy.runtime.pipeline.records import read_template

    options = {} if path is None else options_of(read_template(path))
    given = () if pictures else ("image", "latents")
    return {name: value for name, value in options.items() if name not in given}


def upsampled_request(requests: "Sequence[GenerationRequest]", options: Mapping[str, Any]) -> "LongRequest":
    """The one of ``requests`` at a higher frame rate, as ``options`` say; :class:`RequestError` if there are more."""
    from stiv_deploy.runtime.pipeline.call import options_of
    from stiv_deploy.runtime.pipeline.long_stage import LongRequest

    if len(requests) != 1 or requests[0].count != 1 or options["grid"]:
        raise RequestError("--upsample is of one clip; give one prompt, and neither --count nor --grid")
    values = options_of(requests[0])
    if options["seed"] is None and options["request"] is None:
        del values["seed"]  # so that it goes on where an interrupted run of the same command began
    return LongRequest(
        task="upsampled",
        arguments=values | {"upsample": options["upsample"]},
        loras=tuple(options["lora"] or ()),
        **{name: options[name] for name in ("bundle", "out", "upscale", "backend", "device", "threads")},
    )


def check_places(options: Mapping[str, Any], clips: Sequence[Path]) -> None:
    """:class:`OutputError` if ``clips`` or the file of ``--json`` stand where they would replace what is read.

    The file of ``--json`` is no clip either.
    """
    from stiv_deploy.runtime.bundle.lora import parse_lora
    from stiv_deploy.runtime.bundle.manifest import MANIFEST

    report = options["json"]
    if report is not None and report.absolute() in [clip.absolute() for clip in clips]:
        raise OutputError(f"{report}: named by both --out and --json; choose two names")
    pictures = parse_frames(options["image"], options["frame"] or []).values()
    loras = [parse_lora(option)[0] for option in options["lora"] or ()]
    read = [*pictures, *loras, options["request"], options["prompts"], options["bundle"] / MANIFEST]
    check_apart([*clips, report], read)
