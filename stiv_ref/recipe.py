"""Training recipes: a TOML file that says what is trained on what, in which stages, checked before the first step.

The progressive recipe of STIV (arXiv 2412.07730, section 3.3) is a list of stages, each of which says from which
earlier stages it takes its spatial and its temporal weights.
"""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stiv_deploy.stiv_ref import bounds
from stiv_deploy.stiv_ref.bounds import (
    COUNT_LIMIT,
    Count,
    Factor,
    Layers,
    Name,
    Processes,
    Rate,
    Scale,
    Seed,
    SomePath,
    Strides,
    Tokens,
)
from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults
from stiv_deploy.stiv_ref.config import FrozenConfig, StivConfig, Student, model_config, parse_config
from stiv_deploy.stiv_ref.digit_canvas import SIZE, check_frames
from stiv_deploy.stiv_ref.errors import ConfigError, one_line
from stiv_deploy.stiv_ref.files import read_text
from stiv_deploy.stiv_ref.lora import LoraSettings
from stiv_deploy.stiv_ref.objective import Objective
from stiv_deploy.stiv_ref.sampler import Solver
from stiv_deploy.stiv_ref.tasks import MIX, TaskName
from stiv_deploy.stiv_ref.text import Pooling
from stiv_deploy.stiv_ref.vae import VaeConfig
from stiv_deploy.stiv_ref.world_settings import SIDE, ViewsData, WorldData

NAME = r"^[A-Za-z0-9._-]+$"
WHOLE_SHARE = 0.15
"""Share of a VAE's steps, the last ones, that see whole frames where the earlier ones see crops."""
SCRATCH = "scratch"
"""In ``spatial_from``: start from new weights."""
Size = tuple[bounds.Size, bounds.Size]
"""Height and width in pixels."""


class WordText(FrozenConfig):
    """The small text encoder, trained with the model; its width is the model's ``text_width``, its words the data's."""

    kind: Literal["words"] = "words"
    layers: Layers = 2
    heads: bounds.Size = 3
    max_tokens: Tokens = 16
    pooling: Pooling = "last"


class FrozenText(FrozenConfig):
    """A frozen text encoder: of a STIV checkpoint, or a pretrained T5, CLIP or BERT in a folder of transformers."""

    kind: Literal["checkpoint", "pretrained"]
    path: SomePath
    max_tokens: Tokens | None = None


class TrainedVae(VaeConfig):
    """The small VAE, trained before the first stage on single frames of ``data``, or of what the first stage has.

    ``crop``: it sees square crops of so many pixels, the busiest of a few of each frame, and whole frames in the last
    :data:`WHOLE_SHARE` of the steps: most of a frame is background, which is learnt in no time.
    """

    kind: Literal["train"] = "train"
    steps: Count
    batch: bounds.Size
    learning_rate: Rate
    kl_weight: float = Field(default=1e-4, ge=0, le=1e6)
    crop: bounds.Size | None = None
    data: Name = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.crop is not None and self.crop % self.spatial_factor:
            raise ValueError(f"crop {self.crop} is not a multiple of {self.spatial_factor} pixels, the VAE's factor")
        return self


class FrozenVae(FrozenConfig):
    """A frozen VAE: of a STIV checkpoint, or a pretrained one in a folder of diffusers."""

    kind: Literal["checkpoint", "pretrained"]
    path: SomePath


class DigitsData(FrozenConfig):
    """Moving digits, drawn on the fly at the resolution of the stage."""

    kind: Literal["digits"] = "digits"


class VideoData(FrozenConfig):
    """Videos with captions: a folder (``captions``: a JSONL file, else a .txt beside each video) or a clips.jsonl.

    ``strides`` are the frame strides drawn from; ``max_broken`` is the share of videos that may fail to decode.
    """

    kind: Literal["videos"]
    path: SomePath
    captions: SomePath | None = None
    strides: Strides = (1,)
    max_broken: float = Field(default=0.5, ge=0, le=1)


