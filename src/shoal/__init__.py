"""shoal: the devices you already own, joined into one machine that serves and trains large models."""

__version__ = "0.1.0"
