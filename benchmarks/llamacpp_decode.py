"""llama.cpp decoding in a process of its own, so that it can run on a device of the lab: mean seconds per token as JSON."""

from __future__ import annotations

import argparse
import json
import statistics

from tests.oracle.llamacpp import Llama


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llamacpp_decode", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    with Llama(arguments.model, threads=1, context=arguments.context) as llama:
        # As with an answer of ours, weights have been read once when the first step is timed.
        token_s = llama.time_decode(arguments.tokens, at_position=4)
    print(json.dumps({"token_s": statistics.mean(token_s)}))


if __name__ == "__main__":
    main()
