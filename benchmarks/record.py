"""Keeps results: one line of JSON per run in `results/NAME.jsonl`, with what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from shoal import __version__

RESULTS = Path(__file__).parent / "results"


def is_quick() -> bool:
    """Whether `QUICK=1` asks for less than a minute."""
    return os.environ.get("QUICK", "") not in ("", "0")


def finish(name: str, figures: dict[str, Any], settings: dict[str, Any]) -> None:
    """Appends the run to the results and prints its figures as the last line."""
    RESULTS.mkdir(exist_ok=True)
    line = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "version": __version__,
        "machine": {
            "processor": _processor(),
            "cores": psutil.cpu_count(logical=False),
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "load_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "settings": {**settings, "quick": is_quick()},
        "figures": figures,
    }
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(figures))
    sys.stdout.flush()


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, cwd=RESULTS
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