class ShardData(FrozenConfig):
    """WebDataset shards, of video files or of pre-computed latents and text states; ``path`` may hold ``*``."""

    kind: Literal["shards"]
    path: Annotated[str, Field(max_length=4_096)]
    strides: Strides = (1,)
    max_broken: float = Field(default=0.5, ge=0, le=1)


class MixedData(FrozenConfig):
    """Samples of several of the recipe's drawn data: ``shares`` has their names and how much there is of each."""

    kind: Literal["mixed"]
    shares: dict[Name, Annotated[float, Field(gt=0, le=COUNT_LIMIT)]] = Field(min_length=1, max_length=1_000)


Data = Annotated[DigitsData | WorldData | ViewsData | MixedData | VideoData | ShardData, Field(discriminator="kind")]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(FrozenConfig):
    """AdamW, Adafactor as the paper has it, or Muon for the matrices of the blocks with AdamW for the rest.

    ``betas`` are 0.9 and 0.99, or the paper's for Adafactor; ``eps`` is that of AdamW.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    betas: tuple[Beta, Beta] | None = None
    eps: float = Field(default=1e-8, gt=0, le=1)

    @property
    def decays(self) -> tuple[float, float]:
        """``betas``, or what they are if not given."""
        return self.betas or ((0.9, 0.999) if self.name == "adafactor" else (0.9, 0.99))


class Efficiency(FrozenConfig):
    """Switches that change speed and memory. Each is off unless it is asked for.

    ``activation_checkpointing`` computes each block again in the backward pass, "blocks" all of it, "attention" all but
    the results of self-attention, as in the paper. ``micro_batch`` samples go through the model at a time in each
    process; the rest is gradient accumulation.
    ``ema_device``: where the averages live, beside the (sharded) weights or in CPU memory. ``workers`` decode data.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: Literal[False, "blocks", "attention"] = False
    micro_batch: bounds.Size | None = None
    ema_device: Literal["model", "cpu"] = "model"
    workers: Processes = 0


class Logging(FrozenConfig):
    """What a run writes besides ``log.jsonl``: TensorBoard events, and contact sheets every ``sample_every`` steps."""

    tensorboard: bool = False
    sample_every: Count | None = None
    sample_count: Factor = 4
    prompts: tuple[Annotated[str, Field(max_length=10_000)], ...] = Field(default=(), max_length=1_000)


Origin = Annotated[str, Field(max_length=4_096)]
"""A stage, or the folder of a checkpoint."""


