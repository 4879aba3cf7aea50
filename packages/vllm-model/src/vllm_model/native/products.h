// y = x @ W.T for weights packed in panels of sixteen outputs.
//
// One panel, for inputs k in order, sixteen lanes a line, one lane an output:
//
//   F32    k lines of 16 floats
//   BF16   k / 2 lines of 16 pairs (k even, k odd)
//   INT4   for each group of 32 inputs: 4 lines of 16 words of 8 inputs, half words holding the even and the odd ones, four bits
//          each from the lowest; then 16 scales and 16 minimums in half precision
//   INT8   for each group of 32 inputs: 8 lines of 16 words of 4 inputs; then 16 scales in half precision
//
// Inputs are rows of floats, or of bfloat16 where the processor multiplies pairs of those ("dot"). A quantized group is summed
// in whole numbers times inputs first and scaled once, so nothing of the file's precision is lost; only products of many rows
// ("unpacked") multiply by weights rounded to the inputs' type.
#pragma once
#include "pool.h"
#include "vector.h"

enum { F32, BF16, INT4, INT8 };
#define GROUP 32
#define INT4_BYTES 320  // of a group in a panel
#define INT8_BYTES 544

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAVE_DOT 1
#else
#define HAVE_DOT 0
#endif
#if HAVE_DOT && defined(__AMX_BF16__)
#define HAVE_TILES 1
#else
#define HAVE_TILES 0
#endif

#if LANES == 16
#define MAX_ROWS 8  // of a block held in registers
#else
#define MAX_ROWS 4
#endif
#define FEW_ROWS 16        // up to here quantized panels are multiplied as they are
#define TILE_ROWS 3        // from here on the matrix unit is faster
#define ROWS_PER_CHUNK 128 // of large products, so that the inputs stay in the second-level cache

typedef struct {
    int32_t type, n, k;
    const void *data;
    const float *bias;  // [panels * 16] or NULL
} Product;

INLINE long panel_bytes(int type, long k) {
    return type == F32 ? k * 64 : type == BF16 ? k / 2 * 64 : k / GROUP * (type == INT4 ? INT4_BYTES : INT8_BYTES);
}
INLINE int num_panels(const Product *w) { return (w->n + PANEL - 1) / PANEL; }
INLINE const char *panel_at(const Product *w, long p) { return (const char *)w->data + p * panel_bytes(w->type, w->k); }

// --- blocks of rows times panels, sums in registers ---

typedef struct {
    const char *panel[4];
    long k;
    const void *x;     // [rows, ldx] floats or bfloat16
    long ldx;
    const float *sums; // [rows, ld_sums], of each group of inputs; for INT4
    long ld_sums;
    float *out;        // [rows, ldo]
    long ldo;
} Block;

INLINE vf nibble(vu word, int shift) { return to_float((vi)(word >> shift & 15)); }
INLINE vf byte_of(vu word, int which) { return to_float((vi)(word << (24 - 8 * which)) >> 24); }

// Floats times anything.
INLINE void float_block(const int rows, const int panels, const int type, const int add, const Block *b) {
    const float *x = b->x;
    vf acc[rows][panels][PARTS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < PARTS; v++)
                acc[r][p][v] = add ? load(b->out + r * b->ldo + p * PANEL + v * LANES) : (vf){0};
    if (type == F32 || type == BF16) {
        const int step = type == F32 ? 1 : 2;
        for (long k = 0; k < b->k; k += step)
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int v = 0; v < PARTS; v++) {
                    const char *line = b->panel[p] + k / step * 64 + v * LANES * 4;
                    if (type == F32) {
                        vf w = load((const float *)line);
                        UNROLL for (int r = 0; r < rows; r++) acc[r][p][v] += w * x[r * b->ldx + k];
                    } else {
                        vu pair = load_bits(line);
                        vf even = (vf)(pair << 16), odd = (vf)(pair & 0xffff0000u);
                        UNROLL for (int r = 0; r < rows; r++)
                            acc[r][p][v] += even * x[r * b->ldx + k] + odd * x[r * b->ldx + k + 1];
                    }
                }
    } else {
        const int bytes = type == INT4 ? INT4_BYTES : INT8_BYTES, lines = type == INT4 ? 4 : 8, each = GROUP / lines;
        for (long g = 0; g < b->k / GROUP; g++)
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int v = 0; v < PARTS; v++) {
                    const char *group = b->panel[p] + g * bytes;
                    vf part[rows];
                    UNROLL for (int r = 0; r < rows; r++) part[r] = (vf){0};
                    for (int line = 0; line < lines; line++) {
                        vu word = load_bits(group + line * 64 + v * LANES * 4);
                        const float *at = x + g * GROUP + line * each;
                        UNROLL for (int i = 0; i < each; i++) {
                            vf w = type == INT4 ? nibble(word, i / 2 * 4 + i % 2 * 16) : byte_of(word, i);
                            UNROLL for (int r = 0; r < rows; r++) part[r] += w * at[r * b->ldx + i];
                        }
                    }
                    const uint16_t *scales = (const uint16_t *)(group + lines * 64) + v * LANES;
                    vf scale = load_half(scales);
                    UNROLL for (int r = 0; r < rows; r++) acc[r][p][v] += scale * part[r];
                    if (type == INT4) {
                        vf minimum = load_half(scales + PANEL);
                        UNROLL for (int r = 0; r < rows; r++) acc[r][p][v] += minimum * b->sums[r * b->ld_sums + g];
                    }
                }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < PARTS; v++) store(b->out + r * b->ldo + p * PANEL + v * LANES, acc[r][p][v]);
}

