"""Answers of the sampling loop: the reference's sampler in float64, with gates that plain PyTorch passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stiv_deploy.export.bundle_from_checkpoint import default_bucket
from stiv_deploy.export.graphs.golden_runs import (
    RUNS,
    Clip,
    Reference,
    Simulated,
    encoder,
    played,
    run_answers,
    run_sizes,
)
from stiv_deploy.export.graphs.reference import Boundary, in_turn
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.runtime.bundle.manifest import Range
from stiv_deploy.runtime.sampling.golden_samples import golden_sample
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import Student


@pytest.fixture
def writer(micro: Checkpoint, tmp_path: Path) -> GraphWriter:
    return GraphWriter(micro, tmp_path, "float32")


def clip_of(writer: GraphWriter, name: str) -> Clip:
    sizes = run_sizes(default_bucket(writer.checkpoint.config.sampling, writer.facts), writer.facts)
    vocabulary = writer.checkpoint.config.text.vocabulary
    return Clip(name, RUNS[name], golden_sample(name, RUNS[name], sizes, writer.facts, vocabulary))


def test_blocks_in_turn_compute_what_the_whole_model_does(writer: GraphWriter) -> None:
    clip, encode = clip_of(writer, "sit by heun"), encoder(writer, torch.float64)
    made = [
        played(Reference(in_turn(writer.checkpoint.model, torch.float64, whole), encode, torch.float64), clip)
        for whole in (0, 2**28)
    ]
    assert made[0].keys() == made[1].keys()
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name])


def test_plain_pytorch_passes_and_another_run_does_not(writer: GraphWriter) -> None:
    answers = run_answers(writer, default_bucket(writer.checkpoint.config.sampling, writer.facts), None)
    plain = Reference(Boundary(writer.checkpoint.model), encoder(writer, torch.float32), torch.float32)
    found = {run.name: {each.name: each for each in run.outputs} for run in answers.runs}
    assert found.keys() == RUNS.keys()
    for name, outputs in found.items():
        made = played(plain, clip_of(writer, name))
        assert made.keys() == outputs.keys()
        for each, value in made.items():
            assert outputs[each].error(value[0].numpy()) < outputs[each].gate < 3e-5
            assert outputs[each].error(value[0].flip(0).numpy()) > outputs[each].gate or len(value[0]) == 1


def test_eight_bits_are_gated_by_draws(writer: GraphWriter) -> None:
    model = writer.checkpoint.model
    answers = run_answers(
        writer,
        default_bucket(writer.checkpoint.config.sampling, writer.facts),
        Simulated(Boundary(model), Boundary(model)),
    )
    gates = {each.gate for run in answers.runs for each in run.outputs}
    assert 0 < min(gates) < max(gates) < 1e-3, "nothing but the wiggles of 2^-18 differs"


def test_sizes_are_small_and_lie_in_their_bucket(writer: GraphWriter) -> None:
    bucket = default_bucket(writer.checkpoint.config.sampling, writer.facts)
    for batch in (Range(min=1, typical=1, max=1), Range(min=1, typical=1, max=4), Range(min=4, typical=4, max=8)):
        given = bucket.model_copy(update={"batch": batch})
        sizes = run_sizes(given, writer.facts)
        assert given.holds(batch=sizes.batch, frames=sizes.video_frames, height=sizes.height, width=sizes.width)
        assert (sizes.batch, sizes.model_batch) == ({1: 1, 4: 2, 8: 4}[batch.max], 3 * sizes.batch)
        assert sizes.width != sizes.height


def test_a_single_frame_is_not_given(micro: Checkpoint, writer: GraphWriter) -> None:
    one = Range(min=4, typical=4, max=4)
    bucket = default_bucket(micro.config.sampling, writer.facts).model_copy(update={"frames": one})
    frames = writer.facts.latent_frames(4)
    given = {run.settings.given for run in run_answers(writer, bucket, None).runs}
    assert all(max(each, default=-1) < frames - 1 for each in given)


@pytest.mark.parametrize(("flow_map", "solvers"), [(False, {"euler", "heun", "ab2"}), (True, {"euler"})])
def test_a_students_runs_are_of_one_row(
    micro: Checkpoint,
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path: Path,
    flow_map: bool,
    solvers: set[str],
) -> None:
    own = Student(guidance=(2.0, 6.0), flow_map=flow_map)
    student = make_checkpoint(micro.config.model.model_copy(update={"student": own}))
    writer = GraphWriter(student, tmp_path, "float32")
    answers = run_answers(writer, default_bucket(student.config.sampling, writer.facts), None)
    assert {run.settings.solver for run in answers.runs} == solvers
    assert {run.settings.guidance_scale for run in answers.runs} == {2.0, 6.0}
    assert any(run.settings.forced for run in answers.runs)
