"""What guessing ahead brings with the default model: how many guesses are right, and how much faster the same tokens come.

    python benchmarks/bench_speculation.py [--workloads edit again prose sampled] [--dtypes bfloat16 float32]

Each piece of work runs once with each setting, one setting after the other, so that a noisy machine disturbs all alike. Prints
one JSON line a workload and setting: output tokens per second (median over the pieces), the speed-up (median of the time
without guesses by the time with them), the share of guesses that were right, the tokens that a sequence got of a step with
guesses, the share of those steps that were right at each of the first places, and how many requests gave other tokens than
without guesses (by rounding: a row of several tokens and rows of one are other products).

- ``edit``: correct the spelling of a text; ``again``: then repeat the same text. One stream; guesses by ngram, suffix, both.
- ``prose``, ``sampled``: continue stories, greedy and at temperature 0.8. The target computes in float32, the draft is the
  same model in bfloat16. One stream and eight.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from vllm_core import SamplingParams
from vllm_model import LLM

TEXTS = [
    "The meeting of the gardn club will be held on Monday at the town hall. Members are asked to bring their own chairs and a "
    "plant to exchange. Mrs. Alder will speak about roses, and tea will be servd after the talk. Visitors are welcome and pay "
    "two pounds at the door. The hall is behind the libary, and cars may be left in the yard.",
    "The train to the coast leaves from platfrom four at nine in the morning. It stops at Harwell, Linton and Sandy Bay, and "
    "arrives at noon. Tickets bougt on board cost more than those from the machine. Bicycles travel free outside the rush "
    "hours. The last train back leaves at half past seven.",
    "Our new oven bakes bread in forty minuts. Heat it for a quarter of an hour, put the dough on the lower shelf and pour a "
    "cup of water onto the tray. After twenty minutes open the dor for a moment to let the steam out. The loaf is done when "
    "it sounds hollow. Let it cool on a rack before you cut it.",
    "The bridge over the Tarn was closed on Friday after a lory struck a pillar. Engineers found two cracks and expect the "
    "repair to last three weeks. Drivers are sent over the old bridge in the north, where the speed limit is thirty. The "
    "ferry runs every twenty minuts until then. Nobody was hurt.",
]
STORIES = [
    "Once upon a time, in a village by the sea, there lived a young fisherman who",
    "The history of the bicycle begins in the nineteenth century, when",
    "To make a good vegetable soup, first",
    "The scientist opened the door of the laboratory and saw",
    "Dear neighbours, as most of you know, our street",
    "When the first snow fell, the children of the valley",
    "There are three reasons why people keep bees. The first",
    "The captain looked at the map and said that the island",
]
QUESTIONS = {
    "edit": "Correct the spelling of this text and return the whole text:",
    "again": "Repeat the following text exactly:",
}
DRAFT_TOKENS = 12
"""Most guesses without a model: they cost little."""


@dataclass(slots=True)
class Tally:
    """What one setting did in one workload."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    num_drafts: int = 0
    num_guesses: int = 0
    right_at: list[int] = field(default_factory=list)


Work = list[tuple[list[int], SamplingParams]]
"""Requests that run at once."""


def run(llm: LLM, work: Work, tally: Tally) -> None:
    """One piece of work, timed; what the engine counted goes to the tally."""
    metrics = llm.engine.metrics
    before = (metrics.spec_decode_num_drafts, metrics.spec_decode_num_draft_tokens)
    right_before = list(metrics.spec_decode_num_accepted_tokens_per_pos)
    start = time.perf_counter()
    outputs = llm.generate([prompt for prompt, _ in work], [params for _, params in work], use_tqdm=False)
    tally.seconds.append(time.perf_counter() - start)
    token_ids = [output.outputs[0].token_ids for output in outputs]
    tally.token_ids += token_ids
    tally.tokens.append(sum(map(len, token_ids)))
    tally.num_drafts += metrics.spec_decode_num_drafts - before[0]
    tally.num_guesses += metrics.spec_decode_num_draft_tokens - before[1]
    right = [int(now - then) for now, then in zip(metrics.spec_decode_num_accepted_tokens_per_pos, right_before, strict=True)]
    tally.right_at = [a + b for a, b in zip_longest(tally.right_at, right, fillvalue=0)]


