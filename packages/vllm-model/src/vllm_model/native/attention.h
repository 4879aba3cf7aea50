// Attention over the paged cache. A block of one head holds its keys, then its values, each as panels of sixteen tokens:
// keys as a product's weights with the tokens as outputs, values as weights with the tokens as inputs and head_dim outputs.
// A block size that is no multiple of sixteen leaves lanes empty: a panel then holds their greatest common divisor.
#pragma once
#include "products.h"

#define KEYS_AT_ONCE 64  // four panels
#define QUERY_ROWS 32  // (token, head) pairs of an item; more only if one token's group is larger
#define MOST_QUERY_ROWS 64
#define MOST_HEAD_DIM 256

typedef struct {
    int32_t dot, heads, kv_heads, head_dim, block_size;
    int32_t panel_tokens;       // in a panel of a block
    const char *cache;          // of the layer
    const int32_t *tables;      // [slots, table_stride]
    long table_stride;
    const void *q;              // [tokens, heads * head_dim], scaled, in the inputs' type
    void *out;                  // likewise
    const int32_t *positions;   // [tokens]
    float *partial;             // [partials, rows, head_dim + 2]: sums, greatest score, sum of weights
} Attention;

// Some tokens of one row, one head of keys, a range of keys.
typedef struct {
    int32_t slot, token, count, head, start, end, partial, num_partials;  // partial -1: the only one
} Item;

INLINE int element_bytes(int dot) { return dot ? 2 : 4; }

INLINE long head_bytes(const Attention *a) { return (long)a->block_size / a->panel_tokens * PANEL * a->head_dim * element_bytes(a->dot); }

// The panel that holds a key.
INLINE const char *keys_of(const Attention *a, int slot, int head, int key) {
    long block = a->tables[slot * a->table_stride + key / a->block_size];
    long panel = key % a->block_size / a->panel_tokens;
    return a->cache + ((block * a->kv_heads + head) * 2) * head_bytes(a) + panel * PANEL * a->head_dim * element_bytes(a->dot);
}

static void write_key_value(const Attention *a, int slot, int head, int position, const float *key, const float *value) {
    char *keys = (char *)keys_of(a, slot, head, position), *values = keys + head_bytes(a);
    int lane = position % a->block_size % a->panel_tokens;
    if (a->dot) {
        uint16_t *k = (uint16_t *)keys + lane * 2, *v = (uint16_t *)values + lane / 2 * 32 + lane % 2;
        for (int d = 0; d < a->head_dim; d++) k[d / 2 * 32 + d % 2] = to_bf16(key[d]);
        for (int d = 0; d < a->head_dim; d++) v[d / PANEL * 256 + d % PANEL * 2] = to_bf16(value[d]);
    } else {
        float *k = (float *)keys + lane, *v = (float *)values + lane * PANEL;
        for (int d = 0; d < a->head_dim; d++) k[d * PANEL] = key[d];
        for (int d = 0; d < a->head_dim; d++) v[d / PANEL * 256 + d % PANEL] = value[d];
    }
}

static void weigh_values(int rows, int panels, int dot, const Block *b) {
#if HAVE_DOT
    if (dot) {
        dot_bf16_add(rows, panels, b);
        return;
    }
#endif
    (void)dot;
    float_f32_add(rows, panels, b);
}

