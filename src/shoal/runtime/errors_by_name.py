"""Errors that cross a process border: by class name and text, so that they come out as what they were."""

from __future__ import annotations

from shoal import errors
from shoal.runtime.messages import Failed

_CLASSES = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.ShoalError)
}


def failure(error: Exception) -> Failed:
    """The message for an error of the tree, a bad argument (ValueError), or a lack of memory."""
    if isinstance(error, errors.ShoalError):
        return Failed(kind=type(error).__name__, text=str(error))
    if isinstance(error, ValueError):
        return Failed(kind="RequestError", text=str(error))
    if isinstance(error, MemoryError):
        return Failed(kind="InfeasiblePlacement", text=str(error) or "out of memory")
    return Failed(kind="ShoalError", text=f"{type(error).__name__}: {error}")


def revive(message: Failed) -> errors.ShoalError:
    """The error that a message stands for; an unknown class becomes the tree's root."""
    return _CLASSES.get(message.kind, errors.ShoalError)(message.text)
