"""Where this device gets its power from."""

from __future__ import annotations

from contextlib import suppress

import psutil


def is_on_mains() -> bool | None:
    """None where there is no battery, or the system does not say."""
    sensors = getattr(psutil, "sensors_battery", None)
    with suppress(OSError, RuntimeError, NotImplementedError):
        battery = sensors() if sensors is not None else None
        if battery is not None:
            return bool(battery.power_plugged)
    return None
