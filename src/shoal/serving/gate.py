"""Decides who may come in: known hosts, no web pages unless asked for, and on any address but loopback only with a key.

A web page that the owner happens to visit can make the browser send requests to this machine. It is kept out three
times: the Host header must name this machine (so a name that an attacker points here does not), an Origin must be
allowed, and bodies must say that they are JSON (which browsers send for another origin only after asking).
"""

from __future__ import annotations

import hmac
import ipaddress
import platform
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.serving.failures import ApiError

OPEN_PATHS = ("/health", "/readyz")
"""Answered without a key: they tell nothing but whether somebody is at home."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class GateOptions:
    """What the owner decides. `hosts` are more names of this machine; `origins` may hold "*"."""

    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    own_names: Sequence[str] = field(default_factory=lambda: _own_names())


class Gate:
    """Stands before the application; refuses in OpenAI's shape, and gives every reply its `x-request-id`."""

    def __init__(self, app: ASGIApp, options: GateOptions) -> None:
        self._app = app
        self._options = options
        self._keys = [key.encode() for key in options.api_keys]
        self._hosts = {name.lower() for name in (*options.own_names, *options.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, send_named)
            return
        await self._app(scope, receive, send_named)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_own(host):
            raise ApiError(
                403,
                f"Host '{host[:100]}' is not this machine: use its address, or start with --allow-host",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            raise ApiError(
                403, f"web pages of '{origin[:100]}' may not use this: start with --allow-origin to let them",
                code="wrong_origin",
            )  # fmt: skip
        if self._keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            self._check_key(headers)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if not any(matches):
            what = "Incorrect API key provided" if given else "You didn't provide an API key"
            raise ApiError(
                401,
                f"{what}: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            # A number is no name that somebody else could point here.
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        return True

    def _is_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._options.origins or origin in self._options.origins:
            return True
        # Our own pages.
        return origin in (f"http://{host}", f"https://{host}")


def _own_names() -> tuple[str, ...]:
    node = platform.node().lower()
    return ("localhost", *((node, f"{node}.local", node.partition(".")[0]) if node else ()))
