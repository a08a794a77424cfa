"""Whether the devices of a worker can make clips of a bundle together, and how."""

from stiv_deploy.runtime.backends.cuda import count_gpus, no_such_gpu
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, dimensions
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.parallel.opening import where
from stiv_deploy.runtime.sampling.parallel.placement import CPU, Placement, check_devices, place
from stiv_deploy.runtime.sampling.parallel.team import check_halves
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.jobs import Size
from stiv_deploy.serving.workers.workshop import default_size, rungs


def placement_of(settings: ServeSettings, bundle: Bundle) -> Placement | None:
    """How the devices of ``settings`` share a clip of ``bundle``; ``None`` where a worker has one device.

    Raises :class:`~stiv_deploy.runtime.errors.BackendError` for devices that are unlike each other, do not fit the form
    or would share frames of a bundle without halves, and :class:`ServeError` if not even a clip of the bundle's own
    size can be shared.
    """
    if not settings.devices:
        return None
    check_devices(settings.devices)
    manifest = bundle.manifest
    placement = place(settings.devices, settings.parallel, manifest.model, manifest.sampling.guidance_mode)
    check_halves(manifest, placement, bundle.folder)
    size = default_size(bundle)
    fault = misfit(bundle, placement, size)
    if fault is not None:
        named = ",".join(settings.devices)
        raise ServeError(f"--devices {named}, {size.frames} frames of {size.width}x{size.height}: {fault}")
    return placement


def check_there(settings: ServeSettings) -> None:
    """:class:`ServeError` if a GPU of ``settings`` is not there.

    :class:`~stiv_deploy.runtime.errors.BackendError` where the backend does not fit the devices.
    """
    for device in settings.devices:
        where(device, settings.backend)
    gpus, count = [int(each) for each in settings.devices if each != CPU], count_gpus() or 0
    if gpus and max(gpus) >= count:
        named = ",".join(settings.devices)
        raise ServeError(f"--devices {named}: {no_such_gpu(max(gpus), count)}; name those that are there, or cpu,cpu")


def misfit(bundle: Bundle, placement: Placement, size: Size) -> str | None:
    """Why the devices of ``placement`` cannot share clips of ``size``; ``None`` if they can."""
    model = bundle.manifest.model
    dims = dimensions(
        model,
        batch=1,
        model_batch=SAMPLE_ROWS,
        video_frames=size.frames,
        height=size.height,
        width=size.width,
        text_tokens=model.max_text_tokens,
    )
    try:
        fitted = placement.fitting(dims["token_frames"], dims["tokens"])
        fitted.check_rows(rungs(SAMPLE_ROWS), bundle.bucket_for(1, *size).batch.min)
    except RequestError as error:
        return str(error)
    return None if fitted.size > 1 else "they are too small to be shared; give --workers in place of --devices"
