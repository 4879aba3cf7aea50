# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""From logits to tokens on the device, no sort and no wait of the host.

Temperature, min-p, top-k, top-p, Gumbel-max; :mod:`.logits` changes logits before, :mod:`.logprobs` reports on them. Parameters
live in per-slot arrays; ``slots[row]`` names a row's. The filters find the least logit that stays by bisection with snapping:
every pass over the row counts what is at or above a pivot and moves both ends of the interval onto logits that exist, until
they meet. Equal logits stay or go together.
"""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, num_sms, power_of_two, wait_for_previous
from vllm_model.noise import gumbel_noise

LANES = 32
EACH = 8
"""Tokens that a lane of a program takes at once, 16 bytes of 16-bit logits; it compares their least hash."""
PROGRAMS = 32
"""Programs of one warp on a multiprocessor."""


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _key(start, low, high, position):
    return _mix(_mix(_mix(low ^ start) ^ high) ^ position)


@triton.jit
def _noise_keys(seed, position):
    """``noise.noise_keys``; ``seed`` int64, ``position`` integer."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    place = position.to(tl.uint32)
    first = tl.full([1], 0x9E3779B9, tl.uint32)
    second = tl.full([1], 0x85EBCA6B, tl.uint32)
    return _key(first, low, high, place), _key(second, low, high, place)


@triton.jit
def _bits_in_part(token, first, second, factor):
    """32 bits of int32 tokens under one pair of keys; the upper 16 are those of ``noise.noise_bits``, the others nearly."""
    x = token.to(tl.uint32) + first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15) ^ second) * factor


