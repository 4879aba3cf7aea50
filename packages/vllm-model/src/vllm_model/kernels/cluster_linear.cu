// Linear layers of some 3 to 128 rows on Hopper: out = x @ w.T, with what stands before and behind it in a decoder layer.
//
// The host puts before this text: ELEMENT_IS_BF16, BM (rows of a tile: 64 or 128), BN (weight rows of a tile, with SILU half of
// them gate and half up), CHUNKS (64 inputs each, of a stage), STAGES, CLUSTER, SILU, SCALED, RESIDUAL, and WGMMA(d, a, b): d +=
// one product of the matrix unit of 64 rows, OUT_N columns and 16 inputs.
//
// The programs of a cluster have one tile and a run of the inputs each, and send their sums to each other's shared memory, where
// each adds up its share of the rows. One warp starts copies, of weights before the kernel ahead has ended; the others multiply.

#define GROUPS (BM / 64)                   // warpgroups that multiply
#define CONSUMERS (128 * GROUPS)
#define SCALERS (SCALED ? BM : 0)          // threads that find the norms of rows meanwhile
#define X_CHUNK (BM * 128)                 // bytes: 64 inputs are 128, the width of the swizzle
#define OUT_N (SILU ? BN / 2 : BN)         // outputs of a tile
#define W_CHUNK (OUT_N * 128)
#define X_BYTES (CHUNKS * X_CHUNK)         // of a stage
#define W_BYTES (CHUNKS * BN * 128)
#define STAGE_BYTES (X_BYTES + W_BYTES)
#define PITCH (BN + 4)                     // floats of a row of sums in shared memory
#define LANES (OUT_N / 4)                  // threads of a row behind the products: four outputs each
#define SLICE (BM / CLUSTER)               // rows that one program of a cluster adds up
#define PLACES ((SLICE * LANES + CONSUMERS - 1) / CONSUMERS)

// CHUNKS tiles of 64 columns each, one behind the other.
__device__ __forceinline__ void copy_tiles(u32 to, const TensorMap* map, int row, int chunk, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(bar), "r"(0), "r"(row), "r"(chunk) : "memory");
}

