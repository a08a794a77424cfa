"""A complete bundle in miniature, made of hand-written graphs whose velocity is also known in numpy.

No checkpoint and no torch: the toy model is affine in its input, so that solvers can be checked against analytic
answers, and uses every input of every graph, so that a wrong binding shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, write_manifest
from stiv_deploy.runtime.bundle.contract import ModelFacts, Student, graph_specs
from stiv_deploy.runtime.bundle.golden import (
    GOLDEN,
    Golden,
    GraphAnswer,
    RunAnswer,
    RunAnswers,
    Sizes,
    answer,
    read_golden,
)
from stiv_deploy.runtime.bundle.manifest import Bucket, GraphRecord, Manifest, Range, SamplingDefaults
from stiv_deploy.runtime.bundle.tuned import Tuned, TunedGrid
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs
from stiv_deploy.runtime.sampling.golden_samples import golden_sample
from stiv_deploy.runtime.sampling.rope import rope_tables

WORDS = ("digit", "three", "moving", "left", "right")
EMBEDDING = np.array([0.05, -0.02, 0.03, 0.01], dtype=np.float32)
HEADER = '<ir_version: 10, opset_import: ["": 20]>'

FACTS = ModelFacts(
    name="toy",
    blocks=2,
    width=4,
    heads=1,
    patch=(1, 1),
    latent_channels=4,
    text_width=4,
    max_text_tokens=5,
    base_frames=2,
    base_grid=(2, 2),
    rope_theta=100.0,
    temporal=True,
    spatial_factor=2,
    temporal_factor=1,
)
BUCKET = Bucket(
    name="small",
    batch=Range(min=1, typical=1, max=3),
    frames=Range(min=1, typical=4, max=6),
    height=Range(min=4, typical=8, max=12),
    width=Range(min=4, typical=8, max=12),
)
SAMPLING = SamplingDefaults(
    frames=4, height=8, width=8, frames_per_second=8, steps=4, guidance_scale=3.0, image_scale=1.5, time_shift=1.0
)
SIZES = (
    Sizes(batch=1, model_batch=3, video_frames=3, height=8, width=4, text_tokens=3),
    Sizes(batch=2, model_batch=4, video_frames=4, height=12, width=8, text_tokens=5),
)
"""Sizes of golden answers."""

TEXT_ENCODER = """g (int64[M,L] token_ids, int64[M,L] token_mask) => (float[M,L,4] text_states, float[M,4] pooled)
{
    ids = Cast <to=1> (token_ids)
    mask = Cast <to=1> (token_mask)
    real = Mul (ids, mask)
    last = Constant <value_ints=[-1]> ()
    column = Unsqueeze (real, last)
    text_states = Mul (column, embedding)
    one = Constant <value_ints=[1]> ()
    pooled = ReduceSum <keepdims=0> (text_states, one)
}"""
TEXT_KV = """g (float[M,L,4] text_states) => (float[2,M,1,L,4] text_k, float[2,M,1,L,4] text_v)
{
    axes = Constant <value_ints=[0, 2]> ()
    first = Unsqueeze (text_states, axes)
    two = Constant <value_float=2.0> ()
    second = Mul (first, two)
    text_k = Concat <axis=0> (first, second)
    text_v = Neg (text_k)
}"""
IMAGE_ENCODER = """g (float[B,F,3,H,W] video) => (float[B,F,4,h,w] latents)
{
    size = Shape <start=2, end=5> (video)
    any = Constant <value_ints=[-1]> ()
    flat = Concat <axis=0> (any, size)
    images = Reshape (video, flat)
    pooled = AveragePool <kernel_shape=[2, 2], strides=[2, 2]> (images)
    one = Constant <value_ints=[1]> ()
    grey = ReduceMean <keepdims=1> (pooled, one)
    four = Concat <axis=1> (pooled, grey)
    rows = Shape <start=0, end=2> (video)
    rest = Shape <start=1, end=4> (four)
    shape = Concat <axis=0> (rows, rest)
    latents = Reshape (four, shape)
}"""
EMBED = """g (float[M,T,4,h,w] model_input, float[M] timestep, float[M,6] micro, float[M,4] pooled,
    float[S,2] spatial_cos, float[S,2] spatial_sin, float[T,2] temporal_cos, float[T,2] temporal_sinLATE) =>
    (float[M,T,S,4] x, float[M,6,4] modulation, float[M,4] condition)
{
    last = Transpose <perm=[0, 1, 3, 4, 2]> (model_input)
    shape = Constant <value_ints=[0, 0, -1, 4]> ()
    x = Reshape (last, shape)
    one = Constant <value_ints=[1]> ()
    time = Sum (timestepMORE)
    column = Unsqueeze (time, one)
    size = ReduceMean <keepdims=1> (micro, one)
    small = Constant <value_float=0.001> ()
    scaled = Mul (size, small)
    sum = Add (pooled, column)
    condition = Add (sum, scaled)
    wide = Unsqueeze (condition, one)
    modulation = Mul (wide, six)
}"""
BLOCK = """g (float[M,T,S,4] x, float[M,6,4] modulation, float[M,1,L,4] text_k, float[M,1,L,4] text_v,
    float[M,1,1,L] text_mask, float[S,2] spatial_cos, float[S,2] spatial_sin, float[T,2] temporal_cos,
    float[T,2] temporal_sin) => (float[M,T,S,4] x_out)
{
    scaled = Mul (x, slope)
    weight = Exp (text_mask)
    keys = MatMul (weight, text_k)
    values = MatMul (weight, text_v)
    half = Constant <value_float=0.5> ()
    halved = Mul (values, half)
    text = Add (keys, halved)
    one = Constant <value_ints=[1]> ()
    both = Concat <axis=1> (spatial_cos, spatial_sin)
    space = ReduceSum <keepdims=1> (both, one)
    all = Concat <axis=1> (temporal_cos, temporal_sin)
    frame = ReduceSum <keepdims=1> (all, one)
    time = Unsqueeze (frame, one)
    place = Add (space, time)
    little = Constant <value_float=0.01> ()
    shift = Mul (place, little)
    mean = ReduceMean <keepdims=1> (modulation, one)
    wide = Unsqueeze (mean, one)
    tenth = Constant <value_float=0.1> ()
    gate = Mul (wide, tenth)
    a = Add (scaled, text)
    b = Add (a, shift)
    x_out = Add (b, gate)
}"""
RESIDUAL = """g (float[M,T,S,4] x, float[M,T,S,4] last) => (float[M,T,S,4] residual)
{
    residual = Sub (last, x)
}"""
EXTRAPOLATE = """g (float[M,T,S,4] x, float[M,T,S,4] last, float[M,T,S,4] residual_0, float[M,T,S,4] residual_1,
    float[M,2] residual_weights, bool[M] skipped) => (float[M,T,S,4] x_out)
{
    axes = Constant <value_ints=[2, 3]> ()
    wide = Constant <value_ints=[1, 2, 3]> ()
    w0, w1 = Split <axis=1, num_outputs=2> (residual_weights)
    w0w = Unsqueeze (w0, axes)
    w1w = Unsqueeze (w1, axes)
    a = Mul (residual_0, w0w)
    b = Mul (residual_1, w1w)
    c = Add (a, b)
    guessed = Add (x, c)
    where = Unsqueeze (skipped, wide)
    x_out = Where (where, guessed, last)
}"""
HEAD = """g (float[M,T,S,4] x, float[M,4] condition, float[M,T,4,h,w] model_input) => (float[M,T,4,h,w] velocity)
{
    channels = Transpose <perm=[0, 1, 3, 2]> (x)
    shape = Shape (model_input)
    image = Reshape (channels, shape)
    axes = Constant <value_ints=[1, 3, 4]> ()
    wide = Unsqueeze (condition, axes)
    velocity = Add (image, wide)
}"""
STEP = """g (float[M,T,4,h,w] velocity, float[B,T,4,h,w] latents, float[B,T,4,h,w] clean, float[B,T,4,h,w] noise,
    bool[B,T] frame_mask, int64[B,3] sample_rows, float[B,3] row_weights, int64[M] row_sample, bool[M,T] row_mask,
    float[B,T,4,h,w] previous_velocity, float[B,2] solver_weights, float[B] dt, float[B] next_timestep,
    float[B] renorm, bool[B] hold)
    => (float[B,T,4,h,w] next_latents, float[B,T,4,h,w] guided_velocity, float[M,T,4,h,w] next_model_input)
{
    axes = Constant <value_ints=[2, 3, 4]> ()
    wide = Constant <value_ints=[1, 2, 3, 4]> ()
    deep = Constant <value_ints=[2, 3, 4, 5]> ()
    zero = Constant <value_float=0.0> ()
    one = Constant <value_float=1.0> ()
    first = Constant <value_ints=[1]> ()
    given = Unsqueeze (frame_mask, axes)
    rows = Gather <axis=0> (velocity, sample_rows)
    weights = Unsqueeze (row_weights, deep)
    product = Mul (rows, weights)
    taken = Equal (weights, zero)
    weighted = Where (taken, zero, product)
    sum = ReduceSum <keepdims=0> (weighted, first)
    index = Constant <value_int=0> ()
    conditional = Gather <axis=1> (rows, index)
    own = Where (given, zero, conditional)
    other = Where (given, zero, sum)
    want = ReduceL2 <keepdims=1> (own, wide)
    have = ReduceL2 <keepdims=1> (other, wide)
    tiny = Constant <value_float=1.1754944e-38> ()
    safe = Max (have, tiny)
    ratio = Div (want, safe)
    some = Unsqueeze (renorm, wide)
    on = Greater (some, zero)
    factor = Where (on, ratio, one)
    guided_velocity = Mul (sum, factor)
    w0, w1 = Split <axis=1, num_outputs=2> (solver_weights)
    w0w = Unsqueeze (w0, axes)
    w1w = Unsqueeze (w1, axes)
    new = Mul (guided_velocity, w0w)
    back = Mul (previous_velocity, w1w)
    unused = Equal (w1w, zero)
    old = Where (unused, zero, back)
    direction = Add (new, old)
    far = Unsqueeze (dt, wide)
    move = Mul (direction, far)
    moved = Add (latents, move)
    updated = Where (given, clean, moved)
    held = Unsqueeze (hold, wide)
    next_latents = Where (held, latents, updated)
    t = Unsqueeze (next_timestep, wide)
    rest = Sub (one, t)
    signal = Mul (clean, t)
    grain = Mul (noise, rest)
    noised = Add (signal, grain)
    hidden = Where (given, noised, updated)
    seen = Gather <axis=0> (clean, row_sample)
    unseen = Gather <axis=0> (hidden, row_sample)
    mask = Unsqueeze (row_mask, axes)
    next_model_input = Where (mask, seen, unseen)
}"""
FRAMES = """g (float[B,F,3,H,W] video) => (uint8[B,F,H,W,3] frames)
{
    half = Constant <value_float=127.5> ()
    scaled = Mul (video, half)
    moved = Add (scaled, half)
    round = Round (moved)
    least = Constant <value_float=0.0> ()
    most = Constant <value_float=255.0> ()
    clipped = Clip (round, least, most)
    levels = Cast <to=2> (clipped)
    frames = Transpose <perm=[0, 1, 3, 4, 2]> (levels)
}"""
DECODER = """g (float[B,T,4,h,w] latents) => (float[B,T,3,H,W] video)
{
    size = Shape <start=2, end=5> (latents)
    any = Constant <value_ints=[-1]> ()
    flat = Concat <axis=0> (any, size)
    images = Reshape (latents, flat)
    begin = Constant <value_ints=[0]> ()
    end = Constant <value_ints=[3]> ()
    axis = Constant <value_ints=[1]> ()
    colours = Slice (images, begin, end, axis)
    scales = Constant <value_floats=[1.0, 1.0, 2.0, 2.0]> ()
    large = Resize <mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric">
        (colours, , scales)
    rows = Shape <start=0, end=2> (latents)
    rest = Shape <start=1, end=4> (large)
    shape = Concat <axis=0> (rows, rest)
    video = Reshape (large, shape)
}"""


def embed_text(student: Student | None) -> str:
    """The ``embed`` graph: what only a student has adds to the time."""
    late = [each.name for each in graph_specs(facts_of(student), "float32")["embed"].inputs[8:]]
    inputs = "".join(f", float[M] {name}" for name in late)
    return EMBED.replace("LATE", inputs).replace("MORE", "".join(f", {name}" for name in late))


def facts_of(student: Student | None) -> ModelFacts:
    """The toy model's facts, those of a student if it is one."""
    return FACTS.model_copy(update={"student": student})


