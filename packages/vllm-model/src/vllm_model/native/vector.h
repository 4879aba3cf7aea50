// Vectors of floats in the compiler's own extensions, as wide as the processor's; sixteen outputs are one panel everywhere.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PANEL 16
#define PARTS (PANEL / LANES)  // vectors in a panel

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef float vf_in_memory __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu_in_memory __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE vf load(const float *p) { return *(const vf_in_memory *)p; }
INLINE vu load_bits(const void *p) { return *(const vu_in_memory *)p; }
INLINE void store(float *p, vf v) { *(vf_in_memory *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf maximum(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float sum_of(vf v) {
    float sum = 0;
    UNROLL for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

INLINE float max_of(vf v) {
    float most = v[0];
    UNROLL for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// IEEE half precision, LANES of them.
INLINE vf load_half(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LANES == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    vf out = {0};
    for (int i = 0; i < LANES; i++) {
        uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
        uint32_t bits = rest << 13;
        float value;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;  // the exponents' biases differ by 112; subnormal numbers come out right
        if (rest >= 0x7c00) value = rest == 0x7c00 ? INFINITY : NAN;
        memcpy(&bits, &value, 4);
        bits |= sign;
        memcpy(&value, &bits, 4);
        out[i] = value;
    }
    return out;
#endif
}

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Rounded to the nearest, ties to even; not for NaN.
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void store_bf16(uint16_t *p, vf v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    UNROLL for (int i = 0; i < LANES; i++) p[i] = to_bf16(v[i]);
#endif
}

// e**x within 2 units of the last place for x <= 0; 0 below -87.
INLINE vf exp_of(vf x) {
    vf clamped = maximum(x, splat(-87.0f));
    vf scaled = clamped * 1.44269504f;
    vi whole = __builtin_convertvector(scaled - 0.5f, vi);  // cut off towards zero: rounds for x <= 0
    vf n = to_float(whole);
    vf r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf power = (vf)((whole + 127) << 23);
    return choose(x > -87.0f, p * power, (vf){0});
}

INLINE vf silu(vf x) {
    // sigmoid of -|x| keeps the exponent at or below zero
    vi negative = x < 0.0f;
    vf e = exp_of(choose(negative, x, -x));
    vf sigmoid = choose(negative, e, splat(1.0f)) / (e + 1.0f);
    return x * sigmoid;
}
