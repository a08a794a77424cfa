"""A bundle as a model of Triton's Python backend: a request in, frames out; Triton imports it inside its process.

Texts are tensors of bytes, UTF-8. Tensors pass by DLPack: releases of Triton that were built before numpy 2 read its
arrays wrongly. Only what the base install has is needed, and Triton's own module, which is there where Triton is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import Cancelled, RequestError, StivError, one_line
from stiv_deploy.runtime.pipeline.given import PictureFile
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.verification import proven_backend

REQUEST, FRAMES, RECORD = "REQUEST", "FRAMES", "RECORD"
"""Names of the tensors."""
BUNDLE, BACKEND, THREADS = "bundle", "backend", "threads"
"""Names of the folder of a model's version that has the bundle, and of parameters in its configuration."""
CPU = "onnxruntime"


class TritonPythonModel:
    """One instance of the model, on a GPU or on the CPU; the methods are those that Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of the model's version; raises what that does, and the model is then not ready."""
        import triton_python_backend_utils as triton

        self._triton: Any = triton
        given = json.loads(args["model_config"]).get("parameters", {})
        chosen = {name: value["string_value"] for name, value in given.items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        bundle = Bundle.open(Path(args["model_repository"]) / args["model_version"] / BUNDLE)
        name = chosen.get(BACKEND) or (None if on_gpu else CPU)
        threads = int(chosen[THREADS]) if THREADS in chosen else None
        device = int(args["model_instance_device_id"]) if on_gpu else 0
        self._pipe = StivPipeline(bundle, proven_backend(bundle, name, threads, device))

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each of Triton's ``requests``; what is wrong with one is its own."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        triton = self._triton
        try:
            outputs = self._made(request)
        except Cancelled:
            return self._failed("the client has cancelled", "CANCELLED")
        except RequestError as error:
            return self._failed(one_line(str(error)), "INVALID_ARG")
        except StivError as error:
            return self._failed(one_line(str(error)), "INTERNAL")
        return triton.InferenceResponse([triton.Tensor.from_dlpack(name, array) for name, array in outputs.items()])

    def _failed(self, message: str, code: str) -> Any:
        kind = self._triton.TritonError
        return self._triton.InferenceResponse(error=kind(message, getattr(kind, code, kind.INTERNAL)))

    def _made(self, request: Any) -> dict[str, np.ndarray]:
        """The video of ``request``, uint8 [F, H, W, 3], and its record; ends between steps when nobody waits for it."""

        def watch(*_: object) -> None:
            if request.is_cancelled():
                raise Cancelled

        text = np.from_dlpack(self._triton.get_input_tensor_by_name(request, REQUEST))
        output = self._pipe.run(self._pipe.plan(asked(text.tobytes())), observer=watch)
        (record,) = output.records
        return {FRAMES: np.asarray(output.frames[0]), RECORD: np.array(bytearray(record.embedded(), "utf-8"))}

    def finalize(self) -> None:
        """Free the device."""
        self._pipe.close()


def asked(text: bytes) -> GenerationRequest:
    """The request of JSON ``text``, for one video; :class:`RequestError` for files of this machine, too."""
    request = GenerationRequest.from_json(text)
    if any(isinstance(picture, PictureFile) for picture in request.frames.values()):
        raise RequestError("pictures are given by their data, as GenerationRequest.to_json writes it, not by a path")
    if request.count != 1:
        raise RequestError(f"a request is for one video here, got count {request.count}; send a request for each")
    return request
