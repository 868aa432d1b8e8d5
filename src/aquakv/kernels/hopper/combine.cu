// From the splits' means of codes and latents to the attention output of the coded tokens.
//
// A block adds up the splits of 128 slots for one KV head and multiplies them with their part of the head's
// epilogue; the last block of a head to finish adds the parts up, in a fixed order.
//
// Compile-time numbers: KV_HEADS, GROUP, QUERIES, DIM, RANK.

constexpr int QUERY_HEADS = KV_HEADS * GROUP;
constexpr int PADDED = (GROUP + 1) / 2 * 2;
constexpr int CHUNK = 128;
constexpr int LANES = DIM / 2;            // threads along a head's coordinates
constexpr int TEAMS = 256 / LANES;        // groups of slots
constexpr int DEPTH = CHUNK / TEAMS;

extern "C" __global__ void __launch_bounds__(256) combine_kernel(
    const u8* __restrict__ means,         // half [rows, splits, KV_HEADS, slots, PADDED]
    const float* __restrict__ totals,     // [rows, splits, 3, QUERIES]
    const float* __restrict__ maxima,     // [rows, QUERY_HEADS, score_splits]
    const u32* __restrict__ epilogue,     // half [KV_HEADS, slots, DIM]
    const float* __restrict__ offset,     // [KV_HEADS, DIM]
    float* __restrict__ parts,            // [rows, KV_HEADS, chunks, GROUP, DIM]
    int* __restrict__ finished,           // [rows, KV_HEADS], zero before and after
    float* __restrict__ out,              // [rows, QUERY_HEADS, DIM]
    float* __restrict__ lse,              // [rows, QUERY_HEADS]
    int slots, int key_slots, int value_slots, int splits, int score_splits) {
    extern __shared__ __align__(16) u8 shared[];
    float* factors = (float*)shared;                          // [splits][3][PADDED]
    float* merged = factors + splits * 3 * PADDED;            // [2][CHUNK][PADDED]
    float* products = merged + 2 * CHUNK * PADDED;            // [TEAMS][GROUP][DIM]
    __shared__ float mass[PADDED], best[PADDED];
    __shared__ bool last;
    const int tid = threadIdx.x, head = blockIdx.x % KV_HEADS, chunk = blockIdx.x / KV_HEADS, row = blockIdx.y;
    const int chunks = gridDim.x / KV_HEADS, first = chunk * CHUNK;
    const int lane = tid % LANES, team = tid / LANES;
    u32 matrix[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        const int slot = first + team * DEPTH + i;
        matrix[i] = slot < slots ? __ldg(epilogue + (long(head) * slots + slot) * (DIM / 2) + lane) : 0;
    }
    depend_on_previous();
    // All that is needed of weights and maxima, in one wait for memory.
    for (int i = tid; i < splits * 3 * GROUP; i += 256)
        factors[i / GROUP * PADDED + i % GROUP] = __ldg(totals + (long(row) * splits * 3 + i / GROUP) * QUERIES + head * GROUP + i % GROUP);
    const int member = (tid >> 5) % GROUP;
    float top = -INFINITY;
    for (int i = tid & 31; i < score_splits; i += 32)
        top = fmaxf(top, __ldg(maxima + (long(row) * QUERY_HEADS + head * GROUP + member) * score_splits + i));
    __syncthreads();
    float whole = 0;
    for (int i = tid & 31; i < splits; i += 32) whole += factors[(i * 3 + 2) * PADDED + member];
    for (int step = 1; step < 32; step *= 2) {
        whole += __shfl_xor_sync(0xFFFFFFFFu, whole, step);
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
    }
    if (tid < 32 * GROUP && (tid & 31) == 0) mass[member] = whole, best[member] = top;
    __syncthreads();
    for (int i = tid; i < splits * 3 * GROUP; i += 256) {
        const float all = mass[i % GROUP];
        float& factor = factors[i / GROUP * PADDED + i % GROUP];
        factor = all > 0 ? factor / all : all;
    }
    __syncthreads();
    {
        const int local = tid % CHUNK, half = tid / CHUNK, slot = first + local;
        float sum[PADDED];
#pragma unroll
        for (int m = 0; m < PADDED; m++) sum[m] = 0;
        if (slot < slots) {
            const int kind = slot < key_slots ? 0 : slot < key_slots + value_slots ? 1 : 2;
            const u8* from = means + ((long(row) * splits * KV_HEADS + head) * slots + slot) * PADDED * 2;
            const long stride = long(KV_HEADS) * slots * PADDED * 2;
#pragma unroll 16
            for (int split = half; split < splits; split += 2) {
                const float* factor = factors + (split * 3 + kind) * PADDED;
#pragma unroll
                for (int m = 0; m < PADDED; m += 2) {
                    const u32 pair = __ldg((const u32*)(from + split * stride + m * 2));
                    sum[m] = fmaf(low_float(pair), factor[m], sum[m]);
                    if (m + 1 < GROUP) sum[m + 1] = fmaf(high_float(pair), factor[m + 1], sum[m + 1]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < PADDED; m++) merged[(half * CHUNK + local) * PADDED + m] = sum[m];
    }
    __syncthreads();
    float product[GROUP][2];
#pragma unroll
    for (int m = 0; m < GROUP; m++) product[m][0] = product[m][1] = 0;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        const float x = low_float(matrix[i]), y = high_float(matrix[i]);
        const float* mean = merged + (team * DEPTH + i) * PADDED;
#pragma unroll
        for (int m = 0; m < GROUP; m++) {
            const float value = mean[m] + mean[CHUNK * PADDED + m];
            product[m][0] = fmaf(x, value, product[m][0]);
            product[m][1] = fmaf(y, value, product[m][1]);
        }
    }
#pragma unroll
    for (int m = 0; m < GROUP; m++) *(float2*)(products + (team * GROUP + m) * DIM + 2 * lane) = make_float2(product[m][0], product[m][1]);
    __syncthreads();
    float* own = parts + ((long(row) * KV_HEADS + head) * chunks + chunk) * GROUP * DIM;
    for (int i = tid; i < GROUP * DIM; i += 256) {
        float sum = 0;
#pragma unroll
        for (int t = 0; t < TEAMS; t++) sum += products[t * GROUP * DIM + i];
        own[i] = sum;
    }
    __threadfence();
    __syncthreads();
    if (tid == 0) last = atomicAdd(finished + row * KV_HEADS + head, 1) == chunks - 1;
    __syncthreads();
    if (last) {
        __threadfence();
        const float* all = parts + (long(row) * KV_HEADS + head) * chunks * GROUP * DIM;
        for (int i = tid; i < GROUP * DIM; i += 256) {
            float sum = offset[head * DIM + i % DIM];
#pragma unroll 8
            for (int c = 0; c < chunks; c++) sum += __ldcg(all + long(c) * GROUP * DIM + i);
            const float whole = mass[i / DIM];
            out[(long(row) * QUERY_HEADS + head * GROUP) * DIM + i] = whole == 0 ? 0 : sum;
        }
        if (tid < GROUP)
            lse[row * QUERY_HEADS + head * GROUP + tid] = (best[tid] + log2f(mass[tid]) - 6.0f) * 0.6931471805599453f;
        if (tid == 0) finished[row * KV_HEADS + head] = 0;
    }
}
