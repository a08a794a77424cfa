"""Recipes: the shipped one is valid, everything impossible is one clear line before any training."""

import tomllib
from pathlib import Path

import pytest

from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig, Student, read_config
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.recipe import Recipe, WordText, load_recipe

SHIPPED = Path(load_recipe.__code__.co_filename).parents[1] / "recipes" / "tiny.toml"


def test_the_shipped_recipe_is_the_papers_order() -> None:
    recipe = load_recipe(SHIPPED)
    assert recipe.model == CONFIGS["tiny"].model_copy(update={"cross_qk_norm": False})
    assert recipe.text == WordText(pooling="mean")
    assert list(dict.fromkeys(stage.task for stage in recipe.stages)) == ["t2i", "t2v", "ti2v"]
    assert recipe.sampling.frames >= 8


def test_the_large_recipe_is_the_papers() -> None:
    """arXiv 2412.07730, sections 3.1, B and D."""
    recipe = load_recipe(SHIPPED.with_name("xl.toml"))
    model = recipe.model
    assert (model.heads, model.patch, model.latent_channels, model.text_width) == (18, (2, 2), 8, 1280)
    assert (model.blocks - model.full_blocks, model.full_blocks, model.cross_qk_norm) == (28, 2, True)
    assert (recipe.ema, recipe.gradient_clip, recipe.optimizer.name) == (0.9999, 1.0, "adafactor")
    steps = {(stage.kind.video, bool(stage.mask_ratio)): stage.steps for stage in recipe.stages}
    assert steps == {
        (False, True): 400_000,
        (False, False): 50_000,
        (True, True): 400_000,
        (True, False): 100_000,
    }
    for stage in recipe.stages:
        assert (stage.learning_rate, stage.warmup, stage.schedule) == (2e-4, 1000, "constant")
        assert (stage.batch, stage.frames) == ((1024, 20) if stage.kind.video else (4096, 1))
        assert (stage.text_dropout, stage.image_dropout, stage.joint_dropout) == (0.1, 0.08, 0.0)
        assert not stage.kind.video or recipe.data[stage.data].strides == (3,)
        assert recipe.patch_of(stage) == (2 if stage.kind.video else 1, 2)


