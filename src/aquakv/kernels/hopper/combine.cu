// From the splits' means of codes and latents to the attention output of the coded tokens.
//
// A block takes CHUNK slots of one KV head and some rows. The splits of all its rows come to shared memory at once,
// while weights are looked up, and the slots' part of the head's epilogue before them. A row's splits are added up
// and multiplied with the epilogue on tensor cores, as halves and what these leave: two columns of the product for a
// query head. The last block of a head and its rows adds the parts up, in a fixed order.
//
// Compile-time numbers: KV_HEADS, GROUP, QUERIES, DIM, CHUNK (a multiple of 16).

constexpr int QUERY_HEADS = KV_HEADS * GROUP;
constexpr int PADDED = (GROUP + 1) / 2 * 2;
constexpr int STEPS = CHUNK / 16;
constexpr int WARPS = STEPS > 8 ? STEPS : 8, THREADS = 32 * WARPS;
constexpr int SPLIT_BYTES = CHUNK * PADDED * 2;
constexpr int MATRIX_ROW = DIM * 2 + 16, MEAN_ROW = CHUNK * 2 + 16;  // neighbouring rows in different banks
constexpr int TILES = DIM / 16;                                      // of 16 coordinates

struct __align__(PADDED * 2) Members {
    u32 pairs[PADDED / 2];
};
struct __align__(PADDED * 4) Weights {
    float of[PADDED];
};

