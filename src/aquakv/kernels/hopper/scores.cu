// Scores of one KV head's coded keys against its query heads, without reconstructing keys.
//
// Each of three warpgroups of a block, for itself, takes 64 tokens (a page) at a time as the 64 rows of asynchronous
// matrix products. Codes come from
// global memory as the registers of the left operand; the right operand, synthesis and latent map, stays in shared
// memory. Coordinates that turn by a noticeable angle within half a page (FAST of them) are reconstructed, rotated
// by their offset from the page's centre and multiplied with the query. The others hardly turn: their contribution
// is a polynomial of first order in the offset, so the query, turned back by the page's angle, and its derivative
// are multiplied into the operands once for eight pages ("absorbed": 8 columns instead of up to 64).
//
// Compile-time numbers: KV_HEADS, GROUP (query heads of a KV head, at most 4), DIM, FAST, SLOW (padded to 16),
// FIELDS (of a head, at most), RANK, QUERY (0 float32, 1 float16, 2 bfloat16), SOFTCAP.

constexpr int CODE_STEPS = FIELDS;             // products of 16 slots each
constexpr int LATENT_STEPS = RANK / 16;
constexpr int STEPS = CODE_STEPS + LATENT_STEPS;
constexpr int BLOCKS = (STEPS + 3) / 4;        // of 64 slots
constexpr int TILES = FAST / 8;                // of 8 columns: first coordinates of 8 pairs, then second ones
constexpr int COLUMNS = FAST + 8;              // and the absorbed tile
constexpr int FAST_PAIRS = FAST / 2;
constexpr int SLOW_PAIRS = SLOW / 2;
constexpr int PAIRS = FAST_PAIRS + SLOW_PAIRS; // in tables, pairs that do not exist included
constexpr int QUERY_BLOCKS = (FAST + 63) / 64;
constexpr int BATCH = 8;                       // pages whose absorbed operands are made together

constexpr int TEAMS = 3, THREADS = 128 * TEAMS;
constexpr int OWN_BYTES = (BLOCKS * (TILES + 1) + BATCH * BLOCKS + BATCH * QUERY_BLOCKS + 1) * 1024;

struct Shared {
    static constexpr int slow = 0;                                           // [BLOCKS][8] atoms
    static constexpr int own = slow + BLOCKS * 8 * 1024;                     // [TEAMS][OWN_BYTES], then:
    static constexpr int plain_query = own + TEAMS * OWN_BYTES;              // float [4][PAIRS][2]
    static constexpr int offset = plain_query + 4 * PAIRS * 8;               // float [PAIRS][2]
    static constexpr int angle = offset + PAIRS * 8;                         // float [SLOW_PAIRS]
    static constexpr int fields = angle + SLOW_PAIRS * 4;                    // Field [FIELDS]
    static constexpr int turned_offset = fields + FIELDS * 32;               // float [FAST], in tiles
    static constexpr int barrier = turned_offset + FAST * 4;
    // A warpgroup's own:
    static constexpr int synthesis = 0;                                      // [BLOCKS][TILES + 1] atoms
    static constexpr int absorbed = BLOCKS * (TILES + 1) * 1024;             // [BATCH][BLOCKS] atoms
    static constexpr int query = absorbed + BATCH * BLOCKS * 1024;           // [BATCH][QUERY_BLOCKS] atoms
    static constexpr int polynomial = query + BATCH * QUERY_BLOCKS * 1024;   // float [BATCH][4][4]
};

