// Linear layers for some 17 to 128 rows on Hopper: out = x @ w.T, with what stands before and behind it in a decoder layer.
//
// The host puts before this text: ELEMENT_IS_BF16, BM (rows of a tile: 64 or 128), BN (weight rows of a tile, with SILU half of
// them gate and half up), STAGES, CLUSTER, SPLIT, SILU, SCALED, RESIDUAL, and WGMMA(d, a, b, add), one product of the matrix
// unit of 64 rows, BN columns and 16 inputs.
//
// CLUSTER programs share an m tile. Without SPLIT they have different n tiles, and each brings its part of the rows of x to all
// of them (multicast); with SPLIT they have the same n tile, each a run of the inputs, and add up their sums through each
// other's shared memory. One warp starts copies, the others multiply; a full and an empty barrier for each stage.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct alignas(64) TensorMap { u64 words[16]; };

#define BK 64                          // inputs of a stage: 128 bytes, the width of the swizzle
#define GROUPS (BM / 64)               // warpgroups that multiply
#define CONSUMERS (128 * GROUPS)
#define X_BYTES (BM * BK * 2)
#define W_BYTES (BN * BK * 2)
#define STAGE_BYTES (X_BYTES + W_BYTES)
#define OUT_N (SILU ? BN / 2 : BN)     // outputs of a tile
#define PITCH (BN + 4)                 // floats of a row of sums in shared memory
#define LANES (OUT_N / 4)              // threads of a row behind the products: four outputs each
#define SLICE (SPLIT ? BM / CLUSTER : BM)

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar, u32 rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
        " mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(bar), "r"(rank) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}

__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, int column, int row, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(map), "r"(bar), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void copy_tile_to_all(u32 to, const TensorMap* map, int column, int row, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(bar), "h"((u16)((1 << CLUSTER) - 1)), "r"(column), "r"(row) : "memory");
}

// A tile of rows of 128 bytes, swizzled; rows are eight to 1,024 bytes.
__device__ __forceinline__ u64 matrix(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }

