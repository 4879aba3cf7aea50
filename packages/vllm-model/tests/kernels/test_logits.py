from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.logits import Guessed, LogitsState, process_logits, process_logits_reference

Check = Callable[..., None]
VOCABS = [100, 3000, pytest.param(151936, marks=pytest.mark.gpu)]
ROWS = 6


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("what", ["penalties", "bitmask", "bias", "all", "all, guessed"])
def test_process_logits(vocab: int, what: str, device: str, check: Check) -> None:
    slots = torch.randperm(ROWS + 2)[:ROWS].int().to(device)
    words = -(-vocab // 32)

    def bits() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (ROWS + 2, words), device=device).int()

    values = {
        name: torch.rand(ROWS + 2, device=device) + 0.5
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    }
    fields: dict[str, torch.Tensor] = {}
    if what == "penalties" or "all" in what:
        counts = torch.randint(0, 3, (ROWS + 2, vocab), dtype=torch.int16, device=device)
        fields |= {"output_counts": counts, "prompt_bits": bits(), **values}
    if what == "bitmask" or "all" in what:
        fields["bitmask"] = bits()
    if what == "bias" or "all" in what:
        tokens = torch.stack([torch.randperm(vocab, device=device)[:9] for _ in range(ROWS + 2)]).int()
        tokens[:, 4] = -1
        tokens[:, 5] = vocab + 3
        fields |= {"bias_tokens": tokens, "bias_values": torch.randn(ROWS + 2, 9, device=device) * 10}
        fields["bias_values"][:, 2] = float("-inf")
    state = LogitsState(**fields)
    logits = (torch.randn(ROWS, vocab, device=device) * 3).bfloat16()
    slots[1] = -1
    out = torch.full((ROWS, vocab), float("nan"), device=device)
    guessed = None
    if "guessed" in what:  # three rows: a token known, and as many guesses
        masks, tokens = torch.randint(0, ROWS + 2, (ROWS,)), torch.randint(0, vocab, (ROWS,))
        tokens[4] = tokens[3]
        number = torch.tensor([0, 0, 1, 2, 3, 0])
        guessed = Guessed(*(each.int().to(device) for each in (masks, tokens, number)))
    process_logits(logits, slots, state, out, guessed=guessed)
    live = slots >= 0
    assert out[~live].isnan().all()
    expected = process_logits_reference(logits.double(), slots, state, guessed)[live]
    assert torch.equal(out[live].isinf(), expected.isinf())
    check(out[live].nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0), 1e-6)


def test_it_writes_float32_to_another_tensor(device: str) -> None:
    logits = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="float32 to another"):
        process_logits(logits, torch.zeros(2, dtype=torch.int32, device=device), LogitsState(), logits)
