// Decode attention on Hopper, one query token a row: every program is one warp that runs along its tiles of the plan alone.
//
// The host puts before this text: ELEMENT_IS_BF16, HEAD_DIM (64 or 128), GROUP (query heads of a KV head, at most 8), TILE
// (keys of a step, in pages of 16), STAGES, PROGRAMS, KV_HEADS, and RAW: heads are as the product left them.
//
// A page's keys and values of one head lie together: the copy engine brings them in one piece, some tiles ahead. Keys are the
// rows of the matrix unit's products and heads its eight columns: scores are keys x heads, values are dimensions x heads.

#define PAGE 16                            // keys
#define PAGES (TILE / PAGE)
#define STEPS (HEAD_DIM / 16)              // of the matrix unit along a head
#define PIECES (HEAD_DIM / 64)             // of 128 bytes, the width of the swizzle, of a key or a value
#define PAGE_BYTES (2 * PAGE * HEAD_DIM * 2)  // keys, then values
#define STAGE_BYTES (PAGES * PAGE_BYTES)
#define VALUES (4 * STEPS)                 // of a thread: dimensions g and g + 8 of 16, heads 2t and 2t + 1, for lane 4g + t
#define NOTHING -1.0e30f                   // finite: what saw nothing yet subtracts to 0, not NaN

__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ u32 transposed(u32 v) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

__device__ __forceinline__ float power_of_two(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// d [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The sum of a value of all lanes with the same t.
__device__ __forceinline__ float sum_of_column(float v) {
#pragma unroll
    for (int far = 4; far < 32; far *= 2) v += __shfl_xor_sync(~0u, v, far);
    return v;
}

__device__ __forceinline__ float max_of_column(float v) {
#pragma unroll
    for (int far = 4; far < 32; far *= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, far));
    return v;
}

// Of the four lanes that have one head.
__device__ __forceinline__ float sum_of_head(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// A pair's softmax: maximum and sum of heads 2t and 2t + 1, and the values weighted so far. Each lane sums up its own keys.
struct Pair {
    float highest[2], sum[2], values[VALUES];
};

#if RAW
// A head's dimensions 8 i + 2t and one more, normalised and rotated: a dimension's partner is half a head away, in the same thread.
__device__ __forceinline__ void finish_head(u32 (&head)[2 * STEPS], const float* cos_sin, const u16* weight, float eps) {
    const int t = threadIdx.x % 4;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) squares += low(head[i]) * low(head[i]) + high(head[i]) * high(head[i]);
    const float norm = weight ? rsqrtf(sum_of_head(squares) / HEAD_DIM + eps) : 1.f;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int d = 8 * i + 2 * t;
        const float2 cosine = *(const float2*)(cos_sin + d), sine = *(const float2*)(cos_sin + HEAD_DIM / 2 + d);
        float a0 = low(head[i]) * norm, a1 = high(head[i]) * norm, b0 = low(head[STEPS + i]) * norm, b1 = high(head[STEPS + i]) * norm;
        if (weight) {
            const u32 near = *(const u32*)(weight + d), far = *(const u32*)(weight + HEAD_DIM / 2 + d);
            a0 *= low(near), a1 *= high(near), b0 *= low(far), b1 *= high(far);
        }
        head[i] = pack(a0 * cosine.x - b0 * sine.x, a1 * cosine.y - b1 * sine.y);
        head[STEPS + i] = pack(b0 * cosine.x + a0 * sine.x, b1 * cosine.y + a1 * sine.y);
    }
}

// The newest key and value, which no tile has: the pair begins with them, and they go to the cache.
__device__ __forceinline__ void begin_with_newest(
    Pair& pair, const u32 (&query)[2 * STEPS], const u32 (&heads)[2 * STEPS], const u32 (&value)[2 * STEPS], u16* to, float scale) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float score = 0.f;  // of head g
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) {
        const u32 key = __shfl_sync(~0u, heads[i], 4 * GROUP + t), v = transposed(value[i]);  // from dimensions 2t to g
        score += low(query[i]) * low(key) + high(query[i]) * high(key);
        pair.values[2 * i] = low(v), pair.values[2 * i + 1] = high(v);
        if (g == 0) *(u32*)(to + 8 * i + 2 * t) = key;
        if (g == 1) *(u32*)(to + PAGE * HEAD_DIM + 8 * i + 2 * t) = value[i];
    }
    score = sum_of_head(score) * scale;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        pair.highest[j] = __shfl_sync(~0u, score, 4 * (2 * t + j));
        pair.sum[j] = g == 0 ? 1.f : 0.f;
    }
}
#endif

