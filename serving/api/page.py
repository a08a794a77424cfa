"""The page for people: three files as they are, for everybody; what they show comes by the API, with its token."""

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, Response

FOLDER = Path(__file__).parents[1] / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Name and type of the files by address; all are answered without a token."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Pictures and videos are fetched with the token and then shown as blobs; a form goes nowhere but by the script."""
router = APIRouter()


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
@router.get("/page.css", include_in_schema=False)
@router.get("/page.js", include_in_schema=False)
def file(request: Request) -> Response:
    """A file of the page."""
    name, kind = FILES[request.url.path]
    return FileResponse(FOLDER / name, media_type=kind, headers={"content-security-policy": POLICY})