static void attend(const Attention *a, const Item *item) {
    const int dot = a->dot, dim = a->head_dim, group = a->heads / a->kv_heads, rows = item->count * group;
    const int width = element_bytes(dot);
    float q_room[MOST_QUERY_ROWS * MOST_HEAD_DIM] __attribute__((aligned(64)));  // floats or bfloat16, as the weights
    float weights_room[MOST_QUERY_ROWS * KEYS_AT_ONCE] __attribute__((aligned(64)));
    char *q = (char *)q_room, *weights = (char *)weights_room;
    float scores[MOST_QUERY_ROWS * KEYS_AT_ONCE] __attribute__((aligned(64)));
    float sums[MOST_QUERY_ROWS * MOST_HEAD_DIM] __attribute__((aligned(64)));
    float most[MOST_QUERY_ROWS], total[MOST_QUERY_ROWS];
    int32_t limit[MOST_QUERY_ROWS];  // the last key that a row sees

    for (int r = 0; r < rows; r++) {
        long token = item->token + r / group;
        memcpy(q + r * dim * width, (const char *)a->q + ((token * a->heads + item->head * group + r % group) * dim) * width,
               dim * width);
        most[r] = -INFINITY;
        total[r] = 0;
        limit[r] = a->positions[token];
    }
    memset(sums, 0, (size_t)rows * dim * 4);

    const int each = a->panel_tokens;
    for (int start = item->start; start < item->end; start += 4 * each) {
        int panels = item->end - start < 4 * each ? (item->end - start + each - 1) / each : 4;
        const char *at[4];
        for (int p = 0; p < panels; p++) at[p] = keys_of(a, item->slot, item->head, start + p * each);
        for (int r = 0; r < rows; r += MAX_ROWS) {
            int some = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
            for (int p = 0, step; p < panels; p += step) {
                step = panels_at_once(some, F32);
                while (step > panels - p) step /= 2;
                Block b = {.k = dim, .x = q + r * dim * width, .ldx = dim, .out = scores + r * KEYS_AT_ONCE + p * PANEL, .ldo = KEYS_AT_ONCE};
                for (int i = 0; i < step; i++) b.panel[i] = at[p + i];
                multiply_block(some, step, dot ? BF16 : F32, dot, &b);
            }
        }
        for (int r = 0; r < rows; r++) {
            float *score = scores + r * KEYS_AT_ONCE;
            for (int p = 0; p < panels; p++) {
                int seen = limit[r] + 1 - start - p * each;
                for (int i = seen < 0 ? 0 : seen < each ? seen : each; i < PANEL; i++) score[p * PANEL + i] = -INFINITY;
            }
            vf high = load(score);
            for (int i = LANES; i < panels * PANEL; i += LANES) high = maximum(high, load(score + i));
            float highest = max_of(high);
            if (highest > most[r]) {
                float shrink = most[r] == -INFINITY ? 0.0f : expf(most[r] - highest);
                for (int d = 0; d < dim; d += LANES) store(sums + r * dim + d, load(sums + r * dim + d) * shrink);
                total[r] *= shrink;
                most[r] = highest;
            }
            float base = most[r] == -INFINITY ? 0.0f : most[r];
            vf sum = {0};
            for (int i = 0; i < panels * PANEL; i += LANES) {
                vf weight = exp_of(load(score + i) - base);
                sum += weight;
                if (dot) store_bf16((uint16_t *)weights + r * KEYS_AT_ONCE + i, weight);
                else store((float *)weights + r * KEYS_AT_ONCE + i, weight);
            }
            total[r] += sum_of(sum);
        }
        for (int t = 0; t < panels; t++) {
            const char *values = at[t] + head_bytes(a);
            for (int r = 0; r < rows; r += MAX_ROWS) {
                int some = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
                for (int d = 0, step; d < dim / PANEL; d += step) {
                    step = panels_at_once(some, F32);
                    while (step > dim / PANEL - d) step /= 2;
                    Block b = {.k = PANEL, .x = weights + (r * KEYS_AT_ONCE + t * PANEL) * width, .ldx = KEYS_AT_ONCE,
                               .out = sums + r * dim + d * PANEL, .ldo = dim};
                    for (int i = 0; i < step; i++) b.panel[i] = values + (d + i) * PANEL * PANEL * width;
                    weigh_values(some, step, dot, &b);
                }
            }
        }
    }

    for (int r = 0; r < rows; r++) {
        if (item->partial >= 0) {
            float *to = a->partial + ((long)item->partial * MOST_QUERY_ROWS + r) * (dim + 2);
            memcpy(to, sums + r * dim, dim * 4);
            to[dim] = most[r];
            to[dim + 1] = total[r];
            continue;
        }
        long at = ((item->token + r / group) * (long)a->heads + item->head * group + r % group) * dim;
        float share = 1.0f / total[r];
        for (int d = 0; d < dim; d += LANES) {
            vf value = load(sums + r * dim + d) * share;
            if (dot) store_bf16((uint16_t *)a->out + at + d, value);
            else store((float *)a->out + at + d, value);
        }
    }
}

// Join the parts of an item whose keys were split; `first` is the first of them.
static void join_partials(const Attention *a, const Item *first) {
    const int dim = a->head_dim, group = a->heads / a->kv_heads;
    for (int r = 0; r < first->count * group; r++) {
        const float *part = a->partial + ((long)first->partial * MOST_QUERY_ROWS + r) * (dim + 2);
        const long next = (long)MOST_QUERY_ROWS * (dim + 2);
        float most = -INFINITY, total = 0, sums[MOST_HEAD_DIM] = {0};
        for (int i = 0; i < first->num_partials; i++) most = part[i * next + dim] > most ? part[i * next + dim] : most;
        for (int i = 0; i < first->num_partials; i++) {
            float shrink = expf(part[i * next + dim] - most);
            total += part[i * next + dim + 1] * shrink;
            for (int d = 0; d < dim; d++) sums[d] += part[i * next + d] * shrink;
        }
        long at = ((first->token + r / group) * (long)a->heads + first->head * group + r % group) * dim;
        for (int d = 0; d < dim; d += LANES) {
            vf value = load(sums + d) / total;
            if (a->dot) store_bf16((uint16_t *)a->out + at + d, value);
            else store((float *)a->out + at + d, value);
        }
    }
}