// The heads of a pair go out.
__device__ __forceinline__ void write_pair(const Pair& pair, u16* out) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float factor[2];
#pragma unroll
    for (int j = 0; j < 2; j++) factor[j] = pair.sum[j] > 0.f ? __fdividef(1.f, pair.sum[j]) : 1.f;
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) {  // from dimension g, heads 2t to head g, dimensions 2t
        const u32 v = transposed(pack(pair.values[2 * i] * factor[0], pair.values[2 * i + 1] * factor[1]));
        if (g < GROUP) *(u32*)(out + g * HEAD_DIM + 8 * i + 2 * t) = v;
    }
}

// Where the matrix unit's tiles begin in a page for this lane: 16 bytes of a row, a key or a value, swizzled by the row.
__device__ __forceinline__ u32 place_in_page(u32 row, u32 part, int step) {
    const u32 line = PIECES * row + step / 4;
    return line * 128 + ((((step % 4) * 2 + part) ^ (line % 8)) * 16);
}

// Scores of a page's keys g and g + 8, heads 2t and 2t + 1; those of what stands behind its last key are minus infinity.
__device__ __forceinline__ void score_page(float (&scores)[4], u32 page, int count, const u32 (&query)[2 * STEPS], float scale) {
    const u32 lane = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i++) scores[i] = 0.f;
    if (count > 0) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 a[4];
            load_matrices(a, page + place_in_page(lane % 16, lane / 16, step));  // keys 0-7, 8-15, then the next 8 dimensions
            multiply(scores, a, query[2 * step], query[2 * step + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool is_key = (int)lane / 4 + 8 * (i / 2) < count;
        scores[i] = is_key ? scores[i] * scale : __int_as_float(0xff800000);
    }
}

// Behind the last value stands anything, which no weight of 0 may multiply.
__device__ __forceinline__ void clear_behind(u32 page, int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < (PAGE - count) * (HEAD_DIM / 8); i += 32) {
        const u32 line = PAGE + count + i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8);
        const u32 to = page + (PIECES * line + piece / 8) * 128 + piece % 8 * 16;
        asm volatile("st.shared::cta.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
}

// What was added up so far, by a new maximum, if any head has one.
__device__ __forceinline__ void raise(Pair& pair, const float (&scores)[PAGES][4]) {
    float top[2] = {pair.highest[0], pair.highest[1]};
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
#pragma unroll
        for (int i = 0; i < 4; i++) top[i % 2] = fmaxf(top[i % 2], scores[page][i]);
    }
    if (!__any_sync(~0u, top[0] > pair.highest[0] || top[1] > pair.highest[1])) return;
    float shrink[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        top[j] = max_of_column(top[j]);
        shrink[j] = power_of_two(pair.highest[j] - top[j]);
        pair.sum[j] *= shrink[j];
        pair.highest[j] = top[j];
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) pair.values[i] *= shrink[i % 2];
}

// A page's values come to the sum.
__device__ __forceinline__ void add_page(Pair& pair, u32 page, const float (&scores)[4]) {
    const u32 lane = threadIdx.x;
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[i] = power_of_two(scores[i] - pair.highest[i % 2]);
        pair.sum[i % 2] += w[i];
    }
    const u32 b0 = transposed(pack(w[0], w[1])), b1 = transposed(pack(w[2], w[3]));
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[4];  // dimensions 0-7, 8-15, then the next 8 keys
        load_transposed(a, page + place_in_page(PAGE + (lane / 16) * 8 + lane % 8, lane / 8 % 2, step));
        multiply(pair.values + 4 * step, a, b0, b1);
    }
}

