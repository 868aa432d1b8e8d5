// The next layer's latents of all coded tokens: codes of all heads times the innovation, plus the latent times the
// transition. Four warpgroups of a block share the matrices in shared memory; each takes a page of 64 tokens.
//
// Compile-time numbers: RANK, WIDTH (of the next latent).

constexpr int LATENT_STEPS = RANK / 16;
constexpr int LATENT_BLOCKS = (LATENT_STEPS + 3) / 4;
constexpr int BLOCK_BYTES = WIDTH * 128;  // 64 slots of the matrix

extern "C" __global__ void __launch_bounds__(512, 1) next_latents_kernel(
    const u8* __restrict__ pages,      // [records, record_bytes]
    const int* __restrict__ table,     // [rows, num_pages]
    const int* __restrict__ lengths,   // [rows]
    const u8* __restrict__ latents,    // half [rows, num_pages * 64, RANK]
    const u8* __restrict__ matrices,   // images of innovation [chunks] and transition [LATENT_BLOCKS]
    const float* __restrict__ offset,  // [WIDTH]
    const Field* __restrict__ fields,  // [chunks * 4]
    u32* __restrict__ following,       // half [rows, num_pages * 64, WIDTH]
    int record_bytes, int num_pages, int total_pages, int chunks) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5, team = threadIdx.x >> 7;
    const int quad = lane & 3, group = lane >> 2, first = warp * 16 + group;
    const int blocks = chunks + LATENT_BLOCKS;
    const u32 fields_at = blocks * BLOCK_BYTES, barriers_at = fields_at + chunks * 128;
    if (threadIdx.x == 0) {
        for (int b = 0; b < blocks; b++) barrier_init(base + barriers_at + 8 * b, 1);
        fence_shared();
        for (int b = 0; b < blocks; b++) {
            barrier_expect(base + barriers_at + 8 * b, BLOCK_BYTES);
            bulk_copy(base + b * BLOCK_BYTES, matrices + long(b) * BLOCK_BYTES, BLOCK_BYTES, base + barriers_at + 8 * b);
        }
    }
    for (int i = threadIdx.x; i < chunks * 32; i += 512) ((u32*)(shared + fields_at))[i] = ((const u32*)fields)[i];
    const Field* described = (const Field*)(shared + fields_at);
    depend_on_previous();
    __syncthreads();

    bool arrived = false;
    for (int index = blockIdx.x * 4 + team; index < total_pages; index += gridDim.x * 4) {
        const int row = index / num_pages, page = index % num_pages;
        if (page * 64 >= lengths[row]) continue;
        const u8* record = pages + long(table[index]) * record_bytes;
        const u8* cell = record + first * 16 + quad * 4;
        u32 raw[2][4][2], codes[2][4][4];
        float sum[WIDTH / 2];
        auto load_chunk = [&](int chunk, u32 (&to)[4][2]) {
#pragma unroll
            for (int f = 0; f < 4; f++) {
                const u8* at = cell + described[chunk * 4 + f].offset;
                to[f][0] = __ldg((const u32*)at);
                to[f][1] = __ldg((const u32*)(at + 128));
            }
        };
        const u8* tail = record + record_bytes - 80;
        const float scale[2] = {scale_of(__ldg(tail + first)), scale_of(__ldg(tail + first + 8))};
        load_chunk(0, raw[0]);
        load_chunk(min(1, chunks - 1), raw[1]);
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) sum[i] = 0;
        keep(sum);
        for (int pair = 0; pair < chunks; pair += 2) {
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const int chunk = pair + u;
                if (chunk < chunks) {
                    wgmma_wait<1>();  // the products of this buffer, two chunks ago
#pragma unroll
                    for (int f = 0; f < 4; f++) {
                        keep(codes[u][f]);
                        const Field field = described[chunk * 4 + f];
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            u32 low, high;
                            unpack_centred<true>(raw[u][f][j], field, low, high);
                            if (field.gain) low = cubic(low, field.gain), high = cubic(high, field.gain);
                            codes[u][f][j] = low;
                            codes[u][f][2 + j] = high;
                        }
                    }
                    load_chunk(min(chunk + 2, chunks - 1), raw[u]);
                    if (!arrived) barrier_wait(base + barriers_at + 8 * chunk, 0);
                    wgmma_fence();
                    const u64 right = descriptor128(base + chunk * BLOCK_BYTES);
#pragma unroll
                    for (int f = 0; f < 4; f++) wgmma_width(sum, codes[u][f], right + 2 * f, true);
                    wgmma_commit();
                }
            }
        }
        wgmma_wait<0>();
        keep(sum);
#pragma unroll
        for (int t = 0; t < WIDTH / 8; t++) {
            const float2 o = __ldg((const float2*)(offset + 8 * t + 2 * quad));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                sum[4 * t + 2 * j] = fmaf(sum[4 * t + 2 * j], scale[j], o.x);
                sum[4 * t + 2 * j + 1] = fmaf(sum[4 * t + 2 * j + 1], scale[j], o.y);
            }
        }
        if (RANK > 0) {
            u32 latent[LATENT_STEPS + (RANK == 0)][4];
            const u8* own = latents + (long(index) * 64 + first) * RANK * 2 + quad * 8;
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint2 v = __ldg((const uint2*)(own + 8 * j * RANK * 2 + k * 32));
                    latent[k][j] = v.x;
                    latent[k][2 + j] = v.y;
                }
            if (!arrived)
                for (int b = 0; b < LATENT_BLOCKS; b++) barrier_wait(base + barriers_at + 8 * (chunks + b), 0);
            keep(sum);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++)
                wgmma_width(sum, latent[k], descriptor128(base + (chunks + k / 4) * BLOCK_BYTES) + 2 * (k % 4), true);
            wgmma_commit();
            wgmma_wait<0>();
            keep(sum);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
        }
        arrived = true;
        u32* out = following + (long(index) * 64 + first) * (WIDTH / 2) + quad;
#pragma unroll
        for (int t = 0; t < WIDTH / 8; t++)
#pragma unroll
            for (int j = 0; j < 2; j++) out[8 * j * (WIDTH / 2) + 4 * t] = pack_half2(sum[4 * t + 2 * j], sum[4 * t + 2 * j + 1]);
    }
    let_next_start();
}
