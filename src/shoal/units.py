"""Bytes and seconds inside, readable figures at the edge."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(num_bytes: float) -> str:
    """Decimal units, as disks and networks are sold: 98362432 -> '98.4 MB'."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Three figures and a fitting unit: 0.0000124 -> '12.4 us'."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def parse_bytes(text: str) -> int:
    """'8GB', '512 MiB', '1.5g', '4096' -> bytes.

    Raises:
        ValueError: names the text and the forms that are understood.
    """
    stripped = text.strip().lower().replace(" ", "")
    number = stripped.rstrip("bgikmt")
    suffix = stripped[len(number) :]
    scales = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    try:
        scale = scales[suffix.removesuffix("b")]
        num_bytes = int(float(number) * scale)
    except (KeyError, ValueError):
        raise ValueError(f"'{text}' is no size: write 8GB, 512MiB or a number of bytes") from None
    if num_bytes < 0:
        raise ValueError(f"'{text}' is negative")
    return num_bytes


def format_age(seconds: float) -> str:
    """How long ago something was: '0.3 s', '12 s', '4 min', '3 h', '2 days'."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10.0 else f"{seconds:.0f} s"