@dataclass(frozen=True)
class Toy:
    """The toy model in numpy: v = slope^2 * x + (what the conditions add)."""

    slope: float = 0.5
    student: Student | None = None
    skips: bool = False

    def graphs(self) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
        """Text and initializers of every graph."""
        block = (BLOCK, {"slope": np.array(self.slope, dtype=np.float32)})
        skipping: dict[str, tuple[str, dict[str, np.ndarray]]] = {
            "residual": (RESIDUAL, {}),
            "extrapolate": (EXTRAPOLATE, {}),
        }
        return {
            "text_encoder": (TEXT_ENCODER, {"embedding": EMBEDDING}),
            "text_kv": (TEXT_KV, {}),
            "image_encoder": (IMAGE_ENCODER, {}),
            "embed": (embed_text(self.student), {"six": np.full((1, 6, 4), 0.25, dtype=np.float32)}),
            "block_00": block,
            "block_01": block,
            **(skipping if self.skips else {}),
            "head": (HEAD, {}),
            "step": (STEP, {}),
            "decoder": (DECODER, {}),
            "frames": (FRAMES, {}),
        }

    def text(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States [M, L, 4] and pooled [M, 4]."""
        states = (ids * mask)[..., None].astype(np.float32) * EMBEDDING
        return states, states.sum(axis=1)

    def velocity(
        self,
        model_input: np.ndarray,
        timestep: np.ndarray,
        micro: np.ndarray,
        states: np.ndarray,
        mask: np.ndarray,
        pooled: np.ndarray,
        place: np.ndarray,
        skipping: Any = None,
    ) -> np.ndarray:
        """Velocity of ``model_input`` [M, T, 4, h, w]; ``place`` [T, h * w] is the sum of the rotary tables.

        ``skipping`` is the reference's :class:`~stiv_deploy.stiv_ref.skipping.Skipping`, where steps skip the blocks.
        """
        rows, frames, channels, height, width = model_input.shape
        condition = pooled + timestep[:, None] + 0.001 * micro.mean(axis=1, keepdims=True)  # (M, 4)
        seen = (states * mask[..., None]).sum(axis=1)  # (M, 4)
        x = model_input.transpose(0, 1, 3, 4, 2).reshape(rows, frames, -1, channels)  # (M, T, S, 4)
        first, guessed = x, None if skipping is None else skipping.guess()
        for index in range(2):
            text = (1 + index) * 0.5 * seen
            x = self.slope * x + text[:, None, None] + 0.01 * place[..., None] + 0.025 * condition[:, None, None]
        if guessed is not None:
            x = first + guessed.numpy()
        elif skipping is not None:
            import torch

            skipping.remember(*(torch.from_numpy(np.ascontiguousarray(each, np.float32)) for each in (first, x)))
        image = x.transpose(0, 1, 3, 2).reshape(model_input.shape)
        return (image + condition[:, None, :, None, None]).astype(np.float32)


def _save(text: str, constants: dict[str, np.ndarray], path: Path, external: bool) -> None:
    model = parser.parse_model(f"{HEADER} {text}")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model)
    location = f"{path.name}.data" if external else None
    onnx.save_model(
        model, path, save_as_external_data=external, location=location, size_threshold=0, convert_attribute=False
    )


def _save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    tokenizer.save(str(path))


def make_bundle(
    folder: Path,
    toy: Toy,
    graphs_instead: Mapping[str, tuple[str, dict[str, np.ndarray]]] | None = None,
    bucket: Bucket = BUCKET,
) -> Path:
    """Write the bundle of ``toy`` into ``folder``, some graphs replaced by others (text and initializers)."""
    (folder / "onnx").mkdir(parents=True)
    specs, graphs = graph_specs(facts_of(toy.student), "float32", halves=True, skips=True), {}
    for name, (text, constants) in (toy.graphs() | dict(graphs_instead or {})).items():
        file, external = f"onnx/{name}.onnx", bool(constants)
        _save(text, constants, folder / file, external)
        graphs[name] = GraphRecord(
            file=file_record(folder, file),
            data=file_record(folder, f"{file}.data") if external else None,
            topology="0" * 64,
            spec=specs[name],
        )
    _save_tokenizer(folder / "tokenizer.json")
    manifest = Manifest(
        precision="float32",
        opset=20,
        model=facts_of(toy.student),
        sampling=SAMPLING,
        buckets=(bucket,),
        graphs=graphs,
        tokenizer=file_record(folder, "tokenizer.json"),
        checkpoint="0" * 64,
        tools={"onnx": onnx.__version__},
    )
    write_manifest(folder, manifest)
    return folder


def with_answers(folder: Path, gate: float = 1e-6) -> Path:
    """The bundle in ``folder`` with golden answers at two sizes, by onnx's own evaluator in numpy."""
    from onnx.reference import ReferenceEvaluator

    manifest = Bundle.open(folder).manifest
    cases = []
    for name, record in manifest.graphs.items():
        evaluator = ReferenceEvaluator(onnx.load(folder / record.file.path))
        for size in SIZES:
            inputs = golden_inputs(name, record.spec, size.dims(FACTS), len(WORDS))
            outputs = zip(record.spec.outputs, evaluator.run(None, inputs), strict=True)
            answers = tuple(answer(tensor.name, value, gate) for tensor, value in outputs)
            cases.append(GraphAnswer(graph=name, size=f"{size.height} high", sizes=size, outputs=answers))
    text = Golden(vocabulary=len(WORDS), graphs=tuple(cases)).model_dump_json()
    (folder / GOLDEN).write_text(text)
    write_manifest(folder, manifest.model_copy(update={"golden": file_record(folder, GOLDEN)}))
    return folder


class _TorchToy:
    """The toy model as the reference's sampler calls it."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.config = SimpleNamespace(student=None)

    def text_kv(self, states: Any) -> Any:
        return states

    def __call__(self, *inputs: Any, text_kv: Any) -> Any:
        import torch

        model_input, *others = (each.numpy() for each in inputs)
        _, frames, _, height, width = model_input.shape
        dims = {"latent_height": height, "latent_width": width, "token_frames": frames}
        tables = rope_tables(FACTS, dims)
        space, time = (tables[f"{kind}_cos"] + tables[f"{kind}_sin"] for kind in ("spatial", "temporal"))
        place = space.sum(axis=1) + time.sum(axis=1, keepdims=True)
        return torch.from_numpy(self.toy.velocity(model_input, *others, place))


def with_runs(folder: Path, toy: Toy | None = None, gate: float = 1e-5) -> Path:
    """The bundle in ``folder``, which has answers, with runs of the reference's sampler over the toy in numpy."""
    import torch

    from stiv_deploy.export.graphs import golden_runs
    from stiv_deploy.stiv_ref.text import TextStates

    toy = toy or Toy()

    def encode(tokens: Any) -> TextStates:
        states, pooled = toy.text(*(each[None] for each in tokens))
        return TextStates(torch.from_numpy(states), torch.from_numpy(tokens.mask[None]), torch.from_numpy(pooled))

    bundle = Bundle.open(folder)
    sizes, runs = golden_runs.run_sizes(BUCKET, FACTS), []
    for name, settings in golden_runs.RUNS.items():
        clip = golden_runs.Clip(name, settings, golden_sample(name, settings, sizes, FACTS, len(WORDS)))
        outputs = golden_runs.played(golden_runs.Reference(_TorchToy(toy), encode, torch.float32), clip)
        answers = tuple(answer(each, value[0].numpy(), gate) for each, value in outputs.items())
        runs.append(RunAnswer(name=name, settings=settings, outputs=answers))
    sampling = RunAnswers(size="small", sizes=sizes, runs=tuple(runs))
    golden = read_golden(bundle).model_copy(update={"sampling": sampling})
    (folder / GOLDEN).write_text(golden.model_dump_json())
    write_manifest(folder, bundle.manifest.model_copy(update={"golden": file_record(folder, GOLDEN)}))
    return folder


@pytest.fixture
def proven(own_bundle: Path) -> Path:
    """A toy bundle with golden answers, to damage."""
    return with_answers(own_bundle)


@pytest.fixture
def sampled(proven: Path) -> Path:
    """The same with runs of the sampling loop."""
    return with_runs(proven)


@pytest.fixture(scope="session")
def toy() -> Toy:
    """The toy model in numpy, with the slope of the shared ``bundle_path``."""
    return Toy()


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory, toy: Toy) -> Path:
    """The toy bundle; do not write into it, see ``own_bundle``."""
    return make_bundle(tmp_path_factory.mktemp("toy") / "bundle", toy)


