// The token of a row of logits: the greatest, with Gumbel noise on logits / temperature if there is a temperature.
// The noise is that of noise.py: a function of seed, position and token.
#pragma once
#include "products.h"

#define MOST_NOISE 26.0f  // noise lies in -2.9 .. 23: no token so far behind the first can win

typedef struct {
    const float *logits;       // [rows, stride]
    int64_t stride;
    int32_t rows, vocab_size;
    const float *temperature;  // [rows], 0: greedy
    const int64_t *seeds, *positions;  // [rows]
    int64_t *tokens;           // [rows]
} Draw;

// Natural logarithm of normal positive numbers, within 2 units of the last place.
INLINE vf log_of(vf x) {
    vi bits = (vi)x;
    vi exponent = (bits - 0x3f3504f3) >> 23;
    vf f = (vf)(bits - (exponent << 23)) - 1.0f, e = to_float(exponent), z = f * f;
    vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z + e * -2.12194440e-4f - 0.5f * z;
    return f + p + e * 0.693359375f;
}

INLINE uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

INLINE vf gumbel(vu token, uint32_t first, uint32_t second) {
    vu x = token + first;
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15 ^ second) * 0x846CA68Bu;
    x = x ^ x >> 16;
    vf v = __builtin_convertvector(x, vf) * 0x1p-32f + 0x1p-33f;
    v = choose(v < 1.0f - 0x1p-24f, v, splat(1.0f - 0x1p-24f));
    vf series = v * (1.0f + v * (0.5f + v * (1.0f / 3.0f + v * 0.25f)));
    return -log_of(choose(v < 1.0f / 64.0f, series, -log_of(1.0f - v)));
}

INLINE int any(vi mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int found = 0;
    UNROLL for (int i = 0; i < LANES; i++) found |= mask[i];
    return found != 0;
#endif
}

static void draw_phase(void *args, int row) {
    const Draw *d = args;
    const float *logits = d->logits + row * d->stride;
    const int n = d->vocab_size;
    const float temperature = d->temperature[row];
    vi lanes, which = {0};
    UNROLL for (int i = 0; i < LANES; i++) lanes[i] = i;
    vf best = splat(-INFINITY), high = splat(-INFINITY);
    float tail[LANES];
    uint32_t first = 0, second = 0;
    if (temperature > 0) {
        uint32_t low = (uint32_t)d->seeds[row], upper = (uint32_t)(d->seeds[row] >> 32), place = (uint32_t)d->positions[row];
        first = mix(mix(mix(low ^ 0x9E3779B9u) ^ upper) ^ place);
        second = mix(mix(mix(low ^ 0x85EBCA6Bu) ^ upper) ^ place);
        for (int i = 0; i + LANES <= n; i += LANES) high = maximum(high, load(logits + i));
        high = splat(max_of(high) / temperature - MOST_NOISE);
    }
    for (int i = 0; i < n; i += LANES) {
        vf value;
        if (i + LANES <= n) value = load(logits + i);
        else {
            for (int j = 0; j < LANES; j++) tail[j] = i + j < n ? logits[i + j] : -INFINITY;
            value = load(tail);
        }
        if (temperature > 0) {
            value = value / temperature;
            if (!any(value >= high)) continue;
            value += gumbel((vu)(lanes + i), first, second);
        }
        vi better = value > best;
        best = choose(better, value, best);
        which = (better & (lanes + i)) | (~better & which);
    }
    int token = 0;
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++)
        if (best[i] > most || (best[i] == most && most > -INFINITY && which[i] < token)) most = best[i], token = which[i];
    d->tokens[row] = token;
}
