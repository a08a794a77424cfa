"""``stiv demo --precision fp8|int8``: the stages of a quantized bundle.

Calibrate, export, build, audit, parity, generate. A failed gate (audit or parity) does not stop the rest, so that the
folder holds everything that there is to look at.
"""

from stiv_deploy.calibration.collect import CalibrationSettings
from stiv_deploy.calibration.request import CalibrationRequest, usual_calibrator
from stiv_deploy.export.audit.audit import AuditRequest
from stiv_deploy.export.demo.clips import clip_stages
from stiv_deploy.export.demo.shared import BACKEND, Demo, Stage, build_stage
from stiv_deploy.export.parity.stage import ParityRequest
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.contract import Format


def quantized_stages(demo: Demo, sm: str, quantization: Format) -> list[Stage]:
    """Checkpoint -> ranges -> bundle -> engines and their audit, where the builder is installed -> parity -> clips."""
    checkpoint, bundle, scales = demo.checkpoint, demo.bundle, demo.out / "scales.safetensors"
    settings = CalibrationSettings(calibrator=usual_calibrator(quantization))
    calibration = CalibrationRequest(checkpoint=checkpoint, quantization=quantization, out=scales, settings=settings)
    export = ExportRequest(checkpoint=checkpoint, out=bundle, precision="float16", format=quantization, scales=scales)
    return [
        Stage(
            title="Calibrate: ranges from the reference's sampling loop",
            words=(checkpoint, "--precision", quantization, "--out", scales),
            request=calibration,
        ),
        Stage(
            title="Export to ONNX with Q/DQ, each graph checked against the fake-quantized reference",
            words=(checkpoint, "--precision", quantization, "--scales", scales, "--out", bundle),
            request=export,
        ),
        *([] if demo.builder_missing("engines were built or audited") else _engine_stages(demo, sm)),
        Stage(
            title="Parity with the float64 and the fake-quantized reference",
            words=(bundle, "--checkpoint", checkpoint, "--scales", scales),
            request=ParityRequest(bundle=bundle, checkpoint=checkpoint, scales=scales),
            json=demo.out / "parity.json",
        ),
        *clip_stages(demo),
    ]


def _engine_stages(demo: Demo, sm: str) -> list[Stage]:
    audit = Stage(
        title="Fusion audit: 8-bit products and fused attention in every block",
        words=(demo.bundle, "--backend", BACKEND, "--sm", sm),
        request=AuditRequest(bundle=demo.bundle, backend=BACKEND, sms=(sm,)),
        json=demo.out / "audit.json",
    )
    return [build_stage(demo, sm), audit]
