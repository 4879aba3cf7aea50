"""What rows held to a grammar cost, one JSON line per measurement.

    python benchmarks/bench_structured.py MODEL [ROWS ...]

Without ROWS the host's part alone: each grammar is walked by random tokens that it allows. With them an engine with random
weights generates with none, half and all of so many rows held to a JSON array that does not end: the best of three, prompts of
64 tokens a row included. Of MODEL the tokenizer and the configuration are read.
"""

# ruff: noqa: D103  a script documents itself above

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vllm_core import SamplingParams
from vllm_model import LLM, resolve_model
from vllm_model.loaders import load_config
from vllm_model.structured import Grammars, HeldRow, Walk
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
ENDLESS = StructuredOutputsParams(json={"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 1000})
TOKENS = 60
GENERATED = 128


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def host(path: Path) -> None:
    config = load_config(path)
    grammars = Grammars.of(path, config.vocab_size, config.eos_token_ids)
    if grammars is None:
        sys.exit("this model has no tokenizer")
    first, _ = timed(lambda: grammars.original(StructuredOutputsParams(regex="a")))
    print(json.dumps({"vocabulary": config.vocab_size, "read_s": round(first, 2)}), flush=True)
    rng, bits = np.random.default_rng(0), np.zeros((1, grammars.words), np.int32)
    for name, wanted in WANTED.items():
        compiled, original = timed(lambda wanted=wanted: grammars.original(wanted))  # type: ignore[misc]
        matcher, masks, steps = original.matcher.deep_copy(), [], []
        for _ in range(TOKENS):
            walk = Walk(HeldRow(wanted, original, matcher), [], 0)
            masks.append(timed(lambda walk=walk: grammars.fill([walk], bits))[0])  # type: ignore[misc]
            tokens = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            token = int(rng.choice(tokens))
            if token in grammars.eos_token_ids:
                matcher = original.matcher.deep_copy()
                continue
            steps.append(timed(lambda matcher=matcher, token=token: grammars.consume(matcher, [token]))[0])  # type: ignore[misc]
        line = {"compile_ms": compiled * 1e3, "mask_us": statistics.median(masks) * 1e6, "worst_mask_us": max(masks) * 1e6}
        line["consume_us"] = statistics.median(steps) * 1e6
        print(json.dumps({"grammar": name} | {key: round(value, 1) for key, value in line.items()}), flush=True)


def engine(path: Path, rows: list[int]) -> None:
    llm = LLM(path, load_format="dummy", max_model_len=2048, max_num_seqs=max(rows), skip_tokenizer_init=True)
    rng = np.random.default_rng(0)
    for num, held in [(row, part) for row in rows for part in sorted({0, row // 2, row})]:
        params = [
            SamplingParams(
                max_tokens=GENERATED, ignore_eos=True, detokenize=False, structured_outputs=ENDLESS if row < held else None
            )
            for row in range(num)
        ]
        seconds = []
        for _ in range(3):
            prompts = rng.integers(100, 40_000, (num, 64)).tolist()
            seconds.append(timed(lambda: llm.generate(prompts, params, use_tqdm=False))[0])  # noqa: B023
        line = {"rows": num, "held": held, "ms_a_token": round(min(seconds) / GENERATED * 1e3, 3)}
        print(json.dumps(line | {"out_tok_s": round(num * GENERATED / min(seconds))}), flush=True)
    llm.close()


if __name__ == "__main__":
    folder = resolve_model(sys.argv[1])
    if sys.argv[2:]:
        engine(folder, [int(each) for each in sys.argv[2:]])
    else:
        host(folder)