@triton.jit
def _gumbel(x):
    """``noise.gumbel_noise`` of :func:`_bits_in_part`."""
    x = x ^ (x >> 16)
    v = tl.minimum(x.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return -tl.log(tl.where(v < 0.015625, series, -tl.log(1.0 - v)))


@triton.jit
def _above(logits_ptr, temperature, pivot, highest, vocab, BLOCK: tl.constexpr):
    """Of the scaled logits at or above ``pivot``: how many, their mass, the least; and the greatest below it."""
    offset = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + offset
        x = tl.load(logits_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32) / temperature
        inside = x >= pivot
        count += inside.to(tl.int32)
        mass += tl.where(inside, tl.exp(x - highest), 0.0)
        least = tl.minimum(least, tl.where(inside, x, float("inf")))
        below = tl.maximum(below, tl.where(inside, float("-inf"), x))
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.min(least, axis=0), tl.max(below, axis=0)


@triton.jit
def _bisect(logits_ptr, temperature, low, highest, wanted, vocab, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit ``t`` such that what is at or above it counts (or weighs) at least ``wanted``; ``low`` does."""
    top = highest  # the greatest logit that may be the answer
    while low < top:
        pivot = low + (top - low) * 0.5
        pivot = tl.where(pivot > low, pivot, top)
        count, mass, least, below = _above(logits_ptr, temperature, pivot, highest, vocab, BLOCK)
        if BY_MASS:
            enough = mass >= wanted
            upper = top
        else:
            enough = count >= wanted
            upper = tl.where(count == wanted, least, top)
        low = tl.where(enough, least, low)
        top = tl.where(enough, upper, tl.maximum(below, low))
    return low


@triton.jit
def _threshold_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    temperature_ptr,  # float32 [max_slots]
    top_k_ptr,  # int32 [max_slots]
    top_p_ptr,  # float32 [max_slots]
    min_p_ptr,  # float32 [max_slots]
    threshold_ptr,  # float32 [rows]
    logits_stride,
    vocab,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    threshold = float("-inf")
    if slot >= 0:
        temperature = tl.load(temperature_ptr + slot)
        top_k = tl.load(top_k_ptr + slot)
        top_p = tl.load(top_p_ptr + slot)
        min_p = tl.load(min_p_ptr + slot)
        limit_k = (top_k > 0) & (top_k < vocab)
        if (temperature > 0.0) & (limit_k | (top_p < 1.0) | (min_p > 0.0)):
            logits_ptr += row * logits_stride
            offset = tl.arange(0, BLOCK)
            highest = tl.full([BLOCK], float("-inf"), tl.float32)
            for start in range(0, vocab, BLOCK):
                token = start + offset
                x = tl.load(logits_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32) / temperature
                highest = tl.maximum(highest, x)
            greatest = tl.max(highest, axis=0)
            # What is banned (-inf) never counts; far below the greatest is only what weighs nothing.
            low = tl.where(min_p > 0.0, greatest + tl.log(tl.maximum(min_p, 1e-37)), -3.0e38)
            count, mass, least, _ = _above(logits_ptr, temperature, low, greatest, vocab, BLOCK)
            low = tl.minimum(least, greatest)
            if limit_k & (count > top_k):
                low = _bisect(logits_ptr, temperature, low, greatest, top_k, vocab, False, BLOCK)
                count, mass, least, _ = _above(logits_ptr, temperature, low, greatest, vocab, BLOCK)
            if top_p < 1.0:
                low = _bisect(logits_ptr, temperature, low, greatest, top_p * mass, vocab, True, BLOCK)
            threshold = low
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _can_win(bits, reach, bound):
    """Whether a token of the hash ``bits`` can have a sum of ``bound``, with a scaled logit of at most ``reach``.

    Noise is -log(e) with e >= v for the random v of a token: it cannot where v > exp(reach - bound).
    """
    lead = reach - bound
    limit = (tl.exp(tl.minimum(lead, 0.0)) * 4294901760.0).to(tl.uint32) | 0xFFFF  # the lower 16 bits are not known
    return tl.max(((bits <= limit) | (lead >= 0.0)).to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["share", "splits"])
def _draw_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    temperature_ptr,  # float32 [max_slots]
    seed_ptr,  # int64 [max_slots]
    positions_ptr,  # [rows]
    threshold_ptr,  # float32 [rows]
    bound_ptr,  # float32 [rows], LEAST between launches
    part_value_ptr,  # float32 [rows, SPLITS]
    part_token_ptr,  # int32 [rows, SPLITS]
    count_ptr,  # int32 [rows], zero between launches
    out_ptr,  # int32 [rows]
    logits_stride,
    vocab,
    share,  # blocks of a program
    splits,
    SPLITS_BLOCK: tl.constexpr,
    FILTER: tl.constexpr,
    RANDOM: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    LEAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The greatest of ``logit / temperature + noise``: for nearly all tokens a part of the hash is all that is needed.

    What a row's programs have found bounds what can win, so noise is only computed where a lane's least hash is small enough
    for its greatest logit: first of that one token of each lane, then, rarely, of all. A bound that comes late from another
    program lets through more, and changes nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        if split == 0:
            tl.store(out_ptr + row, -1)
    else:
        begin = split * share * (LANES * EACH)
        end = tl.minimum(begin + share * (LANES * EACH), vocab)
        offset = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        logits_ptr += row * logits_stride
        ahead = tl.load(logits_ptr + begin + offset, mask=begin + offset < vocab, other=float("-inf"))
        best = float("-inf")
        best_token = begin
        if RANDOM:
            temperature = tl.load(temperature_ptr + slot)
            greedy = temperature <= 0.0
            temperature = tl.where(greedy, 1.0, temperature)
            inverse = 1.0 / temperature
            first, second = _noise_keys(tl.load(seed_ptr + slot), tl.load(positions_ptr + row))
            factor = tl.where(greedy, 0, 0x846CA68B).to(tl.uint32)  # of a greedy row all hashes are 0
            bound = LEAST
        if FILTER:
            threshold = tl.load(threshold_ptr + row)
        for start in range(begin, end, LANES * EACH):
            token = start + offset
            x = ahead.to(tl.float32)
            following = token + LANES * EACH
            ahead = tl.load(logits_ptr + following, mask=following < vocab, other=float("-inf"))
            if RANDOM:
                bits = _bits_in_part(token, first, second, factor)
                least = tl.min(bits, axis=1)  # [LANES]
                reach = tl.minimum(tl.maximum(tl.max(x, axis=1) * inverse, LEAST), -LEAST)
                reach += tl.abs(reach) * 4e-7 + 1e-3  # more than what is rounded here
                if FILTER:
                    reach = tl.where(reach >= threshold, reach, 2.0 * LEAST)
                hopeful = _can_win(least, reach, bound)
                if hopeful:
                    bound = tl.maximum(bound, tl.load(bound_ptr + row, volatile=True))
                    hopeful = _can_win(least, reach, bound)
                if hopeful:
                    mine = bits == least[:, None]
                    greatest = tl.max(tl.where(mine, x, float("-inf")), axis=1)
                    which = tl.min(tl.where(mine & (x == greatest[:, None]), token, 0x7FFFFFFF), axis=1)
                    total = greatest / temperature
                    if FILTER:
                        total = tl.where(total >= threshold, total, float("-inf"))
                    total += tl.where(greedy, 0.0, _gumbel(least))
                    value = tl.max(total, axis=0)
                    if value > best:  # strictly: of equal ones the first token stays
                        best = value
                        best_token = tl.min(tl.where(total == value, which, 0x7FFFFFFF), axis=0)
                        if best > bound:
                            bound = tl.minimum(best, -LEAST)
                            tl.atomic_max(bound_ptr + row, bound, sem="relaxed", scope="gpu")
                    if _can_win(tl.min(tl.where(mine, 0xFFFFFFFF, bits), axis=1), reach, bound):
                        x = x / temperature
                        if FILTER:
                            x = tl.where(x >= threshold, x, float("-inf"))
                        if not greedy:
                            x += _gumbel(bits)
                        value = tl.max(tl.max(x, axis=1), axis=0)
                        among = tl.min(tl.min(tl.where(x == value, token, 0x7FFFFFFF), axis=1), axis=0)
                        if value > best:
                            best = value
                            best_token = among
                        elif value == best:
                            best_token = tl.minimum(best_token, among)
                        bound = tl.minimum(tl.maximum(bound, best), -LEAST)
            else:
                value = tl.max(tl.max(x, axis=1), axis=0)
                if value > best:
                    best = value
                    best_token = tl.min(tl.min(tl.where(x == value, token, 0x7FFFFFFF), axis=1), axis=0)
        tl.store(part_value_ptr + row * SPLITS_BLOCK + split, best)
        tl.store(part_token_ptr + row * SPLITS_BLOCK + split, best_token)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + row, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.store(count_ptr + row, 0)
            tl.store(bound_ptr + row, LEAST)
            s = tl.arange(0, SPLITS_BLOCK)
            part = row * SPLITS_BLOCK + s
            values = tl.load(part_value_ptr + part, mask=s < splits, other=float("-inf"), cache_modifier=".cg")
            tokens = tl.load(part_token_ptr + part, mask=s < splits, other=0x7FFFFFFF, cache_modifier=".cg")
            value = tl.max(values, axis=0)
            token = tl.min(tl.where(values == value, tokens, 0x7FFFFFFF), axis=0)
            tl.store(out_ptr + row, tl.minimum(token, vocab - 1))


class SamplerWorkspace:
    """Device buffers of the sampler, of fixed size, good for CUDA graphs; for one stream.

    Args:
        max_rows: Most rows in one launch.
        device: Where the logits are.
    """

    MAX_SPLITS = 128
    LEAST = -1.0e30
    """Below every scaled logit that is not banned."""

    def __init__(self, max_rows: int, device: torch.device | str) -> None:
        self.max_rows = max_rows
        self.values = torch.empty(max_rows * self.MAX_SPLITS, dtype=torch.float32, device=device)
        self.tokens = torch.empty(max_rows * self.MAX_SPLITS, dtype=torch.int32, device=device)
        self.counts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.bounds = torch.full((max_rows,), self.LEAST, dtype=torch.float32, device=device)
        self.thresholds = torch.empty(max_rows, dtype=torch.float32, device=device)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    workspace: SamplerWorkspace,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    greedy: bool = False,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """One token per row: the greatest of ``logit / temperature + noise`` among the tokens that the filters leave.

    Min-p comes first, then top-k of what is left, then top-p of what is left, renormalised, as in vLLM.

    Args:
        logits: ``[rows, vocab]`` bf16, fp16 or float32, rows contiguous.
        slots: int32 ``[rows]``: where a row's parameters are; -1: padding, the token is -1.
        positions: int32 or int64 ``[rows]``: position of the token to be sampled, for the noise.
        temperature: float32 ``[max_slots]``; 0: the most likely token, the first of equals.
        seed: int64 ``[max_slots]``.
        workspace: Buffers.
        top_k: int32 ``[max_slots]``, 0 (or less) keeps all. The three filters come together; None: no row filters.
        top_p: float32 ``[max_slots]``, 1 keeps all.
        min_p: float32 ``[max_slots]``, 0 keeps all.
        greedy: Every row is greedy: temperatures and seeds are not read.
        out: int32 ``[rows]``; a new tensor when None.
        pdl: Programmatic dependent launch.

    Returns:
        int32 ``[rows]``.

    Raises:
        ValueError: More rows than the workspace has room for, or a filter without the others.
    """
    rows, vocab = logits.shape
    filters = (top_k, top_p, min_p)
    if rows > workspace.max_rows:
        raise ValueError(f"{rows} rows in a workspace for {workspace.max_rows}")
    if any(f is None for f in filters) and not all(f is None for f in filters):
        raise ValueError("top_k, top_p and min_p come together")
    if out is None:
        out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return out
    filtered = top_k is not None and not greedy
    if filtered:
        block = min(power_of_two(vocab), 8192)
        launch(
            _threshold_kernel,
            (rows,),
            logits,
            slots,
            temperature,
            top_k,
            top_p,
            min_p,
            workspace.thresholds,
            logits.stride(0),
            vocab,
            BLOCK=block,
            PDL=pdl,
            num_warps=max(1, min(32, block // 256)),
            **launch_options(pdl),
        )
    # The maximum is exact, so the number of programs may follow the batch.
    blocks = triton.cdiv(vocab, LANES * EACH)
    share = triton.cdiv(blocks, max(1, min(triton.cdiv(PROGRAMS * num_sms(logits.device), rows), workspace.MAX_SPLITS)))
    splits = triton.cdiv(blocks, share)
    launch(
        _draw_kernel,
        (rows, splits),
        logits,
        slots,
        temperature,
        seed,
        positions,
        workspace.thresholds,
        workspace.bounds,
        workspace.values,
        workspace.tokens,
        workspace.counts,
        out,
        logits.stride(0),
        vocab,
        share,
        splits,
        SPLITS_BLOCK=workspace.MAX_SPLITS,
        FILTER=filtered,
        RANDOM=not greedy,
        LANES=LANES,
        EACH=EACH,
        LEAST=workspace.LEAST,
        PDL=pdl,
        num_warps=1,
        **launch_options(pdl),
    )
    return out


def filter_reference(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which tokens the filters leave, bool ``[rows, vocab]``; parameters by row (``[rows]``), equal logits stay together."""
    rows = len(logits)
    x = logits.to(torch.float64) / temperature.to(torch.float64).clamp(min=1e-30)[:, None]
    ordered = x.sort(dim=-1, descending=True).values
    keep = x >= ordered[:, :1] + min_p.to(torch.float64).log()[:, None]
    for row in range(rows):
        left = ordered[row, : int(keep[row].sum())]
        k = int(top_k[row])
        if 0 < k < len(left):
            keep[row] &= x[row] >= left[k - 1]
            left = left[left >= left[k - 1]]
        if top_p[row] < 1.0:
            mass = (left - left[0]).exp().cumsum(0)
            last = int((mass < float(top_p[row]) * mass[-1]).sum())
            keep[row] &= x[row] >= left[min(last, len(left) - 1)]
    return keep & (x > float("-inf"))


def sample_reference(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """What :func:`sample` draws, int64 ``[rows]``; parameters by row (``[rows]``), with a sort."""
    keep = filter_reference(logits, temperature, top_k, top_p, min_p)
    token = torch.arange(logits.shape[1], device=logits.device)
    noise = gumbel_noise(seed[:, None], positions[:, None], token[None])
    scaled = logits.float() / temperature.clamp(min=1e-30)[:, None] + noise
    drawn = scaled.masked_fill(~keep, float("-inf")).argmax(-1)
    return torch.where(temperature > 0, drawn, logits.float().argmax(-1))