#if HAVE_DOT
typedef __m512bh pairs;

INLINE pairs splat_pair(const uint16_t *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return (pairs)_mm512_set1_epi32(both);
}

// Whole numbers of one byte are exact in bfloat16: as floats they have nothing in their lower half.
INLINE pairs int8_pairs(__m512i word, const int which) {
    __m512i even = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24 - 16 * which), 24));
    __m512i odd = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 16 - 16 * which), 24));
    return (pairs)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}

// 0 to 15 in bfloat16, twice, so that only the lowest four bits of an index count.
static const uint16_t numbers[32] = {
    0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
    0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};

// The whole numbers of the pair of inputs `which` of a line.
INLINE pairs group_pairs(__m512i word, const int type, const int which, __m512i table) {
    return type == INT4 ? (pairs)_mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * which), table) : int8_pairs(word, which);
}

// Pairs of bfloat16 times anything.
INLINE void dot_block(const int rows, const int panels, const int type, const int add, const Block *b) {
    const uint16_t *x = b->x;
    __m512 acc[rows][panels];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            acc[r][p] = add ? _mm512_loadu_ps(b->out + r * b->ldo + p * PANEL) : _mm512_setzero_ps();
    if (type == BF16) {
        for (long k = 0; k < b->k; k += 2)
            UNROLL for (int p = 0; p < panels; p++) {
                pairs w = (pairs)_mm512_loadu_si512(b->panel[p] + k * 32);
                UNROLL for (int r = 0; r < rows; r++)
                    acc[r][p] = _mm512_dpbf16_ps(acc[r][p], w, splat_pair(x + r * b->ldx + k));
            }
    } else {
        const __m512i table = _mm512_loadu_si512(numbers);
        const int bytes = type == INT4 ? INT4_BYTES : INT8_BYTES, lines = type == INT4 ? 4 : 8, each = GROUP / lines;
        for (long g = 0; g < b->k / GROUP; g++) {
            __m512 part[rows][panels];
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++) part[r][p] = _mm512_setzero_ps();
            UNROLL for (int line = 0; line < lines; line++) {
                __m512i word[panels];
                UNROLL for (int p = 0; p < panels; p++) word[p] = _mm512_loadu_si512(b->panel[p] + g * bytes + line * 64);
                UNROLL for (int i = 0; i < each / 2; i++)
                    UNROLL for (int p = 0; p < panels; p++) {
                        pairs w = group_pairs(word[p], type, i, table);
                        UNROLL for (int r = 0; r < rows; r++)
                            part[r][p] = _mm512_dpbf16_ps(part[r][p], w, splat_pair(x + r * b->ldx + g * GROUP + line * each + 2 * i));
                    }
            }
            UNROLL for (int p = 0; p < panels; p++) {
                const uint16_t *scales = (const uint16_t *)(b->panel[p] + g * bytes + lines * 64);
                __m512 scale = (__m512)load_half(scales);
                UNROLL for (int r = 0; r < rows; r++) acc[r][p] = _mm512_fmadd_ps(scale, part[r][p], acc[r][p]);
                if (type == INT4) {
                    __m512 minimum = (__m512)load_half(scales + PANEL);
                    UNROLL for (int r = 0; r < rows; r++)
                        acc[r][p] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(b->sums[r * b->ld_sums + g]), acc[r][p]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) _mm512_storeu_ps(b->out + r * b->ldo + p * PANEL, acc[r][p]);
}
#endif

// Panels that are multiplied at once: enough sums under way to hide an addition's latency, no more than there are registers.
INLINE int panels_at_once(int rows, int type) {
#if LANES == 16
    return rows <= 2 ? 4 : rows <= 4 || type == BF16 || type == F32 ? 2 : 1;
#else
    (void)type;
    return rows == 1 && LANES == 8 ? 2 : 1;
#endif
}

#define ROWS_CASE(kind, rows, type, add)                                                 \
    case rows:                                                                           \
        if (panels == 1) kind##_block(rows, 1, type, add, b);                            \
        else if (panels == 2 && (rows <= 4 || type <= BF16)) kind##_block(rows, 2, type, add, b);          \
        else if (panels == 4 && rows <= 2) kind##_block(rows, 4, type, add, b);          \
        break;
#if LANES == 16
#define MORE_ROWS(kind, type, add) ROWS_CASE(kind, 5, type, add) ROWS_CASE(kind, 6, type, add) ROWS_CASE(kind, 7, type, add) ROWS_CASE(kind, 8, type, add)
#else
#define MORE_ROWS(kind, type, add)
#endif
#define BLOCK_FUNCTION(name, kind, type, add)                                            \
    static void name(int rows, int panels, const Block *b) {                             \
        switch (rows) {                                                                  \
            ROWS_CASE(kind, 1, type, add) ROWS_CASE(kind, 2, type, add)                  \
            ROWS_CASE(kind, 3, type, add) ROWS_CASE(kind, 4, type, add)                  \
            MORE_ROWS(kind, type, add)                                                   \
        }                                                                                \
    }
BLOCK_FUNCTION(float_f32, float, F32, 0)
BLOCK_FUNCTION(float_f32_add, float, F32, 1)
BLOCK_FUNCTION(float_bf16, float, BF16, 0)
BLOCK_FUNCTION(float_int4, float, INT4, 0)
BLOCK_FUNCTION(float_int8, float, INT8, 0)
#if HAVE_DOT
BLOCK_FUNCTION(dot_bf16, dot, BF16, 0)
BLOCK_FUNCTION(dot_bf16_add, dot, BF16, 1)
BLOCK_FUNCTION(dot_int4, dot, INT4, 0)
BLOCK_FUNCTION(dot_int8, dot, INT8, 0)
#endif

// At most MAX_ROWS rows times `panels` of 1, 2 or 4.
static void multiply_block(int rows, int panels, int type, int dot, const Block *b) {
#if HAVE_DOT
    if (dot) {
        if (type == BF16) dot_bf16(rows, panels, b);
        else if (type == INT4) dot_int4(rows, panels, b);
        else dot_int8(rows, panels, b);
        return;
    }
#endif
    (void)dot;
    if (type == F32) float_f32(rows, panels, b);
    else if (type == BF16) float_bf16(rows, panels, b);
    else if (type == INT4) float_int4(rows, panels, b);
    else float_int8(rows, panels, b);
}

// --- unpacking, for many rows ---

// The weights of line `i` (a pair of inputs with dot, else one) of an INT4 or INT8 group.
INLINE vf unpacked(const char *group, int type, int k, int v) {
    const int lines = type == INT4 ? 4 : 8, each = GROUP / lines;
    vu word = load_bits(group + k / each * 64 + v * LANES * 4);
    const uint16_t *scales = (const uint16_t *)(group + lines * 64) + v * LANES;
    int i = k % each;
    vf w = (type == INT4 ? nibble(word, i / 2 * 4 + i % 2 * 16) : byte_of(word, i)) * load_half(scales);
    return type == INT4 ? w + load_half(scales + PANEL) : w;
}

INLINE void unpack_as(const int type, const int dot, const char *panel, long k, char *out) {
    const int bytes = type == INT4 ? INT4_BYTES : INT8_BYTES;
    for (long g = 0; g < k / GROUP; g++)
        UNROLL for (int i = 0; i < GROUP; i += 2)
            UNROLL for (int v = 0; v < PARTS; v++) {
                vf even = unpacked(panel + g * bytes, type, i, v), odd = unpacked(panel + g * bytes, type, i + 1, v);
                if (!dot) {
                    store((float *)out + (g * GROUP + i) * PANEL + v * LANES, even);
                    store((float *)out + (g * GROUP + i + 1) * PANEL + v * LANES, odd);
                    continue;
                }
#if HAVE_DOT
                static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
                both = _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
                _mm512_storeu_si512(out + (g * GROUP + i) * PANEL * 2, both);
#endif
            }
}

static void unpack_bf16_floats(const char *panel, long k, float *out) {
    for (long i = 0; i < k; i += 2)
        UNROLL for (int v = 0; v < PARTS; v++) {
            vu pair = load_bits(panel + i / 2 * 64 + v * LANES * 4);
            store(out + i * PANEL + v * LANES, (vf)(pair << 16));
            store(out + (i + 1) * PANEL + v * LANES, (vf)(pair & 0xffff0000u));
        }
}

// A panel in the inputs' own type: itself, or unpacked into `room`.
static const char *as_inputs(const char *panel, int type, long k, int dot, char *room) {
    if (type == (dot ? BF16 : F32)) return panel;
    if (type == BF16) unpack_bf16_floats(panel, k, (float *)room);
    else if (type == INT4) dot ? unpack_as(INT4, 1, panel, k, room) : unpack_as(INT4, 0, panel, k, room);
    else dot ? unpack_as(INT8, 1, panel, k, room) : unpack_as(INT8, 0, panel, k, room);
    return room;
}

// --- the matrix unit ---

#if HAVE_TILES
// Tiles 0 to 5 have `rows` rows, tiles 6 and 7, for weights, 16.
static void tiles_begin(int rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = i < 6 ? rows : 16;
    _tile_loadconfig(&config);
}

// 32 rows times two panels (16 times two without `second`); out [32][32].
static void tiles(const uint16_t *x, long ldx, int second, const char *left, const char *right, long k, float *out) {
    const long stride = ldx * 2;
    const char *lower = (const char *)(x + 16 * ldx);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < k; i += 32) {
        _tile_loadd(4, x + i, stride);
        _tile_loadd(6, left + i * 32, 64);
        _tile_loadd(7, right + i * 32, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second) {
            _tile_loadd(5, lower + i * 2, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    if (second) {
        _tile_stored(2, out + 16 * 32, 128);
        _tile_stored(3, out + 16 * 32 + 16, 128);
    }
}

// 8 rows times two quantized panels, or 16 rows times one; out [rows][32]. A tile takes a group of inputs, so whole numbers are
// multiplied and each group is scaled afterwards, while the next one is unpacked and multiplied.
INLINE void group_tiles(const int rows, const int panels, const int type, const uint16_t *x, long ldx, const char *const *panel,
                        long k, const float *sums, float *out) {
    const int bytes = type == INT4 ? INT4_BYTES : INT8_BYTES, lines = type == INT4 ? 4 : 8, each = GROUP / lines;
    const long groups = k / GROUP;
    const __m512i table = _mm512_loadu_si512(numbers);
    char weights[2][2][1024] __attribute__((aligned(64)));
    float parts[2][2][16 * PANEL] __attribute__((aligned(64)));
    __m512 acc[rows][panels];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++) acc[r][p] = _mm512_setzero_ps();
    for (long g = 0; g <= groups; g++) {
        if (g < groups) {
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int line = 0; line < lines; line++) {
                    __m512i word = _mm512_loadu_si512(panel[p] + g * bytes + line * 64);
                    UNROLL for (int i = 0; i < each / 2; i++)
                        _mm512_store_si512(weights[g & 1][p] + (line * each / 2 + i) * 64, (__m512i)group_pairs(word, type, i, table));
                }
            _tile_loadd(4, x + g * GROUP, ldx * 2);
            _tile_zero(0);
            _tile_loadd(6, weights[g & 1][0], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_stored(0, parts[g & 1][0], 64);
            if (panels == 2) {
                _tile_zero(1);
                _tile_loadd(7, weights[g & 1][1], 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_stored(1, parts[g & 1][1], 64);
            }
        }
        if (g > 0)
            UNROLL for (int p = 0; p < panels; p++) {
                const long last = g - 1;
                const uint16_t *scales = (const uint16_t *)(panel[p] + last * bytes + lines * 64);
                __m512 scale = (__m512)load_half(scales);
                UNROLL for (int r = 0; r < rows; r++)
                    acc[r][p] = _mm512_fmadd_ps(scale, _mm512_load_ps(parts[last & 1][p] + r * PANEL), acc[r][p]);
                if (type == INT4) {
                    __m512 minimum = (__m512)load_half(scales + PANEL);
                    UNROLL for (int r = 0; r < rows; r++)
                        acc[r][p] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sums[r * groups + last]), acc[r][p]);
                }
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) _mm512_storeu_ps(out + r * 32 + p * PANEL, acc[r][p]);
}

// At most 16 rows times two quantized panels of one type; `wide`: the tiles have 16 rows, not 8.
static void quantized_tiles(int wide, int type, const uint16_t *x, long ldx, const char *const *panel, long k, const float *sums,
                            float *out) {
    if (type == INT4 && !wide) group_tiles(8, 2, INT4, x, ldx, panel, k, sums, out);
    else if (!wide) group_tiles(8, 2, INT8, x, ldx, panel, k, sums, out);
    else
        for (int p = 0; p < 2; p++)
            if (type == INT4) group_tiles(16, 1, INT4, x, ldx, panel + p, k, sums, out + p * PANEL);
            else group_tiles(16, 1, INT8, x, ldx, panel + p, k, sums, out + p * PANEL);
}
#endif

// --- whole products ---

typedef struct {
    const Product *w;
    const Product *gate;  // not NULL: the result is silu(x @ gate.T) * (x @ w.T), in the inputs' type
    const void *x;        // [rows rounded up to 16, ldx], floats or, with dot, bfloat16
    long ldx;
    const float *sums;    // [rows, k / GROUP], needed up to FEW_ROWS for INT4
    int rows, dot;
    int add;              // y += instead of y =
    void *y;              // [rows, ldy] floats; with gate as x
    long ldy;
    char *unpacked;       // [threads, UNPACKED, 64 * k] bytes
    int panels_per_chunk, rows_per_chunk, row_chunks;
    const char *name;     // for profiles
} Run;

INLINE void finish(const Run *run, const float *out, long ldo, int row, int rows, long panel, int panels, const float *gate) {
    const float *bias = run->w->bias;
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < PARTS; v++) {
                long n = (panel + p) * PANEL + v * LANES;
                vf value = load(out + r * ldo + p * PANEL + v * LANES);
                if (bias) value += load(bias + n);
                if (gate) {
                    vf g = load(gate + r * ldo + p * PANEL + v * LANES);
                    if (run->gate->bias) g += load(run->gate->bias + n);
                    value *= silu(g);
                    if (run->dot) store_bf16((uint16_t *)run->y + (row + r) * run->ldy + n, value);
                    else store((float *)run->y + (row + r) * run->ldy + n, value);
                    continue;
                }
                float *y = (float *)run->y + (row + r) * run->ldy + n;
                store(y, run->add ? load(y) + value : value);
            }
}

#define UNPACKED 4  // panels that a thread unpacks at once, at most as floats: two of each weight

INLINE size_t sums_bytes(long k) { return (FEW_ROWS * (k / GROUP) * 4 + 63) / 64 * 64; }

// Room that a product of `k` inputs or fewer needs beside inputs and outputs.
static size_t room_bytes(long k) { return sums_bytes(k) + (size_t)(num_workers + 1) * UNPACKED * k * 64; }

INLINE int on_tiles(const Run *run) { return HAVE_TILES && run->dot && run->rows >= TILE_ROWS && run->w->k % 32 == 0; }

// Whether it multiplies whole numbers there, and scales each group afterwards.
INLINE int tiles_are_exact(const Run *run) {
    const int type = run->w->type;
    return run->rows <= FEW_ROWS && (type == INT4 || type == INT8) && (!run->gate || run->gate->type == type);
}

static void product_chunk(void *args, int chunk) {
    const Run *run = args;
    const Product *w = run->w, *gate = run->gate;
    const int dot = run->dot, width = dot ? 2 : 4;
    const int first = chunk / run->row_chunks * run->panels_per_chunk;
    const int last = first + run->panels_per_chunk < num_panels(w) ? first + run->panels_per_chunk : num_panels(w);
    const int start = chunk % run->row_chunks * run->rows_per_chunk;
    const int end = start + run->rows_per_chunk < run->rows ? start + run->rows_per_chunk : run->rows;
    const char *x = run->x;
    float out[2][32 * 32] __attribute__((aligned(64)));
    const int many = run->rows > FEW_ROWS;
    const long room = w->k * 64L;
    char *space = run->unpacked + thread_number * UNPACKED * room;

#if HAVE_TILES
    if (on_tiles(run)) {
        const int kind = gate ? gate->type : w->type, exact = tiles_are_exact(run), wide = end - start > 8;
        tiles_begin(exact && !wide ? 8 : 16);
        for (int p = first; p < last; p += gate ? 1 : 2) {
            const int both = !gate && p + 1 < last;
            const char *pair[2] = {panel_at(gate ? gate : w, p), panel_at(w, p + both)};
            if (!exact)
                for (int i = 0; i < 2; i++) pair[i] = as_inputs(pair[i], i ? w->type : kind, w->k, 1, space + i * room);
            for (int row = start, rows; row < end; row += rows) {
                const int most = exact ? 16 : 32;
                rows = end - row < most ? end - row : most;
                const uint16_t *from = (const uint16_t *)x + row * run->ldx;
                if (exact) quantized_tiles(wide, kind, from, run->ldx, pair, w->k, run->sums + row * (w->k / GROUP), out[0]);
                else tiles(from, run->ldx, rows > 16, pair[0], pair[1], w->k, out[0]);
                if (gate) finish(run, out[0] + PANEL, 32, row, rows, p, 1, out[0]);
                else finish(run, out[0], 32, row, rows, p, 1 + both, NULL);
            }
        }
        _tile_release();
        return;
    }
#endif
    const int kind = gate && gate->type > w->type ? gate->type : w->type;  // the one that needs more registers
    for (int p = first, step; p < last; p += step) {
        int block = end - start < MAX_ROWS ? end - start : MAX_ROWS;
        step = panels_at_once(block, many ? F32 : kind);
        while (step > last - p || (many && step > UNPACKED / 2)) step /= 2;
        Block b[2] = {{.k = w->k, .out = out[0], .ldo = 64}, {.k = w->k, .out = out[1], .ldo = 64}};
        int type[2] = {w->type, gate ? gate->type : w->type};
        for (int i = 0; i < (gate ? 2 : 1); i++) {
            for (int q = 0; q < step; q++) {
                b[i].panel[q] = panel_at(i ? gate : w, p + q);
                if (many) b[i].panel[q] = as_inputs(b[i].panel[q], type[i], w->k, dot, space + (i * UNPACKED / 2 + q) * room);
            }
            if (many) type[i] = dot ? BF16 : F32;
        }
        for (int row = start; row < end; row += block) {
            int rows = end - row < block ? end - row : block;
            for (int i = 0; i < (gate ? 2 : 1); i++) {
                b[i].x = x + row * run->ldx * width;
                b[i].ldx = run->ldx;
                b[i].ld_sums = w->k / GROUP;
                b[i].sums = run->sums ? run->sums + row * b[i].ld_sums : NULL;
                multiply_block(rows, step, type[i], dot, &b[i]);
            }
            finish(run, out[0], 64, row, rows, p, step, gate ? out[1] : NULL);
        }
    }
}

// Sums of each group of inputs.
static void group_sums(const void *x, long ldx, int rows, long k, int dot, float *sums) {
    for (int r = 0; r < rows; r++)
        for (long g = 0; g < k / GROUP; g++) {
            vf sum = {0};
            if (dot) {
                const uint16_t *at = (const uint16_t *)x + r * ldx + g * GROUP;
                for (int i = 0; i < GROUP / 2; i += LANES) {  // pairs
                    vu pair = load_bits(at + 2 * i);
                    sum += (vf)(pair << 16) + (vf)(pair & 0xffff0000u);
                }
            } else {
                const float *at = (const float *)x + r * ldx + g * GROUP;
                for (int i = 0; i < GROUP; i += LANES) sum += load(at + i);
            }
            sums[r * (k / GROUP) + g] = sum_of(sum);
        }
}

static void multiply(Run run, char *room) {
    const Product *w = run.w;
    run.unpacked = room + sums_bytes(w->k);
    const int needed = on_tiles(&run) ? tiles_are_exact(&run) : run.rows <= FEW_ROWS;
    if (needed && (w->type == INT4 || (run.gate && run.gate->type == INT4))) {
        group_sums(run.x, run.ldx, run.rows, w->k, run.dot, (float *)room);
        run.sums = (float *)room;
    }
    run.rows_per_chunk = run.rows <= ROWS_PER_CHUNK ? run.rows : ROWS_PER_CHUNK;
    run.row_chunks = (run.rows + run.rows_per_chunk - 1) / run.rows_per_chunk;
    int panels = num_panels(w);
    // Some ten chunks a thread, of at least 4 panels.
    int per_chunk = panels / (10 * (num_workers + 1)) / 4 * 4;
    run.panels_per_chunk = per_chunk < 4 ? 4 : per_chunk > 64 ? 64 : per_chunk;
    run_phase(run.name, product_chunk, &run, (panels + run.panels_per_chunk - 1) / run.panels_per_chunk * run.row_chunks);
}