DEVICE float load_query(const void* query, long index) {
#if QUERY == 0
    return ((const float*)query)[index];
#elif QUERY == 1
    return low_float(((const unsigned short*)query)[index]);
#else
    return __uint_as_float(u32(((const unsigned short*)query)[index]) << 16);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) scores_kernel(
    const void* __restrict__ query,          // [rows, KV_HEADS * GROUP, DIM]
    const u8* __restrict__ pages,            // [records, record_bytes]
    const int* __restrict__ table,           // [rows, num_pages]
    const int* __restrict__ lengths,         // [rows]
    const u8* __restrict__ latents,          // half [rows, num_pages * 64, RANK]
    const u8* __restrict__ operands,         // [KV_HEADS] images: synthesis, slow
    const float* __restrict__ offsets,       // [KV_HEADS, PAIRS, 2]
    const Field* __restrict__ fields,        // [KV_HEADS, FIELDS]
    const int* __restrict__ pair_order,      // [PAIRS, 2] coordinates of the pairs, -1 where there is none
    const float* __restrict__ angles,        // [PAIRS] radians of 32 tokens
    const float2* __restrict__ page_turns,   // [rows, num_pages, PAIRS] cosine and sine at the page's centre
    const u32* __restrict__ offset_turns,    // [64, FAST_PAIRS / 2, 2] pairs of halves: cosines, sines of offsets
    float* __restrict__ scores,              // [rows, num_pages, KV_HEADS * GROUP, 64], times log2 e
    float* __restrict__ maxima,              // [rows, KV_HEADS * GROUP, splits]
    int record_bytes, int num_pages, int splits, float scaling, float softcap) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    const int thread = threadIdx.x & 127, team = threadIdx.x >> 7, lane = thread & 31, warp = thread >> 5;
    const int quad = lane & 3, group = lane >> 2;
    const int head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS * TEAMS + team, row = blockIdx.y;
    u8* own = shared + Shared::own + team * OWN_BYTES;
    const u32 own_base = base + Shared::own + team * OWN_BYTES;
    auto team_sync = [&] { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); };
    const u32 barrier = base + Shared::barrier;
    constexpr u32 synthesis_bytes = BLOCKS * (TILES + 1) * 1024, slow_bytes = BLOCKS * 8 * 1024;
    constexpr u32 image_bytes = synthesis_bytes + slow_bytes;

    if (threadIdx.x == 0) {
        const u8* image = operands + long(head) * image_bytes;
        barrier_init(barrier, 1);
        fence_shared();
        barrier_expect(barrier, TEAMS * synthesis_bytes + slow_bytes);
        for (int t = 0; t < TEAMS; t++)
            bulk_copy(base + Shared::own + t * OWN_BYTES + Shared::synthesis, image, synthesis_bytes, barrier);
        bulk_copy(base + Shared::slow, image + synthesis_bytes, slow_bytes, barrier);
    }
    for (int i = threadIdx.x; i < FIELDS * 8; i += THREADS)
        ((u32*)(shared + Shared::fields))[i] = ((const u32*)(fields + head * FIELDS))[i];
    for (int i = threadIdx.x; i < PAIRS * 2; i += THREADS)
        ((float*)(shared + Shared::offset))[i] = offsets[head * PAIRS * 2 + i];
    for (int i = threadIdx.x; i < FAST; i += THREADS)
        ((float*)(shared + Shared::turned_offset))[i] = offsets[(head * PAIRS + i / 16 * 8 + i % 8) * 2 + i / 8 % 2];
    for (int i = threadIdx.x; i < SLOW_PAIRS; i += THREADS)
        ((float*)(shared + Shared::angle))[i] = angles[FAST_PAIRS + i];
    // Odd columns of the query stay zero, so that a thread's first column is its query head.
    for (int i = thread; i < BATCH * QUERY_BLOCKS * 256; i += 128) ((u32*)(own + Shared::query))[i] = 0;
    depend_on_previous();
    const int length = lengths[row], used = (length + 63) >> 6;
    const int begin = int(long(split) * used / splits), end = split < splits ? int(long(split + 1) * used / splits) : begin;
    for (int i = threadIdx.x; i < 4 * PAIRS * 2; i += THREADS) {
        const int member = i / (PAIRS * 2), coordinate = pair_order[i % (PAIRS * 2)];
        float value = 0;
        if (member < GROUP && coordinate >= 0)
            value = load_query(query, (long(row * KV_HEADS + head) * GROUP + member) * DIM + coordinate);
        ((float*)(shared + Shared::plain_query))[i] = value;
    }
    __syncthreads();

    // Where this thread's tokens are: rows `first` and `first + 8` of a page.
    const int first = warp * 16 + group;
    u32 turns[TILES / 2][2][2];
