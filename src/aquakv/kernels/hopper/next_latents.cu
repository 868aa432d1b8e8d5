// The next layer's latents of all coded tokens: codes of all heads times the innovation, plus the latent times the
// transition. Four warpgroups (teams) of a block share the matrices in shared memory and take pages of 64 tokens in
// turn.
//
// Pages' records come through stages, each of which belongs to one team: it waits for every filling of it, in order
// (a barrier tells a filling from the one before only), and has the next page copied when it has left a stage. Where
// there are fewer stages than teams, the other teams do nothing. The latent is
// multiplied first and divided by the token's scale, so that the products of the codes follow each other: those of a
// chunk run while the next chunk is unpacked. Codes are used where they lie (see `Bits`); what their numbers have too
// much or too little is in the matrices. Only in the first `general` chunks are levels made of them. In the others,
// where fields 0 and 1 share a plane, and so do 2 and 3, levels are equally spaced and used without centres, which
// `constants` make good.
//
// Sums are 2^exponent times what they stand for, so that the matrices' largest entries are near the largest half.
//
// With LATE the kernel before is one that needs nothing from this one nor has anything for it, and that began only when
// all kernels before it had ended: this kernel runs beside it, waits for it at its own end, and only then lets the
// next one start, so that whoever waits for this kernel has waited for both.
//
// Compile-time numbers: RANK, WIDTH (of the next latent), LATE.

constexpr int TEAMS = 4, THREADS = 128 * TEAMS;
constexpr int LATENT_STEPS = RANK / 16;
constexpr int LATENT_BLOCKS = (LATENT_STEPS + 3) / 4;
constexpr bool EARLY = RANK <= 64;        // whether registers hold the next latent while codes are multiplied
constexpr int BLOCK_BYTES = WIDTH * 128;  // 64 slots of the matrix

// Where a chunk's fields are (0 and 2 first) and how to unpack them.
struct __align__(16) Chunk {
    uint4 places, mask, centre, gain;
};
static_assert(sizeof(Chunk) == 64, "the host counts on it");
constexpr int AHEAD = 2;  // chunks past the last whose places are read, and what is there, in vain

DEVICE u32 part(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE void team_sync(int team) { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) next_latents_kernel(
    const u8* __restrict__ pages,         // [records, record_bytes]
    const int* __restrict__ table,        // [rows, num_pages]
    const int* __restrict__ lengths,      // [rows]
    const u8* __restrict__ latents,       // half [rows, num_pages * 64, RANK]
    const u8* __restrict__ matrices,      // images of innovation [chunks] and transition [LATENT_BLOCKS]
    const float* __restrict__ constants,  // [2, WIDTH]: sums of the codes that are level 0, offset
    const Bits* __restrict__ fields,      // [chunks * 4]
    u8* __restrict__ following,           // half [rows, num_pages * 64, WIDTH]
    int record_bytes, int num_pages, int total_pages, int chunks, int general, int stages, int teams, int exponent) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    const int team = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 7, 0);  // so that the compiler knows that a warp has one
    const int quad = lane & 3, group = lane >> 2, first = warp * 16 + group;
    const int blocks = chunks + LATENT_BLOCKS;
    const u32 constants_at = blocks * BLOCK_BYTES, chunks_at = constants_at + 2 * WIDTH * 4;
    const u32 barriers_at = chunks_at + (chunks + AHEAD) * sizeof(Chunk), full_at = barriers_at + 8 * blocks;
    const u32 pages_at = (full_at + 8 * stages + 15) & ~15;

    // The row of a page, without a division: the product is at most one too small.
    const u32 magic = 0xFFFFFFFFu / num_pages;
    auto row_of = [&](u32 index) {
        const u32 row = __umulhi(index, magic);
        return row + ((row + 1) * num_pages <= index);
    };
    auto page_of = [&](int index) { return index - row_of(index) * num_pages; };
    auto copy_page = [&](int stage, int index, int length, int record) {
        const u32 full = base + full_at + 8 * stage;
        const bool used = int(page_of(index) * 64) < length;
        barrier_expect(full, used ? record_bytes : 0);
        if (used) bulk_copy(base + pages_at + stage * record_bytes, pages + long(record) * record_bytes, record_bytes, full);
    };
    if (threadIdx.x < stages) {
        const int index = blockIdx.x + threadIdx.x * gridDim.x;
        barrier_init(base + full_at + 8 * threadIdx.x, 1);
        fence_shared();
        if (index < total_pages) copy_page(threadIdx.x, index, lengths[row_of(index)], table[index]);
    } else if (team == 1) {
#pragma unroll 1
        for (int block = thread; block < blocks; block += 128) {
            const u32 barrier = base + barriers_at + 8 * block;
            barrier_init(barrier, 1);
            fence_shared();
            barrier_expect(barrier, BLOCK_BYTES);
            bulk_copy(base + block * BLOCK_BYTES, matrices + long(block) * BLOCK_BYTES, BLOCK_BYTES, barrier);
        }
    } else if (team == 2) {
#pragma unroll 1
        for (int i = thread; i < (chunks + AHEAD) * 4; i += 128) {
            const int f = i % 4, place = f == 1 ? 2 : f == 2 ? 1 : f;
            u32* chunk = (u32*)(shared + chunks_at + i / 4 * sizeof(Chunk));
            const bool real = i < chunks * 4;
            chunk[place] = real ? fields[i].offset : 0, chunk[4 + f] = real ? fields[i].mask : 0;
            chunk[8 + f] = real ? fields[i].centre : 0, chunk[12 + f] = real ? fields[i].gain : 0;
        }
    } else if (team == 3) {
        for (int i = thread; i < 2 * WIDTH; i += 128) ((float*)(shared + constants_at))[i] = constants[i];
    }
    const Chunk* described = (const Chunk*)(shared + chunks_at);
    // This thread's columns: runs of eight, and one of four if the width is not a multiple of 32.
    const float* middle = (const float*)(shared + constants_at);
    auto column = [&](int t) { return t / 4 * 32 + (t / 4 * 4 + 4 <= WIDTH / 8 ? 8 : 4) * quad + 2 * (t % 4); };