SKIPPED_TIMES = {"time_shift": 1.5, "late_stretch": 1.25}
SKIPPED_WEIGHTS = ((1.25, -0.25), (1.5, -0.5), (1.5, -0.625), (1.25, -0.5), (1.75, -0.5))


def tuned_to_skip(folder: Path) -> Path:
    """The bundle in ``folder`` with grids of six steps of AB2, one of which skips, and of eight of Euler's that do."""
    manifest = Bundle.open(folder).manifest
    plain = {"solver": "ab2", "steps": 6, "time_shift": 3.0, "tried": 0.1, "error": 0.1}
    skipping = plain | SKIPPED_TIMES | {"solver_weights": SKIPPED_WEIGHTS, "skipped_steps": (3, 5), "tried": 0.01}
    euler = plain | {"solver": "euler", "steps": 8, "time_shift": 2.0, "skipped_steps": (4, 6), "tried": 0.2}
    grids = [TunedGrid.model_validate(each) for each in (plain, skipping, euler)]
    tuned = Tuned(bundle=manifest.bundle_hash, clips=4, reference_error=0.0, grids=tuple(grids))
    write_manifest(folder, manifest.model_copy(update={"tuned": tuned}))
    return folder


@pytest.fixture(scope="session")
def skipping_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle whose steps can skip the blocks, and that was tuned to; do not write into it."""
    return tuned_to_skip(make_bundle(tmp_path_factory.mktemp("skipping") / "bundle", Toy(slope=0.8, skips=True)))


@pytest.fixture
def own_bundle(tmp_path: Path, toy: Toy) -> Path:
    """A toy bundle to damage."""
    return make_bundle(tmp_path / "bundle", toy)


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes the bundle of a toy model with the given slope."""
    return lambda slope: make_bundle(tmp_path / f"slope{slope}", Toy(slope))


@pytest.fixture(scope="session")
def bundle_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a toy bundle with some graphs replaced, for frames up to 256x256."""

    def make(**graphs: tuple[str, dict[str, np.ndarray]]) -> Path:
        large = Range(min=4, typical=8, max=256)
        bucket = BUCKET.model_copy(update={"height": large, "width": large})
        return make_bundle(tmp_path_factory.mktemp("other") / "bundle", Toy(), graphs, bucket)

    return make


@pytest.fixture
def toy_bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)