__device__ __forceinline__ u32 of_peer(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// A tile of rows of 128 bytes, swizzled; rows are eight to 1,024 bytes.
__device__ __forceinline__ u64 matrix(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }

__device__ __forceinline__ float4 read_sums(u32 address) {
    float4 v;
    asm volatile("ld.shared::cta.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}

// One warp finds the factors of 32 rows of the tile, from row `first` on: eight threads a row, with many loads under way.
__device__ __forceinline__ void find_norms(const float* scale, int parts, int m0, int first, int rows, int k, float eps, u32 factors) {
    const int lane = threadIdx.x % 32, first_row = first + lane / 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        for (int start = 0; start < parts; start += 32) {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int part = start + lane % 8 + 8 * (i % 4), row = m0 + first_row + 16 * half + 4 * (i / 4);
                if (part < parts && row < rows) sum[i / 4] += scale[row * parts + part];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int far = 4; far > 0; far /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], far);
            const u32 place = factors + 4 * (first_row + 16 * half + 4 * i);
            if (lane % 8 == 0) asm volatile("st.shared::cta.f32 [%0], %1;" ::"r"(place), "f"(rsqrtf(sum[i] / k + eps)) : "memory");
        }
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32 + SCALERS, 1) cluster_linear(
    const __grid_constant__ TensorMap x_map,  // [rows, k]
    const __grid_constant__ TensorMap w_map,  // [n or 2 n, k]
    const float* scale,                       // [rows, scale_parts]: sums of squares of x before its norm's weight
    u16* residual,                            // [rows, n], updated
    const u16* norm,                          // [n]: of the norm behind the residual
    u16* out,                                 // [rows, n]: the result, or the updated residual times the norm's weight
    float* squares,                           // [rows, n tiles]
    long long out_stride, int scale_parts, int rows, int n, int k, float eps) {
    extern __shared__ unsigned char memory[];
    const u32 stages = (shared_address(memory) + 1023) & ~1023u;
    const u32 sums = CLUSTER > 1 ? stages + STAGES * STAGE_BYTES : stages;  // [CLUSTER, SLICE, PITCH]
    const u32 full = max(stages + STAGES * STAGE_BYTES, sums + 4 * BM * PITCH), empty = full + 8 * STAGES;
    const u32 arrived = empty + 8 * STAGES, factors = arrived + 8;
    const int warp = threadIdx.x / 32, rank = blockIdx.x % CLUSTER, n_tile = blockIdx.x / CLUSTER;
    const int m0 = blockIdx.y * BM, n0 = n_tile * OUT_N;
    const int all_steps = (k / 64 + CHUNKS - 1) / CHUNKS, share = (all_steps + CLUSTER - 1) / CLUSTER;
    const int first = rank * share, steps = max(0, min(share, all_steps - first));

    auto copy_weights = [&](int step) {
        const u32 stage = step % STAGES, to = stages + stage * STAGE_BYTES + X_BYTES, bar = full + 8 * stage;
        barrier_expect(bar, STAGE_BYTES);
        copy_tiles(to, &w_map, n0, (first + step) * CHUNKS, bar);
        if (SILU) copy_tiles(to + W_BYTES / 2, &w_map, n + n0, (first + step) * CHUNKS, bar);
    };
    const bool starts_copies = threadIdx.x == CONSUMERS;
    if (starts_copies) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, GROUPS);
        }
        barrier_init(arrived, 1);
        barriers_are_initialised();
        for (int i = 0; i < min(STAGES, steps); i++) copy_weights(i);  // they depend on nothing
        barrier_expect(arrived, BM * BN * 4);
        prefetch_map(&x_map);
    }
    __syncwarp();
    if (CLUSTER > 1) {
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    } else {
        __syncthreads();
    }
    wait_for_previous();

    if (warp == CONSUMERS / 32) {
        if (starts_copies) {
            for (int i = 0; i < steps; i++) {
                const u32 stage = i % STAGES;
                if (i >= STAGES) {
                    barrier_wait(empty + 8 * stage, (i / STAGES - 1) & 1);
                    copy_weights(i);
                }
                copy_tiles(stages + stage * STAGE_BYTES, &x_map, m0, (first + i) * CHUNKS, full + 8 * stage);
            }
        }
        return;
    }
    const int lane = threadIdx.x % 32;
    if (SCALED && warp > CONSUMERS / 32) {
        find_norms(scale, scale_parts, m0, 32 * (warp - CONSUMERS / 32 - 1), rows, k, eps, factors);
        asm volatile("bar.arrive 2, %0;" ::"n"(CONSUMERS + SCALERS) : "memory");
        return;
    }

    const int group = warp / 4;
    // What the end needs is asked for now.
    uint2 old[PLACES], weight[PLACES];
    if (RESIDUAL) {
#pragma unroll
        for (int i = 0; i < PLACES; i++) {
            const int place = threadIdx.x + i * CONSUMERS, row = m0 + rank * SLICE + place / LANES, j = n0 + 4 * (place % LANES);
            const bool inside = place < SLICE * LANES && row < rows && j < n;
            old[i] = inside ? *(const uint2*)(residual + (long long)row * n + j) : uint2{0u, 0u};
            weight[i] = inside ? *(const uint2*)(norm + j) : uint2{0u, 0u};
        }
    }
    float acc[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) acc[i] = 0.f;
    for (int i = 0; i < steps; i++) {
        const u32 stage = i % STAGES, x = stages + stage * STAGE_BYTES + group * (64 * 128);
        const u32 w = stages + stage * STAGE_BYTES + X_BYTES;
        barrier_wait(full + 8 * stage, (i / STAGES) & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < 4 * CHUNKS; part++) {
            const int chunk = part / 4, at = 32 * (part % 4);
            const u64 a = matrix(x + chunk * X_CHUNK + at);
            WGMMA(acc, a, matrix(w + chunk * W_CHUNK + at));
            if (SILU) WGMMA((acc + BN / 4), a, matrix(w + W_BYTES / 2 + chunk * W_CHUNK + at));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (i > 0 && i - 1 + STAGES < steps && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * ((i - 1) % STAGES));
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

    // The sums go through shared memory: a thread then has four outputs of a row, and everyone's of them.
    if (CLUSTER == 1) asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");  // all have multiplied: the stages are free
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = 64 * group + 16 * (warp % 4) + lane / 4 + 8 * half;
        const u32 line = sums + 4 * ((CLUSTER > 1 ? rank * SLICE + row % SLICE : row) * PITCH + 2 * (lane % 4));
        const u32 there = CLUSTER > 1 ? of_peer(line, row / SLICE) : line, told = CLUSTER > 1 ? of_peer(arrived, row / SLICE) : 0;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            const float left = acc[4 * j + 2 * half], right = acc[4 * j + 2 * half + 1];
            if (CLUSTER > 1) {
                asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(there + 32 * j),
                             "f"(left), "f"(right), "r"(told) : "memory");
            } else {
                asm volatile("st.shared::cta.v2.f32 [%0], {%1, %2};" ::"r"(there + 32 * j), "f"(left), "f"(right) : "memory");
            }
        }
    }
    if (CLUSTER == 1) asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    if (CLUSTER > 1) barrier_wait(arrived, 0);
    if (SCALED) asm volatile("bar.sync 2, %0;" ::"n"(CONSUMERS + SCALERS) : "memory");