def report(workload: str, setting: str, tally: Tally, plain: Tally) -> None:
    """Print a line."""
    ratios = [slow / fast for slow, fast in zip(plain.seconds, tally.seconds, strict=True)]
    rates = [tokens / seconds for tokens, seconds in zip(tally.tokens, tally.seconds, strict=True)]
    others = sum(a != b for a, b in zip(plain.token_ids, tally.token_ids, strict=True))
    line: dict[str, Any] = {
        "workload": workload,
        "guesses": setting,
        "tok_s": round(statistics.median(rates), 1),
        "speed_up": round(statistics.median(ratios), 2),
        "requests": len(tally.token_ids),
        "with_other_tokens": others,
    }
    if tally.num_drafts:
        right = sum(tally.right_at)
        line |= {
            "acceptance": round(right / tally.num_guesses, 3),
            "tokens_a_step": round(1 + right / tally.num_drafts, 2),
            "right_at": [round(count / tally.num_drafts, 2) for count in tally.right_at[:6]],
        }
    print(json.dumps(line), flush=True)


def chat_prompt(llm: LLM, text: str) -> list[int]:
    """A question as the model wants to see it."""
    assert llm.tokenizer is not None
    assert llm.chat_template is not None
    rendered = llm.chat_template.render([{"role": "user", "content": text}])
    return llm.tokenizer.encode(rendered, add_special_tokens=False)


def compare(settings: dict[str, LLM], workloads: dict[str, list[Work]]) -> None:
    """Run each piece of work with each setting in turn, all of one workload before the next."""
    warm_up = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    num_streams = max(len(work) for pieces in workloads.values() for work in pieces)
    for llm in settings.values():
        llm.generate([list(range(i, i + 20)) for i in range(num_streams)], warm_up, use_tqdm=False)
    for workload, pieces in workloads.items():
        tallies = {name: Tally() for name in settings}
        for work in pieces:
            for name, llm in settings.items():
                run(llm, work, tallies[name])
        for name, tally in tallies.items():
            report(workload, name, tally, tallies["none"])
    for llm in settings.values():
        llm.close()


def make(dtype: str, **speculative: Any) -> LLM:
    """The default model, with or without speculation."""
    return LLM("default", dtype=dtype, max_model_len=512, kv_cache_memory_bytes=1 << 28, speculative=speculative or None)


def without_a_model(dtype: str, names: list[str]) -> None:
    """Guesses by ngram and suffix on texts that come again."""
    settings = {
        "none": make(dtype),
        "ngram": make(dtype, method="ngram", num_speculative_tokens=DRAFT_TOKENS),
        "suffix": make(dtype, method="suffix", num_speculative_tokens=DRAFT_TOKENS),
        "both": make(dtype, method=["ngram", "suffix"], num_speculative_tokens=DRAFT_TOKENS),
    }
    greedy = SamplingParams(temperature=0, max_tokens=128)
    llm = settings["none"]
    workloads: dict[str, list[Work]] = {
        f"{name} {dtype}": [[(chat_prompt(llm, f"{QUESTIONS[name]}\n\n{text}"), greedy)] for text in TEXTS] for name in names
    }
    compare(settings, workloads)


def with_a_draft(names: list[str], draft_tokens: int, num_streams: int) -> None:
    """The default model in bfloat16 guesses for its float32 self."""
    settings = {"none": make("float32"), "draft": make("float32", model="default", num_speculative_tokens=draft_tokens)}
    tokenizer = settings["none"].tokenizer
    assert tokenizer is not None
    workloads: dict[str, list[Work]] = {}
    for name in names:
        temperature = 0.0 if name == "prose" else 0.8
        requests = [
            (tokenizer.encode(story), SamplingParams(temperature=temperature, seed=seed, max_tokens=64, ignore_eos=True))
            for seed, story in enumerate(STORIES)
        ]
        pieces = [requests[at : at + num_streams] for at in range(0, 4 if num_streams == 1 else len(STORIES), num_streams)]
        workloads[f"{name} float32, {num_streams} at once"] = pieces if len(pieces) > 1 else pieces * 3
    compare(settings, workloads)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["edit", "again", "prose", "sampled"]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of edit and again")
    parser.add_argument("--draft-tokens", type=int, default=3, help="most guesses of the draft")
    args = parser.parse_args()
    copying = [name for name in args.workloads if name in QUESTIONS]
    for dtype in args.dtypes if copying else []:
        without_a_model(dtype, copying)
    drafted = [name for name in args.workloads if name not in QUESTIONS]
    for num_streams in (1, len(STORIES)) if drafted else ():
        with_a_draft(drafted, args.draft_tokens, num_streams)


if __name__ == "__main__":
    main()
