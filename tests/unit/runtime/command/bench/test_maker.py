"""What a sample of a plan is told to be."""

from pathlib import Path

from stiv_deploy.runtime import GenerationRequest, StivPipeline
from stiv_deploy.runtime.command.bench.maker import dims_of, work_of


def test_guidance_over_an_interval_is_other_work(bundle_path: Path) -> None:
    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe:
        whole, part = (
            work_of(pipe.plan(GenerationRequest(prompt="digit", seed=1, count=2, num_inference_steps=4, **values)))
            for values in ({}, {"guidance_from": 0.3, "guidance_until": 0.6})
        )
        assert (whole.rows, whole.row_evaluations, dims_of(pipe, whole)["model_batch"]) == (4, 16, 4)
        # of the times 0, 0.25, 0.5 and 0.75 one is guided: two clips have 2 rows once and 1 row three times
        assert (part.rows, part.row_evaluations, dims_of(pipe, part)["model_batch"]) == (4, 10, 2.5)
        assert part.guidance == f"{whole.guidance} from 0.3 until 0.6"