class Stage(Objective):
    """One stage of the progressive recipe: T2I, T2V, then given frames; from low to high resolution, short to long.

    ``resolution`` is (height, width) in pixels; ``buckets`` are several, of which every batch has one.
    ``spatial_from`` and ``temporal_from`` name earlier stages, or STIV checkpoint folders (a path with a slash):
    a high-resolution video stage takes its spatial weights from the high-resolution image stage and its temporal ones
    from the low-resolution video stage. Both are the stage before unless said; ``spatial_from = "scratch"`` starts
    anew. ``text_from`` says which of the two origins gives what reads the text (cross-attention, projections of the
    text, a trained text encoder). ``patch_frames`` changes the temporal patch size (patch inflation). Learning rate:
    linear over ``warmup`` steps, then constant, as in the paper, or a cosine to a tenth. ``batch`` is that of all
    processes together. ``optimizer``: the recipe's, unless the stage has its own.

    A stage that distills learns from the model that it starts as (:mod:`~stiv_deploy.stiv_ref.distillation`):
    ``guidance``, its guided velocity, at scales of the range ``guidance``, which may be one number; ``flow-map``, of a
    student of guidance, the mean velocity from any time to any later one.
    """

    name: Name = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    data: Name = ""
    steps: Count
    batch: bounds.Size
    frames: bounds.Size = 1
    resolution: Size | None = None
    buckets: tuple[Size, ...] = Field(default=(), max_length=1_000)
    patch_frames: Factor | None = None
    spatial_from: Origin = ""
    temporal_from: Origin = ""
    text_from: Literal["spatial", "temporal"] = "spatial"
    learning_rate: Rate
    warmup: int = Field(default=100, ge=0, le=COUNT_LIMIT)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0, le=1_000)
    optimizer: Optimizer | None = None
    distill: Literal["guidance", "flow-map"] | None = None
    guidance: tuple[Scale, Scale] | None = None

    @field_validator("guidance", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_distill(self) -> Self:
        if self.distill is None:
            if self.guidance is not None:
                raise ValueError('guidance is for a stage that distills; add distill = "guidance", or take it out')
            return self
        if self.guidance is None:
            raise ValueError("a stage that distills needs guidance, the range of its scales: guidance = [1.5, 7.5]")
        if not self.kind.video:
            raise ValueError(f"students are of video models; a {self.task} stage cannot distill")
        if self.spatial_from == SCRATCH:
            raise ValueError('a stage that distills starts as its teacher; take out spatial_from = "scratch"')
        if self.mask_ratio:
            raise ValueError("a stage that distills sees all tokens, as sampling does; take out mask_ratio")
        return self

    @property
    def student(self) -> Student | None:
        """What the model of this stage has instead of guidance branches."""
        return None if self.guidance is None else Student(guidance=self.guidance, flow_map=self.distill == "flow-map")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.kind.video and self.frames != 1:
            raise ValueError(f"task {self.task} trains on one frame, not {self.frames}")
        if self.frames < self.kind.least_frames:
            raise ValueError(f"task {self.task} needs at least {self.kind.least_frames} frames, got {self.frames}")
        if self.kind.conditioned and self.joint_dropout * self.image_dropout > self.text_dropout:
            raise ValueError("joint_dropout * image_dropout must not exceed text_dropout")
        if self.resolution is not None and self.buckets:
            raise ValueError("give resolution or buckets, not both")
        if self.temporal_from and not self.kind.video:
            raise ValueError(f"temporal_from has no meaning for {self.task}, which has no temporal attention")
        if self.temporal_from and self.spatial_from == SCRATCH:
            raise ValueError('spatial_from = "scratch" starts all weights anew; take out temporal_from')
        return self

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All (height, width) of this stage; never empty in a :class:`Recipe`."""
        return self.buckets if self.resolution is None else (self.resolution,)


class Recipe(FrozenConfig):
    """A whole training run.

    ``model`` is a name, or a table with a ``base`` name and what differs from it. With ``lora`` its one stage keeps the
    checkpoint that it starts from as it is, and trains low-rank changes of it.
    """

    name: Name = Field(pattern=NAME)
    model: StivConfig
    seed: Seed = 0
    threads: int = Field(default=2, gt=0, le=2**10)
    ema: float = Field(default=0.999, gt=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0, le=1e12)
    save_every: Count = 250
    text: WordText | FrozenText = Field(default=WordText(), discriminator="kind")
    vae: TrainedVae | FrozenVae = Field(discriminator="kind")
    data: dict[Annotated[Name, Field(pattern=NAME)], Data] = {"digits": DigitsData()}
    optimizer: Optimizer = Optimizer()
    efficiency: Efficiency = Efficiency()
    logging: Logging = Logging()
    sampling: SamplingDefaults = SamplingDefaults()
    lora: LoraSettings | None = None
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=1_000)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Say what TOML authors may leave out: kinds, names of stages, their data and their resolution."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for section, kind in (("text", "words"), ("vae", "train")):
            if isinstance(values.get(section), dict):
                values[section] = {"kind": kind, **values[section]}
        if isinstance(values.get("stages"), list | tuple) and all(isinstance(each, dict) for each in values["stages"]):
            data = values["data"] if isinstance(values.get("data"), dict) else {"digits": None}
            values["stages"] = [
                cls._filled_stage(dict(stage), number, data) for number, stage in enumerate(values["stages"], 1)
            ]
            cls._fill_scales(values["stages"])
        return values

    @staticmethod
    def _fill_scales(stages: list[dict[str, Any]]) -> None:
        """A flow map has the guidance scales of the stage that it starts from, if that is one of the recipe."""
        for before, stage in pairwise(stages):
            origin = stage.get("spatial_from") or before["name"]
            known = [each for each in stages if each["name"] == origin and each is not stage]
            if stage.get("distill") == "flow-map" and stage.get("guidance") is None and known:
                stage["guidance"] = known[0].get("guidance")

    @staticmethod
    def _filled_stage(stage: dict[str, Any], number: int, data: dict[str, Any]) -> dict[str, Any]:
        if not stage.get("name"):
            stage["name"] = f"{number}-{stage.get('task', MIX)}"
        if not stage.get("data") and len(data) == 1:
            stage["data"] = next(iter(data))
        if stage.get("resolution") is None and not stage.get("buckets"):
            there = data.get(str(stage.get("data")))
            side = SIDE if isinstance(there, dict) and there.get("kind") in ("world", "views", "mixed") else SIZE
            stage["resolution"] = (side, side)
        return stage

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        if isinstance(value, str):
            return model_config(value)
        if isinstance(value, dict) and "base" in value:
            changes = {key: each for key, each in value.items() if key != "base"}
            return {**model_config(value["base"]).model_dump(), "name": value["base"], **changes}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        ranks = [stage.kind.video + stage.kind.conditioned for stage in self.stages]
        names = [stage.name for stage in self.stages]
        if ranks != sorted(ranks):
            got = ", ".join(stage.task for stage in self.stages)
            raise ValueError(f"stages must go t2i, t2v, then tasks with given frames, got {got}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"stage names must differ, {min(twice)!r} stands twice")
        if self.model.student is not None:
            raise ValueError("[model] student is what stages that distill make; take it out")
        for number, stage in enumerate(self.stages):
            self._check_origins(number, stage)
            self._check_teacher(number, stage)
            self._check_data(stage)
            self._check_sizes(stage)
        if isinstance(self.vae, TrainedVae):
            self._check_data(self.vae_stage(self.vae))
        self._check_crop(self.stages[0])
        self._check_sampling()
        if self.lora is not None:
            self._check_lora(self.stages[0])
        return self

    def _check_lora(self, stage: Stage) -> None:
        """A LoRA is of one checkpoint, of which all else is frozen."""
        if len(self.stages) > 1:
            raise ValueError(f"[lora] trains one stage, there are {len(self.stages)}; make a recipe of each")
        if stage.distill:
            raise ValueError("[lora]: a stage that distills trains its whole model; take out [lora], or distill")
        if "/" not in stage.spatial_from or stage.temporal_from:
            raise ValueError(
                "[lora] is of one checkpoint; name its folder in spatial_from, and leave out temporal_from"
            )
        for section, part in (("text", self.text), ("vae", self.vae)):
            own = Path(part.path) if isinstance(part, FrozenText | FrozenVae) and part.kind == "checkpoint" else None
            if own != Path(stage.spatial_from):
                raise ValueError(
                    f'[lora] keeps its checkpoint as it is: set kind = "checkpoint" and path = "{stage.spatial_from}" '
                    f"in [{section}]"
                )

    def _check_origins(self, number: int, stage: Stage) -> None:
        """Weights come from earlier stages, or from checkpoints; temporal ones from stages that have them."""
        earlier = {each.name: each for each in self.stages[:number]}
        for key, name in (("spatial_from", stage.spatial_from), ("temporal_from", stage.temporal_from)):
            if not name or "/" in name or (name == SCRATCH and key == "spatial_from"):
                continue
            if name not in earlier:
                there = f"earlier stages are: {', '.join(earlier)}" if earlier else "there is no earlier stage"
                raise ValueError(
                    f"stage {stage.name}: {key} is {name!r}; {there}. A checkpoint folder has a slash in it"
                )
            if key == "temporal_from" and not earlier[name].kind.video:
                raise ValueError(
                    f"stage {stage.name}: temporal_from {name!r} is an image stage, without temporal weights"
                )

    def _check_teacher(self, number: int, stage: Stage) -> None:
        """A stage that distills has a teacher of the right kind; and no other stage starts from a student."""
        before = self.stages[number - 1].name if number else ""
        names = {stage.spatial_from or before, (stage.temporal_from or before) if stage.kind.video else ""} - {""}
        if stage.spatial_from == SCRATCH:
            return
        if stage.distill and not names:
            raise ValueError(
                f"stage {stage.name}: there is no stage before it to distill; name its teacher's checkpoint folder in "
                "spatial_from"
            )
        for each in self.stages[:number]:
            if each.name in names and each.student != self.model_of(stage).teacher.student:
                raise ValueError(f"stage {stage.name}: what it starts from, {each.name}, {_misfit(each, stage)}")

    def _check_data(self, stage: Stage) -> None:
        if stage.data not in self.data:
            there = ", ".join(self.data)
            raise ValueError(f"stage {stage.name}: data is {stage.data or 'not given'!r}; [data] has: {there}")
        self._check_mixed(stage.data)
        parts = self.parts_of(stage.data).values()
        far = [isinstance(each, ShardData) or max(getattr(each, "strides", (1,))) > 1 for each in parts]
        if stage.task == "keyframes" and not any(far):
            raise ValueError(f"stage {stage.name}: keyframes lie far apart; give [data.{stage.data}] a stride above 1")
        for each in parts:
            if isinstance(each, DigitsData | WorldData | ViewsData):
                self._check_drawn(stage, each)

    def _check_mixed(self, name: str) -> None:
        data = self.data[name]
        shares = data.shares if isinstance(data, MixedData) else {}
        if bad := [each for each in shares if not isinstance(self.data.get(each), WorldData | ViewsData)]:
            raise ValueError(f"data.{name} mixes {bad[0]!r}; it can mix what [data] has of the kinds world and views")

    @staticmethod
    def _check_drawn(stage: Stage, data: DigitsData | WorldData | ViewsData) -> None:
        """What is drawn has one square size, on which all frames can be drawn."""
        what = {"digits": "moving digits are", "world": "the world is", "views": "views are"}[data.kind]
        for height, width in stage.sizes:
            if height != width:
                raise ValueError(f"stage {stage.name}: {what} square, resolution is {height}x{width}")
        if len(stage.sizes) > 1:
            raise ValueError(f"stage {stage.name}: {what} drawn in one size; give resolution, not buckets")
        side = stage.sizes[0][0]
        if isinstance(data, DigitsData):
            check_frames(stage.frames, side)
        else:
            data.check(stage.frames, side)

    def _check_sizes(self, stage: Stage) -> None:
        """Frames, pixels and masks fit the patches; with a pretrained VAE the trainer checks again when it is read."""
        if stage.mask_ratio and not self.model.full_blocks:
            raise ValueError(f"stage {stage.name}: mask_ratio needs [model] full_blocks (the paper has 2)")
        patch_frames = self.patch_of(stage)[0]
        if isinstance(self.vae, TrainedVae) and stage.frames > 1 and stage.frames % patch_frames:
            raise ValueError(
                f"stage {stage.name}: {stage.frames} frames are not a multiple of the patch {patch_frames}"
            )
        for size in stage.sizes:
            self._check_pixels(f"stage {stage.name}: resolution", size)

    def _check_crop(self, stage: Stage) -> None:
        least = min(map(min, stage.sizes))
        if isinstance(self.vae, TrainedVae) and self.vae.crop is not None and self.vae.crop > least:
            raise ValueError(
                f"vae.crop {self.vae.crop} is larger than the frames of stage {stage.name} ({least} pixels)"
            )

    def _check_pixels(self, what: str, size: Size) -> None:
        if isinstance(self.vae, TrainedVae):
            multiple = self.vae.spatial_factor * self.model.patch[1]
            if size[0] % multiple or size[1] % multiple:
                got = f"{size[0]}x{size[1]}"
                raise ValueError(f"{what} {got} is not a multiple of {multiple} pixels (VAE factor times patch)")

    def _check_sampling(self) -> None:
        model, sampling = self.model, self.sampling
        if isinstance(self.vae, TrainedVae) and self.vae.latent_channels != model.latent_channels:
            raise ValueError(
                f"vae.latent_channels is {self.vae.latent_channels}, model {model.name} takes {model.latent_channels}"
            )
        if isinstance(self.text, WordText) and model.text_width % self.text.heads:
            raise ValueError(f"text.heads {self.text.heads} does not divide the text width {model.text_width}")
        self._check_pixels("sampling", (sampling.height, sampling.width))
        for stage in self.stages:
            if stage.distill == "flow-map":
                self._check_flow_map(stage)
            if stage.student is not None and not stage.student.covers(sampling.guidance_scale):
                raise ValueError(
                    f"sampling.guidance_scale {sampling.guidance_scale:g} is not among those of stage {stage.name}, "
                    f"{stage.student.scales}"
                )
        patch_frames = self.patch_of(self.stages[-1])[0]
        if isinstance(self.vae, TrainedVae) and sampling.frames % patch_frames:
            raise ValueError(
                f"sampling.frames {sampling.frames} is not a multiple of the temporal patch {patch_frames}"
            )

    def _check_flow_map(self, stage: Stage) -> None:
        if self.sampling.solver is not Solver.EULER:
            raise ValueError(
                f"sampling.solver {self.sampling.solver}: the flow map of stage {stage.name} has euler alone"
            )
        if self.efficiency.precision != "float32":
            raise ValueError(
                f"stage {stage.name}: a flow map learns from small differences, which {self.efficiency.precision} "
                'rounds away; set precision = "float32"'
            )

    def rehearsal(self, steps: int) -> "Recipe":
        """This recipe with at most ``steps`` steps in every stage and for the VAE: all of it, in minutes."""
        stages = tuple(stage.model_copy(update={"steps": min(steps, stage.steps)}) for stage in self.stages)
        changes: dict[str, Any] = {"stages": stages}
        if isinstance(self.vae, TrainedVae):
            changes["vae"] = self.vae.model_copy(update={"steps": min(steps, self.vae.steps)})
        return self.model_copy(update=changes)

    def vae_stage(self, settings: TrainedVae) -> Stage:
        """The stage whose data is what the VAE is trained on, frame by frame."""
        still = {"task": "t2i", "givings": None, "frames": 1, "batch": settings.batch, "name": "vae"}
        first = self.stages[0]
        return first.model_copy(update={**still, "data": settings.data or first.data})

    def parts_of(self, name: str) -> dict[str, Data]:
        """The data called ``name`` by that name, or what is mixed in it, each by its own."""
        data = self.data[name]
        return {each: self.data[each] for each in data.shares} if isinstance(data, MixedData) else {name: data}

    def tasks_of(self, stage: Stage) -> tuple[TaskName, ...]:
        """The task of ``stage`` and, if views are mixed among its clips and frames are given, theirs."""
        mixed = stage.kind.conditioned and isinstance(self.data[stage.data], MixedData)
        views = mixed and any(isinstance(each, ViewsData) for each in self.parts_of(stage.data).values())
        return (stage.task, "views") if views else (stage.task,)

    def patch_of(self, stage: Stage) -> tuple[int, int]:
        """The patch (pt, ps) of ``stage``: 1 frame for images, ``patch_frames`` if given, else the model's."""
        frames = stage.patch_frames or self.model.patch[0] if stage.kind.video else 1
        return frames, self.model.patch[1]

    def model_of(self, stage: Stage) -> StivConfig:
        """The architecture of ``stage``: image models have no temporal attention and a patch of one frame."""
        own = {"temporal": stage.kind.video, "patch": self.patch_of(stage), "student": stage.student}
        return self.model.model_copy(update=own)


def _misfit(origin: Stage, stage: Stage) -> str:
    """Why ``stage`` cannot start from ``origin``, which is not of the kind that it learns from."""
    if stage.distill is None:
        return "is a student, which data would undo; name a stage before"
    if stage.distill == "guidance":
        return "has its guidance distilled already; name a stage before"
    if origin.distill is None:
        return 'has guidance in rows of its own; distill that first (distill = "guidance")'
    if origin.distill == "flow-map":
        return "is a flow map already; name the stage before"
    return f"has other guidance scales, {origin.student.scales}" if origin.student else "has no guidance scales"


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; raise :class:`ConfigError` with one line if anything is off.

    Relative paths in it are relative to the current folder, as on the command line.
    """
    try:
        values = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        reason = one_line(str(error), 200) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ConfigError(f"{path}: cannot be read as TOML ({reason})") from None
    return parse_config(Recipe, values, str(path))