#if !LATE
    depend_on_previous();
    let_next_start();
#endif
    __syncthreads();

    u32 latent[LATENT_STEPS + (RANK == 0)][4];
    auto load_latent = [&](int index) {
        const u8* own = latents + (long(index) * 64 + first) * RANK * 2 + quad * 8;
#pragma unroll
        for (int k = 0; k < LATENT_STEPS; k++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint2 v = __ldg((const uint2*)(own + 8 * j * RANK * 2 + k * 32));
                latent[k][j] = v.x;
                latent[k][2 + j] = v.y;
            }
    };
    const float raise = float(exponent), lower = exp2_fast(-raise);
    const int step = gridDim.x * teams;
    int index = team < teams ? int(blockIdx.x + team * gridDim.x) : total_pages, stage = team, parity = 0;
    int length = 0;
    if (index < total_pages) {
        length = __ldg(lengths + row_of(index));
        load_latent(index);
    }
    // Until the matrices are there.
    for (int b = 0; b < blocks; b++) barrier_wait(base + barriers_at + 8 * b, 0);
    float sum[WIDTH / 2];
    u32 codes[2][4][4];
    for (; index < total_pages; index += step, stage += teams) {
        if (stage >= stages) stage -= stages, parity ^= 1;  // a multiple of `teams`
        const bool used = __shfl_sync(0xFFFFFFFFu, int(page_of(index) * 64) < length, 0);
        // What comes into this stage next; asked for now, needed when the page has been read.
        const int later = index + stages * gridDim.x;
        int later_length = 0, later_record = 0;
        if (thread == 0 && later < total_pages) {
            later_length = __ldg(lengths + row_of(later));
            later_record = __ldg(table + later);
        }
        const int next = min(index + step, total_pages - 1);
        length = __ldg(lengths + row_of(next));
        barrier_wait(base + full_at + 8 * stage, parity);
        auto release = [&]() {
            team_sync(team);
            if (thread == 0 && later < total_pages) copy_page(stage, later, later_length, later_record);
        };
        if (!used) {
            release();
            load_latent(next);
            continue;
        }
        const u8* record = shared + pages_at + stage * record_bytes;
        const u8* cell = record + first * 16 + quad * 4;
        u32 raw[4][2];  // of fields 0 and 2; in general chunks 1 and 3 too
        const Chunk* ahead = described;
        uint2 places = *(const uint2*)&ahead->places;
        uint4 mask = ahead->mask;
        auto load_field = [&](int f, u32 place) {
#pragma unroll
            for (int j = 0; j < 2; j++) raw[f][j] = *(const u32*)(cell + place + 128 * j);
        };
        auto load_chunk = [&]() {
            load_field(0, places.x);
            load_field(2, places.y);
            mask = ahead->mask;
            ahead++;
            places = *(const uint2*)&ahead->places;
        };
        u32 right = descriptor_low(base);
        auto multiply = [&](const u32 (&left)[4][4]) {
            wgmma_fence();
#pragma unroll
            for (int f = 0; f < 4; f++) wgmma_width(sum, left[f], descriptor(right + 2 * f), true);
            wgmma_commit();
            right += BLOCK_BYTES / 16;
        };
        auto ready = [&](u32 (&to)[4][4]) {
            wgmma_wait<1>();  // the products of this buffer, two chunks ago
#pragma unroll
            for (int f = 0; f < 4; f++) keep(to[f]);
            // What follows from them is not computed before, over codes that are in use.
            keep(raw[0]);
            keep(raw[2]);
        };
        auto plain_step = [&](u32 (&to)[4][4]) {
            ready(to);
#pragma unroll
            for (int f = 0; f < 4; f++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    to[f][j] = raw[f & 2][j] & part(mask, f);
                    to[f][2 + j] = raw[f & 2][j] >> 8 & part(mask, f);
                }
            load_chunk();
            multiply(to);
        };
        auto general_step = [&](u32 (&to)[4][4]) {
            const Chunk* own = ahead - 1;
            load_field(1, own->places.z);
            load_field(3, own->places.w);
            const uint4 centre = own->centre, gain = own->gain;
            ready(to);
            keep(raw[1]);
            keep(raw[3]);
#pragma unroll
            for (int f = 0; f < 4; f++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    to[f][j] = cubic_bits(raw[f][j] & part(mask, f), part(centre, f), part(gain, f));
                    to[f][2 + j] = cubic_bits(raw[f][j] >> 8 & part(mask, f), part(centre, f), part(gain, f));
                }
            load_chunk();
            multiply(to);
        };
        u32 scale_codes[2] = {record[record_bytes - 80 + first], record[record_bytes - 80 + first + 8]};
        load_chunk();
        if (RANK > 0) {
            keep(sum);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++)
                wgmma_width(sum, latent[k], descriptor(right + (chunks + k / 4) * (BLOCK_BYTES / 16) + 2 * (k % 4)), k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            keep(sum);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
        }
        if (EARLY) load_latent(next);
        // The scale of a token that has none is no number below; what it is here does not matter.
        const float inverse[2] = {exp2_fast(raise + 8.0f - scale_codes[0] * 0.0625f), exp2_fast(raise + 8.0f - scale_codes[1] * 0.0625f)};
#pragma unroll
        for (int t = 0; t < WIDTH / 8; t++) {
            const float2 m = *(const float2*)(middle + column(t));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                sum[4 * t + 2 * j] = RANK > 0 ? fmaf(sum[4 * t + 2 * j], inverse[j], -m.x) : -m.x;
                sum[4 * t + 2 * j + 1] = RANK > 0 ? fmaf(sum[4 * t + 2 * j + 1], inverse[j], -m.y) : -m.y;
            }
        }
        keep(sum);
        int chunk = general & 1;
        if (chunk) general_step(codes[1]);
        for (; chunk < general; chunk += 2) {
            general_step(codes[0]);
            general_step(codes[1]);
        }
        for (; chunk + 1 < chunks; chunk += 2) {
            plain_step(codes[0]);
            plain_step(codes[1]);
        }
        if (chunk < chunks) plain_step(codes[0]);
        release();
        wgmma_wait<0>();
        keep(sum);
        if (!EARLY) load_latent(next);
        const float scale[2] = {scale_of(scale_codes[0]) * lower, scale_of(scale_codes[1]) * lower};
        u8* out = following + (long(index) * 64 + first) * WIDTH * 2;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 packed[WIDTH / 8];
#pragma unroll
            for (int t = 0; t < WIDTH / 8; t++) {
                const float2 o = *(const float2*)(middle + WIDTH + column(t));
                packed[t] = pack_half2(fmaf(sum[4 * t + 2 * j], scale[j], o.x), fmaf(sum[4 * t + 2 * j + 1], scale[j], o.y));
            }
            u8* to = out + 8 * j * WIDTH * 2;
#pragma unroll
            for (int t = 0; t + 4 <= WIDTH / 8; t += 4)
                *(uint4*)(to + column(t) * 2) = make_uint4(packed[t], packed[t + 1], packed[t + 2], packed[t + 3]);
            if (WIDTH % 32)
                *(uint2*)(to + column(WIDTH / 8 - 2) * 2) = make_uint2(packed[WIDTH / 8 - 2], packed[WIDTH / 8 - 1]);
        }
    }
#if LATE
    depend_on_previous();
    let_next_start();
#endif
}