// Nothing was seen yet.
__device__ __forceinline__ void clear(Pair& pair) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) pair.values[i] = 0.f;
#pragma unroll
    for (int j = 0; j < 2; j++) pair.highest[j] = NOTHING, pair.sum[j] = 0.f;
}

// A part of a pair, for whoever comes last to it.
__device__ __forceinline__ void write_part(const Pair& pair, float* part, float* stat) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    float4* to = (float4*)part;
    if (2 * t < GROUP) {
#pragma unroll
        for (int i = 0; i < VALUES / 4; i++) {
            to[32 * i + lane] = float4{pair.values[4 * i], pair.values[4 * i + 1], pair.values[4 * i + 2], pair.values[4 * i + 3]};
        }
    }
    if (g == 0) *(float4*)(stat + 4 * t) = float4{pair.highest[0], pair.highest[1], pair.sum[0], pair.sum[1]};
}

// A part comes to a pair: past the first-level cache, since another multiprocessor wrote it during this launch.
__device__ __forceinline__ void add_part(Pair& pair, const float* part, const float* stat) {
    const int lane = threadIdx.x, t = lane % 4;
    const float4* values = (const float4*)part;
    const float4 both = __ldcg((const float4*)(stat + 4 * t));
    float4 v[VALUES / 4];
#pragma unroll
    for (int i = 0; i < VALUES / 4; i++) v[i] = 2 * t < GROUP ? __ldcg(values + 32 * i + lane) : float4{0.f, 0.f, 0.f, 0.f};
    const float theirs[2] = {both.x, both.y}, sums[2] = {both.z, both.w};
    float keep[2], add[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float top = fmaxf(pair.highest[j], theirs[j]);
        keep[j] = power_of_two(pair.highest[j] - top), add[j] = power_of_two(theirs[j] - top);
        pair.sum[j] = pair.sum[j] * keep[j] + sums[j] * add[j];
        pair.highest[j] = top;
    }
#pragma unroll
    for (int i = 0; i < VALUES / 4; i++) {
        const float four[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) pair.values[4 * i + j] = pair.values[4 * i + j] * keep[j % 2] + four[j] * add[j % 2];
    }
}

