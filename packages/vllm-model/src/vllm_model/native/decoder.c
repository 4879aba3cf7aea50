// A step of a decoder on the CPU: embedding, layers, last norm; and logits. Called through ctypes by native/__init__.py, which
// holds the same structures. All numbers between products are floats; only what products and the cache take is rounded.
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "attention.h"
#include "sampling.h"

#if HAVE_TILES && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    const float *input_norm;
    const Product *qkv;  // one after the other in a token's queries, keys and values
    int32_t num_qkv;
    const float *q_norm, *k_norm;  // or NULL
    Product o;
    const float *post_norm;
    Product gate, up, down;
    char *cache;  // [blocks, kv_heads, keys or values, block_size * head_dim]
} Layer;

typedef struct {
    int32_t dot;  // inputs of products and the cache are bfloat16, else floats
    int32_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, block_size, panel_tokens;
    float eps;
    Product embedding, lm_head;
    const float *norm;
    const float *cos, *sin;  // [positions, head_dim / 2]
    const Layer *layers;
} Decoder;

typedef struct {
    int32_t num_tokens, num_rows, num_wanted;
    const int32_t *token_ids;    // [num_tokens]
    const int32_t *query_start;  // [num_rows + 1]
    const int32_t *num_computed; // [num_rows]
    const int32_t *slots;        // [num_rows]
    const int32_t *tables;       // [slots, table_stride]
    int64_t table_stride;
    const int64_t *wanted;       // [num_wanted], the tokens whose hidden states are wanted; NULL: all
    float *hidden;               // [num_wanted, hidden]
} Step;

// What lives through a step.
typedef struct {
    const Decoder *decoder;
    const Step *step;
    const Layer *layer;
    const float *norm_weight;
    int rows;  // of `residual` that are still wanted
    long ld_x, ld_qkv, ld_wide;
    float *residual, *qkv;
    void *x, *q, *attended, *wide;
    char *room;  // of products
    int32_t *positions, *row_of;
    Item *items;
    int num_items, num_split;
    Attention attention;
} Work;

// Memory of the largest step so far, kept for the next; under step_lock.
static char *arena;
static size_t arena_size;

INLINE long padded(long n) { return (n + 15) / 16 * 16; }

static float embedding_value(const Product *w, const char *panel, int lane, long k) {
    if (w->type == F32) return ((const float *)panel)[k * PANEL + lane];
    if (w->type == BF16) return from_bf16(((const uint16_t *)panel)[k / 2 * 32 + lane * 2 + k % 2]);
    const int lines = w->type == INT4 ? 4 : 8, each = GROUP / lines;
    const char *group = panel + k / GROUP * (w->type == INT4 ? INT4_BYTES : INT8_BYTES);
    uint32_t word = ((const uint32_t *)(group + k % GROUP / each * 64))[lane];
    const uint16_t *scales = (const uint16_t *)(group + lines * 64);
    uint16_t half[LANES] = {scales[lane]}, low[LANES] = {w->type == INT4 ? scales[PANEL + lane] : 0};
    int i = k % each;
    float q = w->type == INT4 ? (float)(word >> (i / 2 * 4 + i % 2 * 16) & 15) : (float)((int32_t)(word << (24 - 8 * i)) >> 24);
    return q * load_half(half)[0] + load_half(low)[0];
}

static void embed_phase(void *args, int chunk) {
    const Work *work = args;
    const Decoder *d = work->decoder;
    int end = chunk * 16 + 16 < work->step->num_tokens ? chunk * 16 + 16 : work->step->num_tokens;
    for (int m = chunk * 16; m < end; m++) {
        int token = work->step->token_ids[m];
        const char *panel = panel_at(&d->embedding, token / PANEL);
        for (long k = 0; k < d->hidden; k++)
            work->residual[(long)m * d->hidden + k] = embedding_value(&d->embedding, panel, token % PANEL, k);
    }
}

