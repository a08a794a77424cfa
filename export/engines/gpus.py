"""Compute capabilities by the names of GPUs, as people know them: what ``stiv build --for`` takes.

Source: NVIDIA's list of CUDA GPUs and their compute capabilities.
"""

import re
from difflib import get_close_matches

from stiv_deploy.runtime.errors import RequestError

FAMILIES: dict[str, tuple[str, ...]] = {
    "75": ("T4", "TITAN RTX", "RTX 2060", "RTX 2070", "RTX 2080", "RTX 2080 Ti", "Quadro RTX 6000", "Quadro RTX 8000"),
    "80": ("A100", "A800", "A30"),
    "86": (
        *("RTX 3050", "RTX 3060", "RTX 3060 Ti", "RTX 3070", "RTX 3070 Ti", "RTX 3080", "RTX 3080 Ti", "RTX 3090"),
        *("RTX 3090 Ti", "RTX A2000", "RTX A4000", "RTX A4500", "RTX A5000", "RTX A5500", "RTX A6000"),
        *("A2", "A10", "A10G", "A16", "A40"),
    ),
    "89": (
        *("RTX 4050", "RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 Ti", "RTX 4080", "RTX 4090", "L4", "L20", "L40"),
        *("L40S", "RTX 2000 Ada", "RTX 4000 Ada", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 6000 Ada"),
    ),
    "90": ("H100", "H200", "H800", "H20", "GH200"),
    "100": ("B100", "B200", "GB200"),
    "103": ("B300", "GB300"),
    "120": (
        *("RTX 5050", "RTX 5060", "RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090"),
        *("RTX PRO 4000", "RTX PRO 4500", "RTX PRO 5000", "RTX PRO 6000"),
    ),
    "121": ("GB10", "DGX Spark"),
}
"""Names by SM, without NVIDIA's or GeForce before them."""
DECORATIONS = ("nvidia", "geforce", "tesla", "generation", "blackwell", "laptop", "gpu", "super", "pcie", "sxm", "nvl")
"""Words that change no compute capability."""
_SMS = {name: sm for sm, names in FAMILIES.items() for name in names}


def sm_of_gpu(text: str) -> str:
    """The SM of the GPU called ``text``, such as ``RTX 5090``, ``NVIDIA L40S`` or ``rtx4090``.

    Raises :class:`RequestError` for a name that is not known, with those that are like it.
    """
    wanted = _plain(text)
    found = next((sm for name, sm in _SMS.items() if _plain(name) == wanted), None)
    if found is not None:
        return found
    plain = {_plain(name): name for name in _SMS}
    near = [plain[name] for name in get_close_matches(wanted, plain, 3)] or ["RTX 4090", "L40S", "RTX 5090"]
    raise RequestError(
        f"--for {text!r}: no GPU of this name is known; there are {', '.join(near)} and others: give its compute "
        "capability with --sm"
    )


def _plain(text: str) -> str:
    """``text`` in small letters without decorations, spaces, memory sizes and form factors."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    kept = [word for word in words if word not in DECORATIONS and not re.fullmatch(r"\d+gb|sxm\d|hbm\d\w?", word)]
    return "".join(kept)