// Without release: what was written before is not for others.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_with_writes() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ float4 read_sums(u32 address, u32 rank) {
    float4 v;
    if (SPLIT) {
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    } else {
        asm volatile("ld.shared::cta.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    }
    return v;
}

#if ELEMENT_IS_BF16
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
#else
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float half_float(u16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
}
__device__ __forceinline__ float low(u32 v) { return half_float((u16)v); }
__device__ __forceinline__ float high(u32 v) { return half_float((u16)(v >> 16)); }
#endif

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1) cluster_linear(
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
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES, factors = empty + 8 * STAGES;
    const int warp = threadIdx.x / 32, rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
    const int n_tile = SPLIT ? blockIdx.x / CLUSTER : blockIdx.x;
    const int m0 = blockIdx.y * BM, n0 = n_tile * OUT_N;
    const int all_steps = (k + BK - 1) / BK, share = SPLIT ? (all_steps + CLUSTER - 1) / CLUSTER : all_steps;
    const int first = SPLIT ? rank * share : 0;
    const int steps = SPLIT ? max(0, min(share, all_steps - first)) : all_steps;
    const bool starts_copies = warp == 4 * GROUPS && threadIdx.x % 32 == 0;

    auto copy_weights = [&](int step) {
        const u32 stage = step % STAGES, to = stages + stage * STAGE_BYTES + X_BYTES, bar = full + 8 * stage;
        barrier_expect(bar, STAGE_BYTES);
        copy_tile(to, &w_map, (first + step) * BK, n0, bar);
        if (SILU) copy_tile(to + W_BYTES / 2, &w_map, (first + step) * BK, n + n0, bar);
    };
    if (starts_copies) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, GROUPS * (SPLIT ? 1 : CLUSTER));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int i = 0; i < min(STAGES, steps); i++) copy_weights(i);  // they depend on nothing
    }
    __syncwarp();
    if (CLUSTER > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    wait_for_previous();
    let_next_start();

    if (warp == 4 * GROUPS) {
        if (starts_copies) {
            for (int i = 0; i < steps; i++) {
                const u32 stage = i % STAGES, to = stages + stage * STAGE_BYTES, bar = full + 8 * stage;
                if (i >= STAGES) {
                    barrier_wait(empty + 8 * stage, (i / STAGES - 1) & 1);
                    copy_weights(i);
                }
                if (SPLIT || CLUSTER == 1) {
                    copy_tile(to, &x_map, (first + i) * BK, m0, bar);
                } else {
                    copy_tile_to_all(to + rank * (X_BYTES / CLUSTER), &x_map, i * BK, m0 + rank * (BM / CLUSTER), bar);
                }
            }
        }
        __syncwarp();
        if (SPLIT) {
            cluster_arrive();
            cluster_wait();
        }
        if (CLUSTER > 1) {
            cluster_arrive();
            cluster_wait();
        }
        return;
    }

    const int group = warp / 4, lane = threadIdx.x % 32;
    if (SCALED) {  // two threads a row
        const int row = threadIdx.x / 2;
        float sum = 0.f;
        if (m0 + row < rows)
            for (int part = threadIdx.x % 2; part < scale_parts; part += 2) sum += scale[(m0 + row) * scale_parts + part];
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (threadIdx.x % 2 == 0)
            asm volatile("st.shared::cta.f32 [%0], %1;" ::"r"(factors + 4 * row), "f"(rsqrtf(sum / k + eps)) : "memory");
    }
    float acc[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) acc[i] = 0.f;
    for (int i = 0; i < steps; i++) {
        const u32 stage = i % STAGES, x = stages + stage * STAGE_BYTES + group * (64 * BK * 2);
        barrier_wait(full + 8 * stage, (i / STAGES) & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < BK / 16; part++) {
            const u64 a = matrix(x + 32 * part), b = matrix(stages + stage * STAGE_BYTES + X_BYTES + 32 * part);
            WGMMA(acc, a, b);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        // What is not filled again needs no word, and whoever would get it may have ended.
        if (i > 0 && i - 1 + STAGES < steps && threadIdx.x % 128 == 0) {
            const u32 before = empty + 8 * ((i - 1) % STAGES);
            for (int peer = 0; peer < (SPLIT ? 1 : CLUSTER); peer++) barrier_arrive(before, SPLIT ? rank : peer);
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

    // The sums go through shared memory, so that a thread has four outputs of a row, and of a cut product everyone's.
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");  // all have multiplied: the stages are free
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 64 * group + 16 * (warp % 4) + lane / 4 + 8 * half, column = 8 * j + 2 * (lane % 4);
            asm volatile("st.shared::cta.v2.f32 [%0], {%1, %2};" ::"r"(stages + 4 * (row * PITCH + column)),
                         "f"(acc[4 * j + 2 * half]), "f"(acc[4 * j + 2 * half + 1]) : "memory");
        }
    }
    if (SPLIT) {
        cluster_arrive_with_writes();
        cluster_wait();
    } else {
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    }
    for (int place = threadIdx.x; place < SLICE * LANES; place += CONSUMERS) {
        const int in_tile = (SPLIT ? rank * SLICE : 0) + place / LANES, row = m0 + in_tile;
        const int column = 4 * (place % LANES), j = n0 + column;
        const u32 at = stages + 4 * (in_tile * PITCH + column);
        float y[4] = {0.f, 0.f, 0.f, 0.f}, up[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int peer = 0; peer < (SPLIT ? CLUSTER : 1); peer++) {
            const float4 v = read_sums(at, peer);
            y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
            if (SILU) {
                const float4 u = read_sums(at + 4 * OUT_N, peer);
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
                const uint2 old = *here, weight = *(const uint2*)(norm + j);
                // Rounded before it is normalised, as in the residual stream.
                rounded.x = pack(y[0] + low(old.x), y[1] + high(old.x));
                rounded.y = pack(y[2] + low(old.y), y[3] + high(old.y));
                *here = rounded;
                y[0] = low(rounded.x), y[1] = high(rounded.x), y[2] = low(rounded.y), y[3] = high(rounded.y);
                sum = y[0] * y[0] + y[1] * y[1] + y[2] * y[2] + y[3] * y[3];
                y[0] *= low(weight.x), y[1] *= high(weight.x), y[2] *= low(weight.y), y[3] *= high(weight.y);
            }
#pragma unroll
            for (int far = LANES / 2; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
            if (column == 0 && row < rows) squares[row * (SPLIT ? gridDim.x / CLUSTER : gridDim.x) + n_tile] = sum;
        }
        if (inside) {
            const uint2 value = {pack(y[0], y[1]), pack(y[2], y[3])};
            *(uint2*)(out + row * out_stride + j) = value;
        }
    }
    if (CLUSTER > 1) {  // others may still read these sums, or bring rows here
        cluster_arrive();
        cluster_wait();
    }
}
