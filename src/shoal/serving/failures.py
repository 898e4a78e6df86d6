"""Decides with which status and in which words a failure reaches an HTTP client: always in the shape that OpenAI's has.

Clients act on the status: 408, 409, 429 and 5xx are tried again by the official ones, after `Retry-After` seconds.
Where trying again cannot help, `x-should-retry: false` says so.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
from starlette.responses import Response

from shoal import errors
from shoal.serving.replies import ErrorBody, ErrorDetail, LoadingState

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_NAMED_FIELD = re.compile(r"^([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*)(?:: | has token id )")


class ApiError(Exception):
    """What an HTTP client is told. `message` is one line; `param` names the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        loading: LoadingState | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message,
            type=_TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error"),
            param=param,
            code=code,
        )
        self.loading = loading
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
            self.headers["retry-after-ms"] = str(max(1, math.ceil(retry_after_s * 1000)))
        if should_retry is not None:
            self.headers["x-should-retry"] = str(should_retry).lower()

    @property
    def body(self) -> bytes:
        """The reply's body, which is also the data of an `error` event."""
        return msgspec.json.encode(ErrorBody(self.detail, loading=self.loading or msgspec.UNSET))

    def response(self) -> Response:
        return Response(self.body, status_code=self.status, media_type="application/json", headers=self.headers)


def from_error(error: Exception) -> ApiError:
    """The failure that an error of our own becomes."""
    text = str(error)
    match error:
        case ApiError():
            return error
        case errors.ContextExceeded():
            return ApiError(400, text, code="context_length_exceeded")
        case errors.TemplateError():
            return ApiError(400, text, param="messages")
        case errors.RequestError():
            named = _NAMED_FIELD.match(text)
            return ApiError(400, text, param=named[1] if named else None)
        case errors.ModelNotFound():
            return ApiError(404, text, param="model", code="model_not_found")
        case errors.UnsupportedModel():
            return ApiError(400, text, param="model", code="model_not_supported")
        case errors.InfeasiblePlacement():
            return ApiError(503, text, code="insufficient_memory", should_retry=False)
        case errors.BadModelFile():
            return ApiError(500, text, code="bad_model_file", should_retry=False)
        case errors.DeviceError() | errors.LinkError():
            # The next request finds another engine being built.
            return ApiError(503, text, code="device_lost", retry_after_s=1.0)
        case errors.ShoalError():
            return ApiError(500, text)
    return ApiError(500, f"an error of our own, please report it: {type(error).__name__}")


def from_validation(error: msgspec.MsgspecError) -> ApiError:
    """A body that is no JSON, or whose fields are not what they should be."""
    # A key that is wrong is told as "at `key` in `$.field`".
    text = str(error).replace(" - at `key` in `$", " - at `$")
    what, separator, path = text.partition(" - at `$")
    param = path.rstrip("`").removeprefix(".") or None
    if what.startswith("Object contains unknown field"):
        name = what.split("`")[1]
        param = f"{param}.{name}" if param else name
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if what.startswith("Object missing required field"):
        name = what.split("`")[1]
        param = f"{param}.{name}" if param else name
        return ApiError(400, f"Missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    if not isinstance(error, msgspec.ValidationError) or not separator:
        return ApiError(400, f"the body is not what is expected: {what}")
    return ApiError(400, f"Invalid '{param}': {what}" if param else what, param=param, code="invalid_value")


def unsupported(param: str, value: Any, advice: str) -> ApiError:
    """A field of OpenAI's API that is known here, and not supported."""
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    return ApiError(400, f"'{param}' is not supported ({shown}): {advice}", param=param, code="unsupported_parameter")