extern "C" __global__ void __launch_bounds__(THREADS) combine_kernel(
    const u8* __restrict__ means,         // half [rows, splits, KV_HEADS, slots, PADDED]
    const float* __restrict__ totals,     // [rows, splits, 3, QUERIES]
    const float* __restrict__ maxima,     // [rows, QUERY_HEADS, score_splits]
    const u8* __restrict__ epilogue,      // half [KV_HEADS, slots, DIM]
    const float* __restrict__ offset,     // [KV_HEADS, DIM]
    float* __restrict__ parts,            // [rows, KV_HEADS, chunks, GROUP, DIM]
    int* __restrict__ finished,           // [row blocks, KV_HEADS], zero before and after
    float* __restrict__ out,              // [rows, QUERY_HEADS, DIM]
    float* __restrict__ lse,              // [rows, QUERY_HEADS]
    int rows, int block_rows, int slots, int key_slots, int value_slots, int splits, int score_splits) {
    extern __shared__ __align__(128) u8 shared[];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, quad = lane & 3, group = lane >> 2;
    const int head = blockIdx.x % KV_HEADS, chunk = blockIdx.x / KV_HEADS, chunks = gridDim.x / KV_HEADS;
    const int first = chunk * CHUNK, count = min(CHUNK, slots - first);  // multiples of 16
    const int first_row = blockIdx.y * block_rows, own_rows = min(block_rows, rows - first_row);
    u8* staged = shared + CHUNK * MATRIX_ROW;                       // half [block_rows][splits][CHUNK][PADDED]
    u8* merged = staged + block_rows * splits * SPLIT_BYTES;        // half [block_rows][2][4][MEAN_ROW / 2]
    float* weights = (float*)(merged + block_rows * 8 * MEAN_ROW);  // [block_rows][splits][3][PADDED]
    float* masses = weights + block_rows * splits * 3 * PADDED;     // [block_rows][PADDED]
    const u32 base = shared_address(shared), staged_at = base + CHUNK * MATRIX_ROW;
    const u32 matrix_there = staged_at + block_rows * (splits * (SPLIT_BYTES + 12 * PADDED) + 8 * MEAN_ROW + 4 * PADDED);
    const u32 means_there = matrix_there + 8;
    __shared__ bool last;

    if (tid == 0) {
        barrier_init(matrix_there, 1);
        barrier_init(means_there, 1);
        fence_shared();
        barrier_expect(matrix_there, count * DIM * 2);
        barrier_expect(means_there, own_rows * splits * count * PADDED * 2);
    }
    __syncthreads();
    // Threads of a warp issue copies one after the other, so all warps take part.
    for (int i = lane * WARPS + warp; i < count; i += THREADS)
        bulk_copy(base + i * MATRIX_ROW, epilogue + (long(head) * slots + first + i) * DIM * 2, DIM * 2, matrix_there);
    depend_on_previous();
    let_next_start();
    for (int i = lane * WARPS + warp; i < own_rows * splits; i += THREADS)
        bulk_copy(staged_at + i * SPLIT_BYTES,
                  means + ((long(first_row) * splits + i) * KV_HEADS + head) * slots * PADDED * 2 + first * PADDED * 2,
                  count * PADDED * 2, means_there);
    for (int start = tid; start < own_rows * splits * 3 * GROUP; start += 4 * THREADS) {
        float weight[4];  // loads that do not wait for each other
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = start + k * THREADS;
            const float* from = totals + (long(first_row) * splits * 3 + i / GROUP) * QUERIES + head * GROUP + i % GROUP;
            weight[k] = i < own_rows * splits * 3 * GROUP ? __ldg(from) : 0;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = start + k * THREADS;
            if (i < own_rows * splits * 3 * GROUP) weights[i / GROUP * PADDED + i % GROUP] = weight[k];
        }
    }
    __syncthreads();
    for (int i = warp; i < own_rows * GROUP; i += WARPS) {
        const float* from = weights + (i / GROUP * splits * 3 + 2) * PADDED + i % GROUP;
        float mass = 0;
        for (int split = lane; split < splits; split += 32) mass += from[split * 3 * PADDED];
        for (int step = 1; step < 32; step *= 2) mass += __shfl_xor_sync(0xFFFFFFFFu, mass, step);
        if (lane == 0) masses[i / GROUP * PADDED + i % GROUP] = mass;
    }
    __syncthreads();

    // ---- add splits up -----------------------------------------------------------------------------------------
    barrier_wait(means_there, 0);
    for (int i = warp; i < own_rows * STEPS; i += WARPS) {
        // The half warps have the same 16 slots, and every other split.
        const int row = i / STEPS, step = i % STEPS, local = step * 16 + (lane & 15), half = lane >> 4;
        if (step * 16 >= count) continue;
        const int slot = first + step * 16, kind = slot < key_slots ? 0 : slot < key_slots + value_slots ? 1 : 2;
        const u8* from = staged + row * splits * SPLIT_BYTES + local * PADDED * 2;
        const float* weight = weights + (row * splits * 3 + kind) * PADDED;
        float sum[PADDED];
#pragma unroll
        for (int m = 0; m < PADDED; m++) sum[m] = 0;
#pragma unroll 4
        for (int split = half; split < splits; split += 2) {
            const Members means_of = *(const Members*)(from + split * SPLIT_BYTES);
            const Weights weights_of = *(const Weights*)(weight + split * 3 * PADDED);
#pragma unroll
            for (int m = 0; m < GROUP; m++) {
                const u32 pair = means_of.pairs[m / 2];
                sum[m] = fmaf(m % 2 ? high_float(pair) : low_float(pair), weights_of.of[m], sum[m]);
            }
        }
#pragma unroll
        for (int m = 0; m < GROUP; m++) {
            const float whole = sum[m] + __shfl_xor_sync(0xFFFFFFFFu, sum[m], 16), mass = masses[row * PADDED + m];
            const float mean = mass > 0 ? whole / mass : mass;
            const u32 rounded = pack_half2(mean, mean), rest = pack_half2(mean - low_float(rounded), 0);
            *(unsigned short*)(merged + ((row * 2 + half) * 4 + m) * MEAN_ROW + local * 2) = (unsigned short)(half ? rest : rounded);
        }
    }
    __syncthreads();

    // ---- multiply with the epilogue: coordinates by slots, slots by query heads ----------------------------------
    barrier_wait(matrix_there, 0);
    if (warp < WARPS / TILES * TILES) {
        const int tile = warp % TILES;
        u32 left[STEPS][4];
#pragma unroll
        for (int k = 0; k < STEPS; k++)
            if (k * 16 < count)
                load_transposed(base + (k * 16 + (lane & 7) + ((lane >> 4) << 3)) * MATRIX_ROW + tile * 32 + ((lane >> 3) & 1) * 16, left[k]);
        for (int row = warp / TILES; row < own_rows; row += WARPS / TILES) {
            // Columns are query heads: 4 of halves, then 4 of what these leave. Those past GROUP mean nothing.
            const u8* right = merged + (row * 8 + group) * MEAN_ROW + quad * 4;
            float sum[4] = {0, 0, 0, 0};
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                if (k * 16 < count) multiply_add(sum, left[k], *(const u32*)(right + k * 32), *(const u32*)(right + k * 32 + 16));
            float* own = parts + ((long(first_row + row) * KV_HEADS + head) * chunks + chunk) * GROUP * DIM;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 2);
                const int member = 2 * quad + i % 2;
                if (member < GROUP) own[member * DIM + tile * 16 + group + i / 2 * 8] = sum[i];
            }
        }
    }

    // ---- add parts up ------------------------------------------------------------------------------------------
    __threadfence();
    __syncthreads();
    int* counter = finished + blockIdx.y * KV_HEADS + head;
    if (tid == 0) last = atomicAdd(counter, 1) == chunks - 1;
    if (chunk == 0)
        for (int i = warp; i < own_rows * GROUP; i += WARPS) {
            const int at = (first_row + i / GROUP) * QUERY_HEADS + head * GROUP + i % GROUP;
            float largest = -INFINITY;
            for (int split = lane; split < score_splits; split += 32) largest = fmaxf(largest, maxima[long(at) * score_splits + split]);
            for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
            if (lane == 0) lse[at] = (largest + log2f(masses[i / GROUP * PADDED + i % GROUP]) - 6.0f) * 0.6931471805599453f;
        }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = tid; i < own_rows * GROUP * DIM / 4; i += THREADS) {
        const int row = i / (GROUP * DIM / 4), place = i % (GROUP * DIM / 4) * 4, coordinate = place % DIM;
        const float* from = parts + (long(first_row + row) * KV_HEADS + head) * chunks * GROUP * DIM + place;
        float4 sum = *(const float4*)(offset + head * DIM + coordinate);
        for (int start = 0; start < chunks; start += 16) {
            float4 part[16];
#pragma unroll
            for (int c = 0; c < 16; c++)
                part[c] = start + c < chunks ? __ldcg((const float4*)(from + long(start + c) * GROUP * DIM)) : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int c = 0; c < 16; c++) sum.x += part[c].x, sum.y += part[c].y, sum.z += part[c].z, sum.w += part[c].w;
        }
        if (masses[row * PADDED + place / DIM] == 0) sum = make_float4(0, 0, 0, 0);
        *(float4*)(out + (long(first_row + row) * QUERY_HEADS + head * GROUP) * DIM + place) = sum;
    }
    if (tid == 0) *counter = 0;
}