#pragma unroll
    for (int pass = 0; pass < PLACES; pass++) {
        const int place = threadIdx.x + pass * CONSUMERS;
        if (place >= SLICE * LANES) break;  // whole warps, where they exchange anything
        const int in_slice = place / LANES, in_tile = rank * SLICE + in_slice, row = m0 + in_tile;
        const int column = 4 * (place % LANES), j = n0 + column;
        float y[4] = {0.f, 0.f, 0.f, 0.f}, up[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int peer = 0; peer < CLUSTER; peer++) {
            const u32 at = sums + 4 * ((peer * SLICE + in_slice) * PITCH + column);
            const float4 v = read_sums(at);
            y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
            if (SILU) {
                const float4 u = read_sums(at + 4 * OUT_N);
                up[0] += u.x, up[1] += u.y, up[2] += u.z, up[3] += u.w;
            }
        }
        float factor = 1.f;
        if (SCALED) asm volatile("ld.shared::cta.f32 %0, [%1];" : "=f"(factor) : "r"(factors + 4 * in_tile) : "memory");
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] *= factor;
            if (SILU) y[i] = y[i] / (1.f + __expf(-y[i])) * (up[i] * factor);
        }
        const bool inside = row < rows && j < n;
        if (RESIDUAL) {
            float sum = 0.f;
            uint2 rounded = {0u, 0u};
            if (inside) {
                uint2* here = (uint2*)(residual + (long long)row * n + j);
                // Rounded before it is normalised, as in the residual stream.
                rounded.x = pack(y[0] + low(old[pass].x), y[1] + high(old[pass].x));
                rounded.y = pack(y[2] + low(old[pass].y), y[3] + high(old[pass].y));
                *here = rounded;
                y[0] = low(rounded.x), y[1] = high(rounded.x), y[2] = low(rounded.y), y[3] = high(rounded.y);
                sum = y[0] * y[0] + y[1] * y[1] + y[2] * y[2] + y[3] * y[3];
                y[0] *= low(weight[pass].x), y[1] *= high(weight[pass].x), y[2] *= low(weight[pass].y), y[3] *= high(weight[pass].y);
            }
#pragma unroll
            for (int far = LANES / 2; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
            if (column == 0 && row < rows) squares[row * (gridDim.x / CLUSTER) + n_tile] = sum;
        }
        if (inside) {
            const uint2 value = {pack(y[0], y[1]), pack(y[2], y[3])};
            *(uint2*)(out + row * out_stride + j) = value;
        }
    }
}
