"""What rows held to a grammar cost the host, one JSON line per measurement.

    python benchmarks/bench_structured.py MODEL

Of MODEL only the tokenizer and the configuration are read. Each grammar is walked by random tokens that it allows.
"""

# ruff: noqa: D103  a script documents itself above

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_model import resolve_model
from vllm_model.loaders import load_config
from vllm_model.structured import Grammars
from vllm_traits import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WANTED = {
    "schema": StructuredOutputsParams(json=SCHEMA),
    "any object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"([A-Z][a-z]+ )+\d{4}"),
    "choice": StructuredOutputsParams(choice=["yes", "no", "perhaps"]),
}
TOKENS = 60


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    path = resolve_model(sys.argv[1])
    config = load_config(path)
    grammars = Grammars.of(path, config.vocab_size, config.eos_token_ids)
    if grammars is None:
        sys.exit("this model has no tokenizer")
    first, _ = timed(lambda: grammars.matcher(StructuredOutputsParams(regex="a")))
    print(json.dumps({"vocabulary": config.vocab_size, "read_s": round(first, 2)}), flush=True)
    rng, bits = np.random.default_rng(0), np.zeros((1, grammars.words), np.int32)
    for name, wanted in WANTED.items():
        compiled, matcher = timed(lambda wanted=wanted: grammars.matcher(wanted))  # type: ignore[misc]
        masks, steps = [], []
        for _ in range(TOKENS):
            masks.append(timed(lambda matcher=matcher: grammars.fill(matcher, [], bits))[0])  # type: ignore[misc]
            tokens = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            token = int(rng.choice(tokens))
            if token in grammars.eos_token_ids:
                matcher = grammars.matcher(wanted)
                continue
            steps.append(timed(lambda matcher=matcher, token=token: grammars.consume(matcher, [token]))[0])  # type: ignore[misc]
        line = {"compile_ms": compiled * 1e3, "mask_us": statistics.median(masks) * 1e6, "worst_mask_us": max(masks) * 1e6}
        line["consume_us"] = statistics.median(steps) * 1e6
        print(json.dumps({"grammar": name} | {key: round(value, 1) for key, value in line.items()}), flush=True)


if __name__ == "__main__":
    main()
