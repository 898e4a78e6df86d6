"""This tree against an earlier commit: one device, one model that fits, in turns.

`COMMIT` names the other one; without it, the last commit that knew of no streaming. `decode_ratio` and `prefill_ratio` are
our speed over its, medians over rounds: 1 is as fast, 0.98 is 2 % slower. Both run with the libraries that are installed
here, and each answer comes from a fresh process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.models import random_model, smollm2
from benchmarks.record import finish, is_quick

ROOT = Path(__file__).parent.parent
BEFORE_STREAMING = "5e2a358"
PROMPT = " ".join(["river"] * 400)
TOKENS = 120


def answer(source: Path, model: Path, *, threads: int) -> dict[str, Any]:
    """Asks the tree at `source`."""
    start = "import sys; from shoal.cli.main import main; sys.exit(main())"
    ask = [sys.executable, "-c", start, "run", str(model), "--json", "--temperature=0", f"--threads={threads}"]
    ask += [f"--max-tokens={TOKENS}", "--raw", "--", PROMPT]
    done = subprocess.run(ask, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source / "src")})
    if done.returncode != 0:
        sys.exit(f"{source}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(before: Path, model: Path, *, threads: int, rounds: int) -> dict[str, float]:
    decode, prefill = [], []
    for _ in range(rounds):
        theirs, ours = (answer(source, model, threads=threads) for source in (before, ROOT))
        if len(theirs["token_ids"]) != len(ours["token_ids"]):
            sys.exit("the answers are not equally long")
        decode.append(ours["tokens_per_s"] / theirs["tokens_per_s"])
        prefill.append(theirs["prefill_s"] / ours["prefill_s"])
        print(model.stem, round(decode[-1], 3), round(prefill[-1], 3), file=sys.stderr)
    return {
        "decode_ratio": round(statistics.median(decode), 4),
        "prefill_ratio": round(statistics.median(prefill), 4),
        "decode_min": round(min(decode), 4),
        "decode_max": round(max(decode), 4),
        "prefill_min": round(min(prefill), 4),
        "prefill_max": round(max(prefill), 4),
    }


def main() -> None:
    commit = os.environ.get("COMMIT") or BEFORE_STREAMING
    models = [smollm2()] if is_quick() else [smollm2(), random_model("llama-3.2-1b", "Q4_K_M")]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        added = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(before), commit]
        try:
            subprocess.run(added, check=True)
        except subprocess.CalledProcessError:
            sys.exit(f"COMMIT={commit}: there is no such commit here (a shallow clone has few)")
        try:
            found = {model.stem: compare(before, model, threads=2, rounds=5 if is_quick() else 15) for model in models}
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)], check=True)
    figures = {
        "decode_ratio": min(row["decode_ratio"] for row in found.values()),
        "prefill_ratio": min(row["prefill_ratio"] for row in found.values()),
        "models": found,
    }
    finish("against", figures, {"commit": commit, "tokens": TOKENS})


if __name__ == "__main__":
    main()