FAULTS = {
    "unknown key": ('name = "short"', 'name = "short"\ncolour = 1', "colour: Extra inputs"),
    "unknown stage key": ("warmup = 2", "warmups = 2", "stages.0.warmups: Extra inputs"),
    "unknown model": ('model = "small"', 'model = "huge"', "no model config named 'huge'; there are: tiny"),
    "bad name": ('name = "short"', 'name = "a/b"', "name: String should match"),
    "wrong type": ("threads = 1", 'threads = "many"', "threads: Input should be a valid integer"),
    "no steps": ("steps = 5", "steps = 0", "steps: Input should be greater than 0 (got 0)"),
    "unknown task": (
        'task = "t2i"',
        'task = "v2v"',
        "stages.0.task: Input should be 't2i', 't2v', 'ti2v', 'predict', 'interpolate', 'keyframes', 'views', 'all' "
        "or 'mix'",
    ),
    "image with frames": ('task = "t2i"', 'task = "t2i"\nframes = 2', "task t2i trains on one frame, not 2"),
    "video of one frame": ('task = "t2i"', 'task = "t2v"', "task t2v needs at least 2 frames, got 1"),
    "nothing to predict": (
        'task = "ti2v"\nframes = 3',
        'task = "predict"\nframes = 4',
        "task predict needs at least 5 frames, got 4",
    ),
    "dropout of given frames": (
        'task = "ti2v"',
        'task = "interpolate"\nimage_dropout = 0.5\njoint_dropout = 0.5',
        "must not exceed text_dropout",
    ),
    "no task": ('task = "ti2v"', "", "stages.1: give a task (t2i, t2v, "),
    "task and mix": ('task = "ti2v"', 'task = "ti2v"\ngivings = {first = 1}', "task ti2v has givings of its own"),
    "shares": ('task = "ti2v"', "givings = {none = 0.5, first = 0.4}", "stages.1.givings: the shares add up to 0.9"),
    "unknown giving": ('task = "ti2v"', "givings = {last = 1}", "'last' is no giving of frames; there are none, first"),
    "nothing left of a mix": (
        'task = "ti2v"\nframes = 3',
        'givings = {none = 0.5, "first 3" = 0.5}\nframes = 3',
        "task mix needs at least 4 frames, got 3",
    ),
    "key frames side by side": (
        'task = "ti2v"',
        'task = "keyframes"',
        "stage 2-keyframes: keyframes lie far apart; give [data.digits] a stride above 1",
    ),
    "too many frames": ('task = "ti2v"\nframes = 3', 'task = "ti2v"\nframes = 10', "there can be 1 to 9"),
    "dropout": (
        'task = "ti2v"',
        'task = "ti2v"\nimage_dropout = 0.5\njoint_dropout = 0.5',
        "must not exceed text_dropout",
    ),
    "schedule": ("warmup = 2", 'schedule = "linear"', "stages.0.schedule: Input should be 'cosine' or 'constant'"),
    "ema": ("threads = 1", "threads = 1\nema = 1.0", "ema: Input should be less than 1"),
    "latent channels": (
        "channels = [4, 4]",
        "latent_channels = 3\nchannels = [4, 4]",
        "vae.latent_channels is 3, model small takes 4",
    ),
    "text heads": ("[vae]", "[text]\nheads = 5\n[vae]", "text.heads 5 does not divide the text width 24"),
    "vae too deep": (
        "channels = [4, 4]",
        "channels = [4, 4, 4, 4, 4]",
        "stage 1-t2i: resolution 32x32 is not a multiple of 64",
    ),
    "crop": (
        "channels = [4, 4]",
        "crop = 36\nchannels = [4, 4]",
        "vae.crop 36 is larger than the frames of stage 1-t2i (32",
    ),
    "sampling size": ("[sampling]", "[sampling]\nheight = 36", "sampling 36x32 is not a multiple of 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_recipes_are_one_clear_line(recipe_file: Path, fault: str) -> None:
    old, new, message = FAULTS[fault]
    text = recipe_file.read_text()
    assert old in text
    recipe_file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{recipe_file}: ")
    assert "\n" not in str(caught.value)
    assert "{" not in str(caught.value)  # no dump of the whole recipe
    assert caught.value.exit_code == 2


def test_stage_order(recipe_file: Path) -> None:
    head, first, second = recipe_file.read_text().split("[[stages]]")
    recipe_file.write_text("[[stages]]".join((head, second, first)))
    with pytest.raises(ConfigError, match="stages must go t2i, t2v, then tasks with given frames, got ti2v, t2i"):
        load_recipe(recipe_file)


def test_a_stage_of_ones_own_mix(recipe_file: Path) -> None:
    mix = 'givings = {none = 0.25, first = 0.25, "every 2" = 0.25, ends = 0.25}'
    recipe_file.write_text(recipe_file.read_text().replace('task = "ti2v"', mix))
    recipe = load_recipe(recipe_file)
    stage = recipe.stages[-1]
    assert (stage.name, stage.task, list(stage.kind.mix)) == ("2-mix", "mix", ["none", "first", "every 2", "ends"])
    assert stage.kind.conditioned
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("content", [None, b"name = ", b"\xff\xfe\x00"])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as TOML") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_unreadable_json_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_config(StivConfig, tmp_path / "missing.json")


PROGRESSIVE = """
name = "progressive"
[model]
base = "small"
blocks = 4
full_blocks = 2
[text]
kind = "checkpoint"
path = "checkpoints/tiny"
[vae]
kind = "checkpoint"
path = "checkpoints/tiny"
[data.digits]
kind = "digits"
[data.clips]
kind = "videos"
path = "clips"
strides = [1, 2]
[[stages]]
name = "t2i-low"
data = "digits"
task = "t2i"
resolution = [16, 16]
mask_ratio = 0.5
steps = 5
batch = 4
learning_rate = 1e-3
[[stages]]
name = "t2i-high"
data = "digits"
task = "t2i"
steps = 5
batch = 4
learning_rate = 1e-3
[[stages]]
name = "t2v-low"
data = "clips"
task = "t2v"
frames = 4
buckets = [[16, 16], [16, 32]]
spatial_from = "t2i-low"
steps = 5
batch = 4
learning_rate = 1e-3
[[stages]]
name = "ti2v-high"
data = "clips"
task = "ti2v"
frames = 8
patch_frames = 2
spatial_from = "t2i-high"
temporal_from = "t2v-low"
steps = 5
batch = 4
learning_rate = 1e-3
"""


@pytest.fixture
def progressive_file(recipe_file: Path) -> Path:
    recipe_file.write_text(PROGRESSIVE)
    return recipe_file


def test_progressive_recipe(progressive_file: Path) -> None:
    recipe = load_recipe(progressive_file)
    assert (recipe.model.blocks, recipe.model.full_blocks, recipe.model.width) == (4, 2, 32)
    assert [stage.sizes for stage in recipe.stages] == [((16, 16),), ((32, 32),), ((16, 16), (16, 32)), ((32, 32),)]
    models = [recipe.model_of(stage) for stage in recipe.stages]
    assert [model.temporal for model in models] == [False, False, True, True]
    assert [model.patch for model in models] == [(1, 2), (1, 2), (1, 2), (2, 2)]


def test_a_recipe_survives_json(progressive_file: Path) -> None:
    """States hold the recipe as JSON: it must come back as the same one."""
    recipe = load_recipe(progressive_file)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_rehearsal_has_all_stages_in_few_steps(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    short = recipe.rehearsal(3)
    assert [stage.steps for stage in short.stages] == [3, 3]
    assert short.vae.steps == 2  # of 2
    assert [stage.model_copy(update={"steps": 5}) for stage in short.stages] == list(recipe.stages)


@pytest.mark.parametrize("path", sorted(SHIPPED.parent.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).stages


def test_the_documented_recipe_has_no_unknown_key() -> None:
    text = (SHIPPED.parents[1] / "docs" / "training.md").read_text()
    values = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    [stage] = values["stages"]
    values["stages"] = [{**stage, "spatial_from": "a/b", "temporal_from": "c/d"}]  # the page shows one stage only
    recipe = Recipe.model_validate(values)
    assert recipe.efficiency.micro_batch == 4
    assert recipe.stages[0].sizes == ((256, 256),)


PROGRESSIVE_FAULTS = {
    "later stage": ('spatial_from = "t2i-low"', 'spatial_from = "ti2v-high"', "earlier stages are: t2i-low, t2i-high"),
    "image has no time": (
        'temporal_from = "t2v-low"',
        'temporal_from = "t2i-low"',
        "is an image stage, without temporal",
    ),
    "scratch takes no time": ('spatial_from = "t2i-high"', 'spatial_from = "scratch"', "starts all weights anew"),
    "images need none": ('name = "t2i-high"', 'name = "t2i-high"\ntemporal_from = "x"', "has no meaning for t2i"),
    "twice": ('name = "t2i-high"', 'name = "t2i-low"', "stage names must differ, 't2i-low' stands twice"),
    "unknown data": ('data = "clips"', 'data = "films"', "stage t2v-low: data is 'films'; [data] has: digits, clips"),
    "no data named": ('data = "clips"', "", "stage t2v-low: data is 'not given'; [data] has: digits, clips"),
    "unknown kind": ('kind = "videos"', 'kind = "film"', "'digits', 'world', 'views', 'mixed', 'videos', 'shards'"),
    "two sizes": ("buckets = ", "resolution = [16, 16]\nbuckets = ", "give resolution or buckets, not both"),
    "wide digits": ("resolution = [16, 16]", "resolution = [16, 32]", "moving digits are square, resolution is 16x32"),
    "odd digits": ("resolution = [16, 16]", "resolution = [24, 24]", "must be a multiple of 16 pixels, got 24"),
    "masks without blocks": ("full_blocks = 2", "full_blocks = 0", "mask_ratio needs [model] full_blocks"),
    "only full blocks": ("full_blocks = 2", "full_blocks = 4", "must leave main blocks, there are 4 in all"),
    "unknown base": ('base = "small"', 'base = "huge"', "no model config named 'huge'"),
    "unknown model key": ('base = "small"', 'base = "small"\ndepth = 3', "model.depth: Extra inputs"),
    "whole mask": ("mask_ratio = 0.5", "mask_ratio = 1.0", "mask_ratio: Input should be less than 1"),
}


@pytest.mark.parametrize("fault", PROGRESSIVE_FAULTS)
def test_impossible_progressive_recipes_are_one_clear_line(progressive_file: Path, fault: str) -> None:
    old, new, message = PROGRESSIVE_FAULTS[fault]
    assert old in PROGRESSIVE
    progressive_file.write_text(PROGRESSIVE.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_recipe(progressive_file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_recipe(recipe_file: Path) -> None:
    wanted = load_recipe(recipe_file)
    recipe_file.write_bytes(b"\xef\xbb\xbf" + recipe_file.read_bytes())
    assert load_recipe(recipe_file) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * 50_000, "cannot be read as TOML (it is nested too deeply)"),
        (b"a = " + b"9" * 5_000, "cannot be read as TOML (Exceeds the limit"),
        (b"seed = 0x" + b"f" * 5_000, "seed: "),
        (b"ema = 'gr\xf6\xdfer'", "cannot be read as TOML (it is not UTF-8 text, its byte 9 is 0xf6)"),
        (b"k" * 100_000 + b" = 1", "kkk...kkk"),
        (b"\n".join(b"k%d = 1" % number for number in range(1_000)), "(and 998 more faults)"),
        (b"ema = '" + b"n" * 100_000 + b"'", "ema: Input should be a valid number"),
    ],
)
def test_hostile_recipes_are_one_short_line(recipe_file: Path, content: bytes, message: str) -> None:
    recipe_file.write_bytes(content + b"\n" + recipe_file.read_bytes())
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(recipe_file))
    assert "\n" not in str(caught.value)


STUDENT = """
[[stages]]
task = "ti2v"
name = "student"
distill = "guidance"
guidance = [2.0, 6.0]
frames = 3
steps = 5
batch = 2
learning_rate = 1e-3
"""


def test_a_stage_that_distills(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + STUDENT)
    recipe = load_recipe(recipe_file)
    assert [recipe.model_of(stage).student for stage in recipe.stages] == [None, None, Student(guidance=(2.0, 6.0))]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    recipe_file.write_text(recipe_file.read_text().replace("[2.0, 6.0]", "4.0"))
    assert load_recipe(recipe_file).stages[-1].guidance == (4.0, 4.0)


MAP = STUDENT.replace("guidance = [2.0, 6.0]\n", "").replace('"guidance"', '"flow-map"').replace('"student"', '"map"')


def test_a_flow_map_has_its_students_scales(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + STUDENT + MAP)
    recipe = load_recipe(recipe_file)
    assert recipe.stages[-1].student == Student(guidance=(2.0, 6.0), flow_map=True)
    assert recipe.model_of(recipe.stages[-1]).teacher == recipe.model_of(recipe.stages[-2])
    recipe_file.write_text(recipe_file.read_text().replace("[sampling]", '[sampling]\nsolver = "ab2"'))
    with pytest.raises(ConfigError, match=r"sampling.solver ab2: the flow map of stage map has euler alone"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("guidance = [2.0, 6.0]\n", "", "needs guidance, the range of its scales"),
        ("[2.0, 6.0]", "[6.0, 2.0]", "from the least scale to the greatest"),
        ('distill = "guidance"\n', "", "guidance is for a stage that distills"),
        ('distill = "guidance"', 'distill = "everything"', "Input should be 'guidance' or 'flow-map'"),
        ('distill = "guidance"', 'distill = "flow-map"', "has guidance in rows of its own; distill that first"),
        ("", MAP.replace("steps", "guidance = [3.0, 6.0]\nsteps"), "has other guidance scales, 2 to 6"),
        ("", MAP + MAP.replace('"map"', '"again"'), "is a flow map already"),
        ("", MAP + "[efficiency]\nprecision = 'bfloat16'\n", "bfloat16 rounds away"),
        ('name = "student"', 'name = "student"\nspatial_from = "scratch"', "starts as its teacher"),
        ('name = "student"', 'name = "student"\nmask_ratio = 0.5', "take out mask_ratio"),
        ('task = "ti2v"\nname', 'task = "t2i"\nname', "students are of video models"),
        ("[2.0, 6.0]", "[5.0, 6.0]", "sampling.guidance_scale 4 is not among those of stage student, 5 to 6"),
        ("", STUDENT.replace('"student"', '"again"'), "student, has its guidance distilled already"),
        (
            "",
            STUDENT.replace('distill = "guidance"\nguidance = [2.0, 6.0]\n', ""),
            "is a student, which data would undo",
        ),
    ],
)
def test_bad_stages_that_distill(recipe_file: Path, old: str, new: str, said: str) -> None:
    bad = STUDENT.replace(old, new) if old else STUDENT + new.replace('"student"', '"after"')
    recipe_file.write_text(recipe_file.read_text() + bad)
    with pytest.raises(ConfigError, match=said) as caught:
        load_recipe(recipe_file)
    assert "\n" not in str(caught.value)


def test_a_student_has_a_teacher(recipe: Recipe) -> None:
    values = recipe.model_dump()
    alone = {**values["stages"][-1], "distill": "guidance", "guidance": [2.0, 6.0]}
    with pytest.raises(ValueError, match="there is no stage before it to distill"):
        Recipe.model_validate({**values, "stages": [alone]})
    assert Recipe.model_validate({**values, "stages": [{**alone, "spatial_from": "./teacher"}]}).stages[0].student
    with pytest.raises(ValueError, match="student is what stages that distill make"):
        Recipe.model_validate({**values, "model": {**values["model"], "student": {"guidance": [2.0, 6.0]}}})
