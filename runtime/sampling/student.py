"""Students: distilled models whose guidance is in one row of the model, with its scale as a condition."""

from dataclasses import replace

from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver


def one_row(settings: SamplingSettings, student: Student | None) -> SamplingSettings:
    """``settings`` as the model samples by them: guidance is one row of a student, other models keep their branches.

    Raises :class:`RequestError` for what the student was not trained for.
    """
    if student is None:
        return settings
    if settings.guidance_mode is GuidanceMode.SIT:
        raise RequestError("guidance_mode sit: a student has the joint guidance of text and image in it; leave it out")
    if not student.covers(settings.guidance_scale):
        raise RequestError(
            f"guidance_scale {settings.guidance_scale:g}: this student was trained for {student.scales}; give that"
        )
    if (settings.guidance_from, settings.guidance_until) != (0, 1):
        raise RequestError("a student is guided at all times; leave out guidance_from and guidance_until")
    if not settings.renorm:
        raise RequestError("a student has renormalized guidance in it; leave guidance_renorm out")
    if student.flow_map and settings.solver is not Solver.EULER:
        raise RequestError(f"solver {settings.solver}: a flow map goes from time to time by itself; use euler")
    if student.flow_map and settings.skipped_steps:
        raise RequestError("a flow map skips no blocks; leave skipped_steps out")
    return replace(settings, guidance_mode=GuidanceMode.NONE)