#pragma unroll
    for (int t = 0; t < TILES / 2; t++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // Cosines, then sines, of two neighbouring pairs.
            const uint2 both = *(const uint2*)(offset_turns + ((first + 8 * j) * (FAST_PAIRS / 2) + 4 * t + quad) * 2);
            turns[t][j][0] = both.x;
            turns[t][j][1] = both.y;
        }
    const Field* described = (const Field*)(shared + Shared::fields);
    const u8* own_latents = latents + (long(row) * num_pages * 64 + first) * RANK * 2 + quad * 8;
    float* out = scores + (long(row) * num_pages * KV_HEADS + head) * GROUP * 64 + quad * 64 + first;
    const int* own_table = table + long(row) * num_pages;
    float largest = -INFINITY;

    u32 raw[FIELDS][2];
    u32 scale_codes[2];
    u64 attended = 0;
    auto load_page = [&](int page) {
        const u8* record = pages + long(own_table[page]) * record_bytes;
#pragma unroll
        for (int f = 0; f < FIELDS; f++) {
            const u8* cell = record + described[f].offset + first * 16 + quad * 4;
            raw[f][0] = __ldg((const u32*)cell);
            raw[f][1] = __ldg((const u32*)(cell + 128));
        }
        const u8* tail = record + record_bytes - 80;
        scale_codes[0] = __ldg(tail + first);
        scale_codes[1] = __ldg(tail + first + 8);
        attended = __ldg((const u64*)(tail + 64));
    };
    if (begin < end) load_page(begin);
    barrier_wait(barrier, 0);

    for (int start = begin; start < end; start += BATCH) {
        // ---- the queries of eight pages, turned back by the pages' angles -----------------------------------
        team_sync();  // the batch before has been read
        const float* plain = (const float*)(shared + Shared::plain_query);
        for (int i = thread; i < BATCH * 4 * FAST_PAIRS; i += 128) {
            const int pair = i % FAST_PAIRS, member = i / FAST_PAIRS % 4, local = i / (FAST_PAIRS * 4);
            const int page = min(start + local, end - 1);
            const float2 turn = __ldg(page_turns + (long(row) * num_pages + page) * PAIRS + pair);
            const float a = plain[(member * PAIRS + pair) * 2], b = plain[(member * PAIRS + pair) * 2 + 1];
            const int column = pair / 8 * 16 + pair % 8;
            u8* to = own + Shared::query + (local * QUERY_BLOCKS + column / 64) * 1024;
            const u32 both = pack_half2(a * turn.x + b * turn.y, b * turn.x - a * turn.y);
            *(unsigned short*)(to + swizzle128(2 * member, column % 64 * 2)) = (unsigned short)both;
            *(unsigned short*)(to + swizzle128(2 * member, (column % 64 + 8) * 2)) = (unsigned short)(both >> 16);
        }
        {
            // Rows of this product: page 2 * warp + j, column `group`: query head, and order of the derivative.
            const int member = group >> 1, order = group & 1;
            u32 left[SLOW / 16][4];
            float sums[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int page = min(start + 2 * warp + j, end - 1);
                const float2* page_turn = page_turns + (long(row) * num_pages + page) * PAIRS + FAST_PAIRS;
#pragma unroll
                for (int k = 0; k < SLOW / 16; k++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int pair = 8 * k + 4 * h + quad;
                        const float2 turn = __ldg(page_turn + pair);
                        const float2 q = *(const float2*)(plain + (member * PAIRS + FAST_PAIRS + pair) * 2);
                        const float2 o = *(const float2*)(shared + Shared::offset + (FAST_PAIRS + pair) * 8);
                        const float angle = ((const float*)(shared + Shared::angle))[pair];
                        const float a = q.x * turn.x + q.y * turn.y, b = q.y * turn.x - q.x * turn.y;
                        const float u = order ? angle * b : a, v = order ? -angle * a : b;
                        left[k][2 * h + j] = pack_half2(u, v);
                        const float term = u * o.x + v * o.y;
                        sums[j][0] += term;
                        sums[j][1] -= term * angle * angle * (order ? 1.0f / 6.0f : 0.5f);
                    }
            }
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    float sum = sums[j][m];
                    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
                    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
                    if (quad == 0)
                        ((float*)(own + Shared::polynomial))[((2 * warp + j) * 4 + member) * 4 + order + 2 * m] = sum;
                }
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                float sum[32];
                const u64 right = descriptor128(base + Shared::slow + block * 8192);
                keep(sum);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < SLOW / 16; k++) wgmma_64(sum, left[k], right + 2 * k, k > 0);
                wgmma_commit();
                wgmma_wait<0>();
                keep(sum);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u8* to = own + Shared::absorbed + ((2 * warp + j) * BLOCKS + block) * 1024;
#pragma unroll
                    for (int t = 0; t < 8; t++)
                        *(u32*)(to + swizzle128(group, t * 16 + quad * 4)) = pack_half2(sum[t * 4 + 2 * j], sum[t * 4 + 2 * j + 1]);
                }
            }
