// The token of a row of logits: the greatest; with a temperature, of logits / temperature that filters leave, Gumbel noise added.
// The noise is that of noise.py: a function of seed, position and token. The filters are those of sampler.py: min-p, top-k of
// what is left, top-p of what is left; equal logits stay or go together.
#pragma once
#include "products.h"

#define MOST_NOISE 26.0f  // noise lies in -2.9 .. 23: no token so far behind the first can win

typedef struct {
    const float *logits;       // [rows, stride]
    int64_t stride;
    int32_t rows, vocab_size;
    const float *temperature;  // [rows], 0: greedy
    const float *min_p, *top_p;        // [rows], 0 and 1: all
    const int32_t *top_k;              // [rows], 0: all
    const int64_t *seeds, *positions;  // [rows]
    int64_t *tokens;           // [rows]
    float *room;               // [threads, 3, vocab_size]
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

// --- filters ---

#define BINS 1024
#define NEAR 12.0f  // behind the first; what is farther has e**-12 of its weight and is seldom needed

// Candidates: values, their weights e**(value - high), and both by distance from `high`, nearest first.
typedef struct {
    float high, per_bin;
    int num;
    float *values, *weights;
    int count[BINS];
    double mass[BINS];
} Candidates;

INLINE int bin_of(const Candidates *c, float value) {
    float bin = (c->high - value) * c->per_bin;
    return bin < BINS - 1 ? (int)bin : BINS - 1;
}

static void fill_bins(Candidates *c) {
    memset(c->count, 0, sizeof c->count);
    memset(c->mass, 0, sizeof c->mass);
    for (int i = 0; i < c->num; i++) {
        int bin = bin_of(c, c->values[i]);
        c->count[bin]++;
        c->mass[bin] += c->weights[i];
    }
}

// Values of logits / temperature at least `least`; returns the weight of all that are at least `bound`.
static double collect(Candidates *c, const float *logits, int n, float temperature, float least, float bound) {
    double total = 0;
    float lowest = c->high;
    c->num = 0;
    for (int start = 0; start < n; start += LANES) {
        vf value = splat(-INFINITY);
        if (start + LANES <= n) value = load(logits + start) / temperature;
        else
            for (int i = 0; start + i < n; i++) value[i] = logits[start + i] / temperature;
        vf weight = choose(value >= bound, exp_of(value - c->high), (vf){0});
        total += sum_of(weight);
        if (!any(value >= least)) continue;
        for (int i = 0; i < LANES; i++)
            if (value[i] >= least && value[i] > -INFINITY) {
                c->values[c->num] = value[i];
                c->weights[c->num++] = weight[i];
                lowest = value[i] < lowest ? value[i] : lowest;
            }
    }
    c->per_bin = lowest < c->high ? BINS / (c->high - lowest) : 0;
    fill_bins(c);
    return total;
}

static int descending(const void *a, const void *b) {
    float left = *(const float *)a, right = *(const float *)b;
    return left < right ? 1 : left > right ? -1 : 0;
}

// The values of a bin, the greatest first, into `out`.
static int sorted_bin(const Candidates *c, int bin, float *out) {
    int num = 0;
    for (int i = 0; i < c->num; i++)
        if (bin_of(c, c->values[i]) == bin) out[num++] = c->values[i];
    qsort(out, num, sizeof *out, descending);
    return num;
}

// The k-th greatest candidate.
static float kth_greatest(const Candidates *c, int k, float *room) {
    int bin = 0, before = 0;
    while (before + c->count[bin] < k) before += c->count[bin++];
    sorted_bin(c, bin, room);
    return room[k - 1 - before];
}

// The least candidate with less than `wanted` weight above it.
static float last_within(const Candidates *c, double wanted, float *room) {
    double above = 0;
    int bin = 0;
    while (bin < BINS - 1 && above + c->mass[bin] < wanted) above += c->mass[bin++];
    int num = sorted_bin(c, bin, room);
    float last = c->high;
    for (int i = 0; i < num && above < wanted; i++) {
        last = room[i];
        above += expf(room[i] - c->high);
    }
    return last;
}

// The least of logits / temperature that the filters of a row leave.
static float least_kept(const Draw *d, int row, const float *logits, float high) {
    const int n = d->vocab_size, top_k = d->top_k[row] > 0 && d->top_k[row] < n ? d->top_k[row] : 0;
    const float temperature = d->temperature[row], top_p = d->top_p[row];
    float bound = d->min_p[row] > 0 ? high + logf(d->min_p[row]) : -INFINITY;
    if (!top_k && top_p >= 1) return bound;
    float *room = d->room + thread_number * 3L * n, *bin = room + 2L * n;
    Candidates c = {.high = high, .values = room, .weights = room + n};
    for (int all = 0; all < 2; all++) {
        float least = all || bound > high - NEAR ? bound : high - NEAR;
        double total = collect(&c, logits, n, temperature, least, bound);
        int complete = least == bound;
        float kept = bound;
        if (top_k && c.num < top_k && !complete) continue;
        if (top_k && c.num > top_k) {
            kept = kth_greatest(&c, top_k, bin);
            int num = 0;
            total = 0;
            for (int i = 0; i < c.num; i++)
                if (c.values[i] >= kept) {
                    c.values[num] = c.values[i];
                    total += c.weights[num++] = c.weights[i];
                }
            c.num = num;
            fill_bins(&c);
            complete = 1;
        }
        if (top_p >= 1) return kept;
        double there = 0;
        for (int i = 0; i < BINS; i++) there += c.mass[i];
        if (there < top_p * total && !complete) continue;
        return last_within(&c, top_p * total, bin);
    }
    return bound;
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
        float most = -INFINITY;
        int i = 0;
        for (; i + LANES <= n; i += LANES) high = maximum(high, load(logits + i));
        for (; i < n; i++) most = logits[i] > most ? logits[i] : most;
        most = (max_of(high) > most ? max_of(high) : most) / temperature;
        float least = most > -INFINITY && most < INFINITY ? least_kept(d, row, logits, most) : -INFINITY;
        high = splat(least > most - MOST_NOISE ? least : most - MOST_NOISE);
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
            value = choose(value >= high, value + gumbel((vu)(lanes + i), first, second), splat(-INFINITY));
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