// x / rms(x) * weight
static void rms_norm(const float *x, const float *weight, long n, float eps, float *out) {
    float squares = 0;
    long i = 0;
    vf sum = {0};
    for (; i + LANES <= n; i += LANES) sum += load(x + i) * load(x + i);
    for (; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf((squares + sum_of(sum)) / n + eps);
    for (long k = 0; k < n; k++) out[k] = x[k] * scale * weight[k];
}

static void to_inputs(const float *x, long n, int dot, void *out, long at) {
    if (!dot) {
        memcpy((float *)out + at, x, n * 4);
        return;
    }
    uint16_t *to = (uint16_t *)out + at;
    long i = 0;
    for (; i + LANES <= n; i += LANES) store_bf16(to + i, load(x + i));
    for (; i < n; i++) to[i] = to_bf16(x[i]);
}

#define NORM_ROWS 16
static void norm_phase(void *args, int chunk) {
    const Work *work = args;
    const Decoder *d = work->decoder;
    float normed[d->hidden];
    int end = chunk * NORM_ROWS + NORM_ROWS < work->rows ? chunk * NORM_ROWS + NORM_ROWS : work->rows;
    for (int m = chunk * NORM_ROWS; m < end; m++) {
        rms_norm(work->residual + (long)m * d->hidden, work->norm_weight, d->hidden, d->eps, normed);
        to_inputs(normed, d->hidden, d->dot, work->x, m * work->ld_x);
    }
}

static void norm(Work *work, const float *weight) {
    work->norm_weight = weight;
    run_phase("norm", norm_phase, work, (work->rows + NORM_ROWS - 1) / NORM_ROWS);
}

static void rotate(const float *x, const float *cos, const float *sin, int dim, float scale, float *out) {
    for (int i = 0; i < dim / 2; i++) {
        float a = x[i], b = x[i + dim / 2];
        out[i] = (a * cos[i] - b * sin[i]) * scale;
        out[i + dim / 2] = (b * cos[i] + a * sin[i]) * scale;
    }
}

// Rotated queries, and keys and values into the cache.
#define ROTARY_TOKENS 8
static void rotary_phase(void *args, int chunk) {
    const Work *work = args;
    const Decoder *d = work->decoder;
    const Layer *layer = work->layer;
    const int dim = d->head_dim;
    const float scale = 1.0f / sqrtf(dim);
    float normed[MOST_HEAD_DIM], turned[MOST_HEAD_DIM];
    int tokens = work->step->num_tokens;
    int end = (chunk + 1) * ROTARY_TOKENS < tokens ? (chunk + 1) * ROTARY_TOKENS : tokens;
    for (int m = chunk * ROTARY_TOKENS; m < end; m++) {
        const int position = work->positions[m], slot = work->step->slots[work->row_of[m]];
        const float *cos = d->cos + (long)position * (dim / 2), *sin = d->sin + (long)position * (dim / 2);
        const float *qkv = work->qkv + m * work->ld_qkv;
        for (int h = 0; h < d->heads + d->kv_heads; h++) {
            const float *x = qkv + h * dim, *weight = h < d->heads ? layer->q_norm : layer->k_norm;
            if (weight) {
                rms_norm(x, weight, dim, d->eps, normed);
                x = normed;
            }
            rotate(x, cos, sin, dim, h < d->heads ? scale : 1.0f, turned);
            if (h < d->heads) {
                to_inputs(turned, dim, d->dot, work->q, ((long)m * d->heads + h) * dim);
            } else {
                int head = h - d->heads;
                write_key_value(&work->attention, slot, head, position, turned, qkv + (d->heads + d->kv_heads + head) * dim);
            }
        }
    }
}

static void attend_phase(void *args, int chunk) {
    const Work *work = args;
    attend(&work->attention, &work->items[chunk]);
}

static void join_phase(void *args, int chunk) {
    const Work *work = args;
    const Item *item = work->items;
    for (int before = 0;; item++)  // to the chunk-th item that begins a split
        if (item->partial >= 0 && item->start == 0 && before++ == chunk) break;
    join_partials(&work->attention, item);
}

// What each item attends to; the same for every layer. Counts only, if `items` is NULL.
static int make_items(const Decoder *d, const Step *step, int span, Item *items, int *num_split, int *num_partials) {
    const int group = d->heads / d->kv_heads;
    const int most = QUERY_ROWS / group > 0 ? QUERY_ROWS / group : 1;
    int n = 0;
    *num_split = *num_partials = 0;
    for (int row = 0; row < step->num_rows; row++)
        for (int t = step->query_start[row]; t < step->query_start[row + 1]; t += most) {
            int left = step->query_start[row + 1] - t, count = left < most ? left : most;
            int end = step->num_computed[row] + t - step->query_start[row] + count;
            int parts = (end + span - 1) / span;
            for (int head = 0; head < d->kv_heads; head++) {
                for (int i = 0; i < parts; i++, n++)
                    if (items)
                        items[n] = (Item){step->slots[row], t, count, head, i * span, i + 1 < parts ? (i + 1) * span : end,
                                          parts > 1 ? *num_partials + i : -1, parts};
                if (parts > 1) *num_partials += parts, ++*num_split;
            }
        }
    return n;
}

// Keys of an item: all, or fewer if there would be too few items for the threads.
static int span_of(const Decoder *d, const Step *step) {
    int split, partials, whole = make_items(d, step, INT32_MAX / 2, NULL, &split, &partials), longest = 0;
    for (int row = 0; row < step->num_rows; row++) {
        int length = step->num_computed[row] + step->query_start[row + 1] - step->query_start[row];
        if (length > longest) longest = length;
    }
    if (whole >= 8 * (num_workers + 1) || num_workers == 0) return INT32_MAX / 2;
    int parts = (8 * (num_workers + 1) + whole - 1) / whole;
    int span = (longest / parts + KEYS_AT_ONCE) / KEYS_AT_ONCE * KEYS_AT_ONCE;
    return span < 256 ? 256 : span;
}

static void *take(char *base, size_t *used, size_t bytes) {
    void *here = base ? base + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return here;
}

// Put everything into the memory at `base`; returns how much it takes, which is all that comes out if `base` is NULL.
static size_t lay_out(Work *work, char *base, int num_partials) {
    const Decoder *d = work->decoder;
    const long rows = padded(work->step->num_tokens), width = d->dot ? 2 : 4, all = (long)d->heads * d->head_dim;
    long most = d->hidden > d->intermediate ? d->hidden : d->intermediate;
    if (all > most) most = all;
    work->ld_x = padded(d->hidden);
    work->ld_qkv = all + 2L * d->kv_heads * d->head_dim;
    work->ld_wide = padded(d->intermediate);
    size_t used = 0;
    work->residual = take(base, &used, rows * padded(d->hidden) * 4);
    work->x = take(base, &used, rows * work->ld_x * width);
    work->qkv = take(base, &used, rows * work->ld_qkv * 4);
    work->q = take(base, &used, rows * all * width);
    work->attended = take(base, &used, rows * all * width);
    work->wide = take(base, &used, rows * work->ld_wide * width);
    work->room = take(base, &used, room_bytes(most));
    work->positions = take(base, &used, rows * 4);
    work->row_of = take(base, &used, rows * 4);
    work->items = take(base, &used, (size_t)(work->num_items + 1) * sizeof(Item));
    work->attention.partial = take(base, &used, (size_t)num_partials * MOST_QUERY_ROWS * (d->head_dim + 2) * 4);
    return used;
}

static int reserve(size_t bytes) {
    if (bytes <= arena_size) return 0;
    free(arena);
    arena_size = 0;
    if (posix_memalign((void **)&arena, 64, bytes)) {
        arena = NULL;
        return -1;
    }
    arena_size = bytes;
    return 0;
}

static void run_layer(Work *work, int last) {
    const Decoder *d = work->decoder;
    const Step *step = work->step;
    const Layer *layer = work->layer;
    const int dot = d->dot, tokens = step->num_tokens;
    const long all = (long)d->heads * d->head_dim, width = dot ? 2 : 4;
    norm(work, layer->input_norm);
    for (long i = 0, at = 0; i < layer->num_qkv; at += layer->qkv[i++].n)
        multiply((Run){.name = "qkv", .w = &layer->qkv[i], .x = work->x, .ldx = work->ld_x, .rows = tokens, .dot = dot, .y = work->qkv + at,
                       .ldy = work->ld_qkv}, work->room);
    work->attention.cache = layer->cache;
    run_phase("rotary", rotary_phase, work, (tokens + ROTARY_TOKENS - 1) / ROTARY_TOKENS);
    run_phase("attend", attend_phase, work, work->num_items);
    if (work->num_split) run_phase("join", join_phase, work, work->num_split);
    if (last && step->wanted) {
        // Past the last attention only the wanted tokens matter; they are in order, so rows move down.
        for (int i = 0; i < step->num_wanted; i++) {
            memmove((char *)work->attended + i * all * width, (char *)work->attended + step->wanted[i] * all * width, all * width);
            memmove(work->residual + (long)i * d->hidden, work->residual + step->wanted[i] * d->hidden, d->hidden * 4);
        }
        work->rows = step->num_wanted;
        if (!work->rows) return;  // a chunk of a prompt: keys and values were all
    }
    multiply((Run){.name = "o", .w = &layer->o, .x = work->attended, .ldx = all, .rows = work->rows, .dot = dot, .add = 1, .y = work->residual,
                   .ldy = d->hidden}, work->room);
    norm(work, layer->post_norm);
    multiply((Run){.name = "gate_up", .w = &layer->up, .gate = &layer->gate, .x = work->x, .ldx = work->ld_x, .rows = work->rows, .dot = dot,
                   .y = work->wide, .ldy = work->ld_wide}, work->room);
    multiply((Run){.name = "down", .w = &layer->down, .x = work->wide, .ldx = work->ld_wide, .rows = work->rows, .dot = dot, .add = 1,
                   .y = work->residual, .ldy = d->hidden}, work->room);
}

// Run a step's tokens; 0, or -1 if there is no memory for it, and then nothing has changed.
int decoder_hidden(const Decoder *decoder, const Step *step) {
    Work work = {.decoder = decoder, .step = step, .rows = step->num_tokens};
    pthread_mutex_lock(&step_lock);
    int partials, span = span_of(decoder, step);
    work.num_items = make_items(decoder, step, span, NULL, &work.num_split, &partials);
    if (reserve(lay_out(&work, NULL, partials))) {
        pthread_mutex_unlock(&step_lock);
        return -1;
    }
    lay_out(&work, arena, partials);
    make_items(decoder, step, span, work.items, &work.num_split, &partials);
    for (int row = 0; row < step->num_rows; row++)
        for (int t = step->query_start[row]; t < step->query_start[row + 1]; t++) {
            work.positions[t] = step->num_computed[row] + t - step->query_start[row];
            work.row_of[t] = row;
        }
    work.attention = (Attention){.dot = decoder->dot, .heads = decoder->heads, .kv_heads = decoder->kv_heads,
                                 .head_dim = decoder->head_dim, .block_size = decoder->block_size,
                                 .panel_tokens = decoder->panel_tokens, .tables = step->tables,
                                 .table_stride = step->table_stride, .q = work.q, .out = work.attended,
                                 .positions = work.positions, .partial = work.attention.partial};
    run_phase("embed", embed_phase, &work, (step->num_tokens + 15) / 16);
    for (int i = 0; i < decoder->num_layers; i++) {
        work.layer = &decoder->layers[i];
        run_layer(&work, i == decoder->num_layers - 1);
    }
    for (int i = 0; i < work.rows; i++)
        rms_norm(work.residual + (long)i * decoder->hidden, decoder->norm, decoder->hidden, decoder->eps,
                 step->hidden + (long)i * decoder->hidden);
    pthread_mutex_unlock(&step_lock);
    return 0;
}

// Floats [rows, k] times a product's weights: floats [rows, n rounded up to 16]; 0 or -1 as above.
int product(const Product *w, int dot, const float *x, int rows, float *out) {
    if (!rows) return 0;
    long ld = padded(w->k), width = dot ? 2 : 4;
    size_t inputs = padded(rows) * ld * width;
    pthread_mutex_lock(&step_lock);
    if (reserve(inputs + room_bytes(w->k))) {
        pthread_mutex_unlock(&step_lock);
        return -1;
    }
    for (int i = 0; i < rows; i++) to_inputs(x + (long)i * w->k, w->k, dot, arena, i * ld);
    multiply((Run){.name = "head", .w = w, .x = arena, .ldx = ld, .rows = rows, .dot = dot, .y = out, .ldy = padded(w->n)},
             arena + inputs);
    pthread_mutex_unlock(&step_lock);
    return 0;
}

// Give back what steps kept; with glibc to the machine.
void release(void) {
    pthread_mutex_lock(&step_lock);
    free(arena);
    arena = NULL;
    arena_size = 0;
    pthread_mutex_unlock(&step_lock);
#ifdef __GLIBC__
    malloc_trim(0);  // else it stays in the heap, if it lay between others
#endif
}

// 0, or -1 if there is no memory for it.
int draw(const Draw *given) {
    Draw d = *given;
    pthread_mutex_lock(&step_lock);
    int failed = reserve((num_workers + 1) * 3L * d.vocab_size * sizeof(float));
    d.room = (float *)arena;
    if (!failed) run_phase("draw", draw_phase, &d, d.rows);
    pthread_mutex_unlock(&step_lock);
    return failed;
}

// --- packing ---

typedef struct {
    int32_t type, n, k;
    const void *weight;      // [n, k]: floats, bfloat16, bytes, or four bits two a byte, the even k in the lower half
    const uint16_t *scales;  // half precision [n, k / GROUP]
    const uint16_t *minimums;
    char *out;
} Packing;

static void pack_phase(void *args, int panel) {
    const Packing *p = args;
    char *out = p->out + panel * panel_bytes(p->type, p->k);
    const long k = p->k;
    for (int lane = 0; lane < PANEL; lane++) {
        long n = (long)panel * PANEL + lane;
        int there = n < p->n;
        if (p->type == F32) {
            const float *row = (const float *)p->weight + n * k;
            for (long i = 0; i < k; i++) ((float *)out)[i * PANEL + lane] = there ? row[i] : 0;
        } else if (p->type == BF16) {
            const uint16_t *row = (const uint16_t *)p->weight + n * k;
            for (long i = 0; i < k; i++) ((uint16_t *)out)[i / 2 * 32 + lane * 2 + i % 2] = there ? row[i] : 0;
        } else {
            const int lines = p->type == INT4 ? 4 : 8;
            const uint8_t *row = (const uint8_t *)p->weight + (p->type == INT4 ? n * k / 2 : n * k);
            for (long g = 0; g < k / GROUP; g++) {
                char *group = out + g * (p->type == INT4 ? INT4_BYTES : INT8_BYTES);
                for (int line = 0; line < lines; line++) {
                    uint32_t bytes = 0, word = 0;
                    if (there) memcpy(&bytes, row + (g * lines + line) * 4, 4);
                    if (p->type == INT8) word = bytes;
                    else
                        for (int i = 0; i < 4; i++) word |= (bytes >> 8 * i & 15) << 4 * i | (bytes >> (8 * i + 4) & 15) << (16 + 4 * i);
                    ((uint32_t *)(group + line * 64))[lane] = word;
                }
                uint16_t *scales = (uint16_t *)(group + lines * 64);
                scales[lane] = there ? p->scales[n * (k / GROUP) + g] : 0;
                if (p->type == INT4) scales[PANEL + lane] = there ? p->minimums[n * (k / GROUP) + g] : 0;
            }
        }
    }
}

void pack(const Packing *packing) {
    pthread_mutex_lock(&step_lock);
    run_phase("pack", pack_phase, (void *)packing, (packing->n + PANEL - 1) / PANEL);
    pthread_mutex_unlock(&step_lock);
}

int64_t packed_bytes(int type, int64_t n, int64_t k) { return (n + PANEL - 1) / PANEL * panel_bytes(type, k); }

// --- set-up ---

int has_dot(void) { return HAVE_DOT; }

#ifndef SOURCES
#define SOURCES ""
#endif
// What build.py says the sources were.
const char *sources(void) { return SOURCES; }

// Threads from now on, the caller of a step among them; 0, or -1 if the matrix unit is not ours to use.
int set_threads(int num_threads) {
#if HAVE_TILES && defined(__linux__)
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return -1;  // ARCH_REQ_XCOMP_PERM for the tiles' data
#endif
    pthread_mutex_lock(&step_lock);
    change_threads(num_threads);
    pthread_mutex_unlock(&step_lock);
    return 0;
}