#pragma unroll
            for (int k = 0; k < SLOW / 16; k++) keep(left[k]);
        }

        // ---- page by page -----------------------------------------------------------------------------------
        const int stop = min(start + BATCH, end);
        for (int page = start; page < stop; page++) {
            const int local = page - start;
            u32 latent[LATENT_STEPS + (RANK == 0)][4];
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint2 v = __ldg((const uint2*)(own_latents + (long(page) * 64 + 8 * j) * RANK * 2 + k * 32));
                    latent[k][j] = v.x;
                    latent[k][2 + j] = v.y;
                }
            team_sync();  // the operands of eight pages are there; the page before has been multiplied
            for (int i = thread; i < BLOCKS * 64; i += 128)
                *(uint4*)(own + Shared::synthesis + (i / 64 * (TILES + 1) + TILES) * 1024 + i % 64 * 16) =
                    *(const uint4*)(own + Shared::absorbed + local * BLOCKS * 1024 + i * 16);
            fence_shared();
            u32 codes[CODE_STEPS][4];
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++) {
                const Field field = described[f];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u32 low, high;
                    unpack_centred<true>(raw[f][j], field, low, high);
                    if (field.gain) low = cubic(low, field.gain), high = cubic(high, field.gain);
                    codes[f][j] = low;
                    codes[f][2 + j] = high;
                }
            }
            const float scale[2] = {scale_of(scale_codes[0]), scale_of(scale_codes[1])};
            const bool seen[2] = {((attended >> first) & 1) != 0 && page * 64 + first < length,
                                  ((attended >> (first + 8)) & 1) != 0 && page * 64 + first + 8 < length};
            if (page + 1 < end) load_page(page + 1);
            team_sync();

            float sum[COLUMNS / 2];
            keep(sum);
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++) keep(codes[f]);
            wgmma_fence();
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++)
                wgmma_columns(sum, codes[f], descriptor128(own_base + Shared::synthesis + f / 4 * (TILES + 1) * 1024) + 2 * (f % 4), f > 0);
            wgmma_commit();
            wgmma_wait<0>();
            keep(sum);
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++) keep(codes[f]);
#pragma unroll
            for (int t = 0; t <= TILES; t++) {
                float2 o = make_float2(0, 0);
                if (t < TILES) o = *(const float2*)(shared + Shared::turned_offset + (8 * t + 2 * quad) * 4);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    sum[4 * t + 2 * j] = fmaf(sum[4 * t + 2 * j], scale[j], o.x);
                    sum[4 * t + 2 * j + 1] = fmaf(sum[4 * t + 2 * j + 1], scale[j], o.y);
                }
            }
            if (RANK > 0) {
                keep(sum);
#pragma unroll
                for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < LATENT_STEPS; k++) {
                    const int step = CODE_STEPS + k;
                    wgmma_columns(sum, latent[k], descriptor128(own_base + Shared::synthesis + step / 4 * (TILES + 1) * 1024) + 2 * (step % 4), true);
                }
                wgmma_commit();
                wgmma_wait<0>();
                keep(sum);
#pragma unroll
                for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
            }
            // Rotate pairs by their tokens' offsets from the page's centre; they become the next left operand.
            u32 rotated[TILES / 2][4];
#pragma unroll
            for (int t = 0; t < TILES / 2; t++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 a = pack_half2(sum[8 * t + 2 * j], sum[8 * t + 2 * j + 1]);
                    const u32 b = pack_half2(sum[8 * t + 4 + 2 * j], sum[8 * t + 4 + 2 * j + 1]);
                    rotated[t][j] = hfma2(a, turns[t][j][0], hmul2(b ^ 0x80008000u, turns[t][j][1]));
                    rotated[t][2 + j] = hfma2(b, turns[t][j][0], hmul2(a, turns[t][j][1]));
                }
            float score[4];
            keep(score);
#pragma unroll
            for (int k = 0; k < TILES / 2; k++) keep(rotated[k]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TILES / 2; k++)
                wgmma_8(score, rotated[k], descriptor128(own_base + Shared::query + (local * QUERY_BLOCKS + k / 4) * 1024) + 2 * (k % 4), k > 0);
            wgmma_commit();
            const float4 poly = *(const float4*)(own + Shared::polynomial + (local * 4 + quad) * 16);
            wgmma_wait<0>();
            keep(score);
#pragma unroll
            for (int k = 0; k < TILES / 2; k++) keep(rotated[k]);
            if (quad < GROUP) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float x = (float(first + 8 * j) - 31.5f) * (1.0f / 32.0f);
                    float s = score[2 * j] + fmaf(sum[4 * TILES + 2 * j + 1], x, sum[4 * TILES + 2 * j]);
                    s += fmaf(fmaf(fmaf(poly.w, x, poly.z), x, poly.y), x, poly.x);
                    s *= scaling;
#if SOFTCAP
                    s = softcap * tanhf(s / softcap);
#endif
                    s = seen[j] ? s * 1.4426950408889634f : -INFINITY;
                    out[long(page) * (KV_HEADS * GROUP * 64) + 8 * j] = s;
                    largest = fmaxf(largest, s);
                }
            }
        }
    }
    let_next_start();
#pragma unroll
    for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    team_sync();
    float* parts = (float*)(own + Shared::polynomial);
    if (group == 0) parts[warp * 4 + quad] = largest;
    team_sync();
    if (thread < GROUP && split < splits) {
        const float best = fmaxf(fmaxf(parts[thread], parts[4 + thread]), fmaxf(parts[8 + thread], parts[12 + thread]));
        maxima[(long(row * KV_HEADS + head) * GROUP + thread) * splits + split] = best;
    }
}
