"""Who may come in: one door for all routes, closed unless there is a reason to open it."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stiv_deploy.runtime.files import read_text, write_text
from stiv_deploy.serving.api.answers import error_answer
from stiv_deploy.serving.api.page import FILES
from stiv_deploy.serving.errors import ApiError, ServeError

OPEN = ("/health", "/ready", *FILES)
"""What is answered without a token."""
LOCAL = "local"
"""The owner of all jobs where there are no tokens."""
OWNER = "stiv.owner"
"""Key of a request's scope for who sent it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names that only this machine itself is called by."""
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
UPLOAD = 60.0
"""Seconds that the body of a request may take."""
BURST = 60.0
"""Seconds of their rate that new jobs may come at once."""


class Tokens:
    """Whose a token is, by the SHA-256 of tokens that are random and long; none at all means that nobody needs one."""

    def __init__(self, digests: Mapping[str, str] | None = None) -> None:
        self.digests = dict(digests or {})

    def __bool__(self) -> bool:
        return bool(self.digests)

    def owner(self, token: str) -> str | None:
        """The name that ``token`` is for; all are compared, and each in the same time."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = [name for name, each in self.digests.items() if hmac.compare_digest(each, digest)]
        return found[0] if found else None


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file with ``NAME SHA256`` a line; raises :class:`ServeError`."""
    try:
        lines = [line.split() for line in read_text(path).splitlines() if line.strip() and line[0] != "#"]
    except ValueError as error:
        raise ServeError(f"{path}: no file of tokens ({error}); make one with --new-token NAME") from None
    for line in lines:
        if len(line) != 2 or len(line[1]) != 64 or set(line[1]) - set("0123456789abcdef"):
            raise ServeError(f"{path}: want a name and the SHA-256 of a token a line, as --new-token NAME adds")
    if not lines:
        raise ServeError(f"{path}: has no token; add one with --new-token NAME")
    return Tokens({name: digest for name, digest in lines})


def add_token(path: Path, name: str) -> str:
    """A new token for ``name``, whose digest is written to the file ``path``; raises :class:`ServeError`."""
    if not name.isprintable() or len(name.split()) != 1 or name[0] == "#":
        raise ServeError(f"--new-token {name!r}: a name is one word without #")
    token = secrets.token_urlsafe(32)
    text = read_text(path) if path.exists() else ""
    write_text(path, f"{text}{name} {hashlib.sha256(token.encode()).hexdigest()}\n", "choose another --tokens")
    path.chmod(0o600)
    return token


class Rate:
    """A bucket for each owner that fills with ``rate`` a minute, up to a minute's worth."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate / 60, clock
        self._most = max(1.0, self._rate * BURST)
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, owner: str) -> float:
        """Take one out: 0, or the seconds until there is one."""
        now = self._clock()
        left, at = self._left.get(owner, (self._most, now))
        left = min(self._most, left + (now - at) * self._rate)
        self._left[owner] = (left - 1 if left >= 1 else left, now)
        return 0.0 if left >= 1 else (1 - left) / self._rate


class Guard:
    """The door in front of ``app``: without ``tokens`` only this machine's own names lead here, and no foreign page.

    A browser that is on another site can reach a server on its own machine; it says so in ``Origin``, and a name that
    was made to point here in ``Host``. Bodies have at most ``body_bytes``, and ``UPLOAD`` seconds.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, body_bytes: int, hosts: Iterable[str] = LOOPBACK) -> None:
        self._app, self._tokens, self._most, self._hosts = app, tokens, body_bytes, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here; to close before accepting is a 403
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        try:
            scope[OWNER] = self._owner(scope["path"], headers)
            self._check_length(headers.get("content-length", "0"))
        except ApiError as error:
            await error_answer(error)(scope, receive, guarded)
            return
        await self._app(scope, self._counted(receive), guarded)

    def _check_length(self, length: str) -> None:
        if not length.isdecimal() or len(length) > 18 or int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, "request_too_large", f"a request has at most {self._most} bytes here")

    def _counted(self, receive: Receive) -> Receive:
        """``receive``, but for an error where a body without a length becomes too large, or takes too long."""
        found, until = 0, time.monotonic() + UPLOAD
        whole = False

        async def counted() -> Message:
            nonlocal found, whole
            if whole:  # what comes now is that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise ApiError(408, "request_timeout", f"the request took longer than {UPLOAD:g} s to come") from None
            whole = not message.get("more_body", False)
            found += len(message.get("body", b""))
            if found > self._most:
                raise self._too_large()
            return message

        return counted

    def _owner(self, path: str, headers: Headers) -> str:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._tokens and _name(host) not in self._hosts:
            raise ApiError(403, "host_not_allowed", f"this server is not called {host[:80]!r}; use its own address")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "origin_not_allowed", "pages of other sites may not use this server")
        if not self._tokens or path in OPEN:
            return LOCAL
        kind, _, token = headers.get("authorization", "").partition(" ")
        owner = self._tokens.owner(token.strip()) if kind.lower() == "bearer" else None
        if owner is None:
            raise ApiError(401, "invalid_api_key", "no valid token was given; send 'Authorization: Bearer TOKEN'")
        return owner


def _name(host: str) -> str:
    """The name in a ``Host`` header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