extern "C" __global__ void __launch_bounds__(32) warp_decode(
    const __grid_constant__ TensorMap cache_map,  // [blocks, KV_HEADS, 2 PAGE PIECES, 64]
    const u16* q,                                 // [rows, heads, HEAD_DIM]; RAW with key and value heads behind them
    u16* out,                                     // [rows, KV_HEADS GROUP, HEAD_DIM]
    u16* cache,                                   // RAW: [blocks, KV_HEADS, 2, PAGE, HEAD_DIM]
    const int* plan,                              // [PROGRAMS, 16]
    const int* starts,                            // [rows + 1]
    const int* entries,                           // [tiles, PAGES]
    float* parts,                                 // [PROGRAMS, 2, 32 VALUES or more]
    float* stats,                                 // [PROGRAMS, 2, 16 or more]: maximum and sum of the heads
    int* counts,                                  // [rows KV_HEADS]
    const int* newest,                            // RAW: [rows, 2]
    const float* cos_sin,                         // RAW: [max_len, HEAD_DIM]
    const u16* q_weight,                          // RAW: [HEAD_DIM] or null
    const u16* k_weight,
    long long block_stride, long long q_stride, long long out_stride, int part_size, int stat_size, float eps, float scale) {
    extern __shared__ unsigned char memory[];
    const u32 stages = (shared_address(memory) + 1023) & ~1023u, full = stages + STAGES * STAGE_BYTES;
    const u32 seen = full + 8 * STAGES;  // [STAGES]: keys of the tile's pages, a byte each
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, program = blockIdx.x;

    const int field = lane < 16 ? plan[program * 16 + lane] : 0;
    const auto planned = [&](int i) { return __shfl_sync(~0u, field, i); };
    const int begin = planned(0), end = planned(1), first_row = planned(2), first_head = planned(3), last_row = planned(5);
    const int last_head = planned(6), each = planned(7), total = planned(8);
    int row = first_row, head = first_head, tile = planned(4);

    u64 read_once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(read_once));

    // Tiles are asked for in their order, STAGES ahead of what is computed.
    int ask = begin, ask_head = first_head, ask_place = begin - first_head * each;
    const auto ask_for_tile = [&](const int (&entry)[PAGES]) {
        const u32 stage = (ask - begin) % STAGES, to = stages + stage * STAGE_BYTES, bar = full + 8 * stage;
        u32 keys = 0, bytes = 0;
#pragma unroll
        for (int i = 0; i < PAGES; i++) {
            keys |= (entry[i] & 255) << (8 * i);
            bytes += (entry[i] & 255) ? PAGE_BYTES : 0;
        }
        if (lane == 0) {
            asm volatile("st.shared::cta.u32 [%0], %1;" ::"r"(seen + 4 * stage), "r"(keys) : "memory");
            barrier_expect(bar, bytes);
#pragma unroll
            for (int i = 0; i < PAGES; i++) {
                if (entry[i] & 255) {
                    asm volatile(
                        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %3, %4, %5}], [%2], %6;"
                        ::"r"(to + i * PAGE_BYTES), "l"(&cache_map), "r"(bar), "r"(0), "r"(ask_head), "r"(entry[i] >> 8), "l"(read_once) : "memory");
                }
            }
        }
        ask++;
        if (++ask_place == each) ask_place = 0, ask_head++;
    };
    const auto read_entry = [&](int (&entry)[PAGES], int place) {
#pragma unroll
        for (int i = 0; i < PAGES; i++) entry[i] = entries[place * PAGES + i];
    };
    int next_entry[PAGES], first_entries[PAGES];  // of the tile to be asked for next; a lane's of the first tiles
    if (begin + lane < min(begin + STAGES, end)) read_entry(first_entries, (begin + lane) % each);
    if (begin + STAGES < end) read_entry(next_entry, (begin + STAGES) % each);
    if (lane == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1);
        barriers_are_initialised();
        prefetch_map(&cache_map);
    }
    __syncwarp();
    if (!RAW) wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < min(STAGES, end - begin); i++) {
        int entry[PAGES];
#pragma unroll
        for (int j = 0; j < PAGES; j++) entry[j] = __shfl_sync(~0u, first_entries[j], i);
        ask_for_tile(entry);
    }

    // What a pair begins with is asked for while the one before it runs.
    int tiles, where, position;
    u32 coming[2 * STEPS], coming_value[2 * STEPS];
    const auto fetch_place = [&](int row) {
        tiles = starts[row + 1] - starts[row];
        if (RAW) where = newest[2 * row], position = newest[2 * row + 1];
    };
    const auto fetch_heads = [&](int row, int head) {
        const u16* heads = q + row * q_stride + 2 * t;
        const u16* mine = heads + (g < GROUP ? head * GROUP + g : KV_HEADS * GROUP + head) * HEAD_DIM;  // RAW: the key behind them
#pragma unroll
        for (int i = 0; i < 2 * STEPS; i++) {
            coming[i] = g < GROUP + RAW ? *(const u32*)(mine + 8 * i) : 0u;
            if (RAW) coming_value[i] = *(const u32*)(heads + (KV_HEADS * (GROUP + 1) + head) * HEAD_DIM + 8 * i);
        }
    };
    const auto fetch_turn = [&]() {  // into the first-level cache
        if (RAW && lane < HEAD_DIM / 32) asm volatile("prefetch.global.L1 [%0];" ::"l"(cos_sin + (long long)position * HEAD_DIM + 32 * lane));
    };
    if (begin < end) {
        fetch_place(row);
        fetch_turn();
    }
    if (RAW) wait_for_previous();  // until here nothing is younger than the plan
    if (begin >= end) return;
    fetch_heads(row, head);

    Pair pair;
    u32 query[2 * STEPS];
    bool whole = false, starts_here = false;
    int left = 0;

    for (int at = begin; at < end; at++) {
        if (left == 0) {
            left = min(tiles - tile, end - at);
            starts_here = tile == 0;
            whole = starts_here && left == tiles;
            clear(pair);
#if RAW
            const float* turn = cos_sin + (long long)position * HEAD_DIM;
            finish_head(coming, turn, g < GROUP ? q_weight : k_weight, eps);
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++) query[i] = g < GROUP ? coming[i] : 0u;
            if (starts_here && where >= 0) {
                u16* to = cache + (where / PAGE) * block_stride + (head * 2 * PAGE + where % PAGE) * HEAD_DIM;
                begin_with_newest(pair, query, coming, coming_value, to, scale);
            }
#else
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++) query[i] = coming[i];
#endif
            const bool is_rows_end = (head + 1) * each == at + left;
            if (at + left < end) {
                fetch_place(is_rows_end ? 0 : row + 1);
                fetch_heads(is_rows_end ? 0 : row + 1, head + is_rows_end);
            }
        }
        const u32 stage = (at - begin) % STAGES, here = stages + stage * STAGE_BYTES;
        barrier_wait(full + 8 * stage, ((at - begin) / STAGES) & 1);
        __syncwarp();
        u32 keys;
        asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(keys) : "r"(seen + 4 * stage) : "memory");
        float scores[PAGES][4];
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            const int count = keys >> (8 * page) & 255;
            score_page(scores[page], here + page * PAGE_BYTES, count, query, scale);
            if (count > 0 && count < PAGE) clear_behind(here + page * PAGE_BYTES, count);
        }
        raise(pair, scores);
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            if (keys >> (8 * page) & 255) add_page(pair, here + page * PAGE_BYTES, scores[page]);
        }
        __syncwarp();
        if (ask < end) ask_for_tile(next_entry);
        if (ask < end) read_entry(next_entry, ask_place);
        if (left == 1) fetch_turn();  // of the next pair
        tile++;
        if (--left == 0) {
#pragma unroll
            for (int j = 0; j < 2; j++) pair.sum[j] = sum_of_column(pair.sum[j]);
            // A program holds at most one part without the pair's beginning (0) and one with it, but not its end (1).
            const int part = program * 2 + starts_here;
            if (whole) write_pair(pair, out + row * out_stride + head * (GROUP * HEAD_DIM));
            else write_part(pair, parts + (long long)part * part_size, stats + part * stat_size);
            tile = 0;
            row++;
            if ((head + 1) * each == at + 1) head++, row = 0;
        }
    }

    // Of what is cut only a program's first pair and its last: who comes last to a pair adds its parts up.
    const int its_row = lane == 0 ? first_row : last_row, its_head = lane == 0 ? first_head : last_head;
    const int from = its_head * each + starts[its_row], upto = from + starts[its_row + 1] - starts[its_row];
    const bool another = lane == 0 || (lane == 1 && (last_row != first_row || last_head != first_head));
    const bool cut = another && (from < begin || upto > end);
    const long long busy = min(total, PROGRAMS);
    const int first = (int)(((from + 1) * busy - 1) / total), last = (int)((upto * busy - 1) / total);
    bool complete = false;
    __syncwarp();  // every thread's part is written before one thread counts it
    if (cut) {
        int arrived;
        int* count = counts + its_row * KV_HEADS + its_head;
        asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(arrived) : "l"(count) : "memory");
        complete = arrived == last - first;
        if (complete) *count = 0;
    }
    __syncwarp();
    for (int which = 0; which < 2; which++) {
        if (!__shfl_sync(~0u, complete, which)) continue;
        const int from_program = __shfl_sync(~0u, first, which), to_program = __shfl_sync(~0u, last, which);
        clear(pair);
        for (int other = from_program; other <= to_program; other++) {
            const int part = other * 2 + (other == from_program);
            add_part(pair, parts + (long long)part * part_size, stats + part * stat_size);
        }
        write_pair(pair, out + __shfl_sync(~0u, its_row, which) * out_stride + __shfl_sync(~0u, its_head, which) * (GROUP * HEAD_DIM));
    }
}
