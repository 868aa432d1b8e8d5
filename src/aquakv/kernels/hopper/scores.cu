// Scores of one KV head's coded keys against its query heads, without reconstructing keys.
//
// Each warpgroup of a block, for itself, takes 64 tokens (a page) at a time as the 64 rows of asynchronous matrix
// products. Codes come from global memory as the registers of the left operand; the right operand, synthesis and
// latent map, stays in shared memory. Coordinates that turn by a noticeable angle within half a page (FAST of them)
// are reconstructed, rotated by their offset from the page's centre and multiplied with the query. The others hardly
// turn: their contribution is a polynomial of first order in the offset, so the query, turned back by the page's
// angle, and its derivative are multiplied into the operands once for eight pages ("absorbed": 8 columns instead of
// up to 64). What differs from page to page is read as fragments of synchronous products, so that the warps of a
// warpgroup need not wait for each other within eight pages.
//
// A token's scale belongs to its codes only. All else is divided by it before the products, and the score is
// multiplied by it after them, so that codes and latents are one chain of products.
//
// Compile-time numbers: KV_HEADS, GROUP (query heads of a KV head, at most 4), DIM, FAST, SLOW (padded to 16),
// FIELDS (of a head, at most), RANK, TEAMS (warpgroups), QUERY (0 float32, 1 float16, 2 bfloat16), SOFTCAP.

constexpr int CODE_STEPS = FIELDS;             // products of 16 slots each
constexpr int LATENT_STEPS = RANK / 16;
constexpr int STEPS = CODE_STEPS + LATENT_STEPS;
constexpr int BLOCKS = (STEPS + 3) / 4;        // of 64 slots
constexpr int TILES = FAST / 8;                // of 8 columns: first coordinates of 8 pairs, then second ones
constexpr int FAST_PAIRS = FAST / 2;
constexpr int SLOW_PAIRS = SLOW / 2;
constexpr int PAIRS = FAST_PAIRS + SLOW_PAIRS; // in tables, pairs that do not exist included
constexpr int BATCH = 8;                       // pages whose operands are made together
constexpr int TWICE = (STEPS + 1) / 2;         // two products' absorbed operands lie together

constexpr int THREADS = 128 * TEAMS;

struct Shared {
    static constexpr int synthesis = 0;                                      // [BLOCKS][TILES] atoms
    static constexpr int slow = synthesis + BLOCKS * TILES * 1024;           // [BLOCKS][8] atoms
    static constexpr int turns = slow + BLOCKS * 8 * 1024;                   // [TILES / 2][128] uint4
    static constexpr int own = turns + TILES / 2 * 2048;                     // [TEAMS][Own::bytes]
};
struct Own {
    static constexpr int absorbed = 0;                                       // uint4 [BATCH][TWICE][32]
    static constexpr int query = absorbed + BATCH * TWICE * 512;             // uint2 [BATCH][TILES / 2][4][4]
    static constexpr int polynomial = query + BATCH * TILES / 2 * 128;       // float [BATCH][4][4]
    static constexpr int bytes = polynomial + BATCH * 64;
};
struct Rest {
    static constexpr int plain_query = Shared::own + TEAMS * Own::bytes;     // float [4][PAIRS][2]
    static constexpr int offset = plain_query + 4 * PAIRS * 8;               // float [PAIRS][2]
    static constexpr int angle = offset + PAIRS * 8;                         // float [SLOW_PAIRS]
    static constexpr int fields = angle + SLOW_PAIRS * 4;                    // Field [FIELDS]
    static constexpr int turned_offset = fields + FIELDS * 32;               // u32 [4][TILES], pairs of halves
    static constexpr int barrier = turned_offset + FAST * 2;
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
    const u8* __restrict__ operands,         // [KV_HEADS] images: synthesis, slow; codes' part over 16
    const float* __restrict__ offsets,       // [KV_HEADS, PAIRS, 2]
    const Field* __restrict__ fields,        // [KV_HEADS, FIELDS]
    const int* __restrict__ pair_order,      // [PAIRS, 2] coordinates of the pairs, -1 where there is none
    const float* __restrict__ angles,        // [PAIRS] radians of 32 tokens
    const float2* __restrict__ page_turns,   // [rows, num_pages, PAIRS] cosine and sine at the page's centre
    const u8* __restrict__ offset_turns,     // [TILES / 2][128 threads]: cosines and sines of offsets, as read
    float* __restrict__ scores,              // [rows, num_pages, KV_HEADS * GROUP, 64], times log2 e
    float* __restrict__ maxima,              // [rows, KV_HEADS * GROUP, splits]
    int record_bytes, int num_pages, int splits, float scaling, float softcap) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    const int team = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 7, 0);
    const int quad = lane & 3, group = lane >> 2;
    const int head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS * TEAMS + team, row = blockIdx.y;
    u8* own = shared + Shared::own + team * Own::bytes;
    auto team_sync = [&] { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); };
    const u32 barrier = base + Rest::barrier;
    constexpr u32 synthesis_bytes = BLOCKS * TILES * 1024, slow_bytes = BLOCKS * 8 * 1024;
    constexpr u32 image_bytes = synthesis_bytes + slow_bytes;

    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_shared();
        barrier_expect(barrier, image_bytes + TILES / 2 * 2048);
        bulk_copy(base + Shared::synthesis, operands + long(head) * image_bytes, image_bytes, barrier);
        bulk_copy(base + Shared::turns, offset_turns, TILES / 2 * 2048, barrier);
    }
    for (int i = threadIdx.x; i < FIELDS * 8; i += THREADS)
        ((u32*)(shared + Rest::fields))[i] = ((const u32*)(fields + head * FIELDS))[i];
    for (int i = threadIdx.x; i < PAIRS * 2; i += THREADS)
        ((float*)(shared + Rest::offset))[i] = offsets[head * PAIRS * 2 + i];
    for (int i = threadIdx.x; i < FAST / 2; i += THREADS) {
        // Of tile t: coordinate t % 2 of the pairs 8 * (t / 2) + 2 * quad and the next.
        const int t = i % TILES;
        const float* from = offsets + (head * PAIRS + t / 2 * 8 + i / TILES * 2) * 2 + t % 2;
        ((u32*)(shared + Rest::turned_offset))[i] = pack_half2(from[0], from[2]);
    }
    for (int i = threadIdx.x; i < SLOW_PAIRS; i += THREADS)
        ((float*)(shared + Rest::angle))[i] = angles[FAST_PAIRS + i];
    depend_on_previous();
    const int length = lengths[row], used = (length + 63) >> 6;
    const int begin = int(long(split) * used / splits), end = split < splits ? int(long(split + 1) * used / splits) : begin;
    for (int i = threadIdx.x; i < 4 * PAIRS * 2; i += THREADS) {
        const int member = i / (PAIRS * 2), coordinate = pair_order[i % (PAIRS * 2)];
        float value = 0;
        if (member < GROUP && coordinate >= 0)
            value = load_query(query, (long(row * KV_HEADS + head) * GROUP + member) * DIM + coordinate);
        ((float*)(shared + Rest::plain_query))[i] = value;
    }
    __syncthreads();

    // Where this thread's tokens are: rows `first` and `first + 8` of a page.
    const int first = warp * 16 + group;
    const Field* described = (const Field*)(shared + Rest::fields);
    const u8* own_latents = latents + (long(row) * num_pages * 64 + first) * RANK * 2 + quad * 8;
    float* out = scores + (long(row) * num_pages * KV_HEADS + head) * GROUP * 64 + quad * 64 + first;
    const int* own_table = table + long(row) * num_pages;
    float largest = -INFINITY;

    u32 raw[FIELDS][2];
    u32 latent[LATENT_STEPS + (RANK == 0)][4];
    u32 scale_codes[2];
    u64 attended = 0;
    int following = 0;  // the record of the page after the one loaded
    auto load_page = [&](int page) {
        const u8* record = pages + long(following) * record_bytes;
        following = __ldg(own_table + min(page + 1, num_pages - 1));
        const u8* cells = record + first * 16 + quad * 4;
#pragma unroll
        for (int f = 0; f < FIELDS; f++) {
            const u8* cell = cells + described[f].offset;
            raw[f][0] = __ldg((const u32*)cell);
            raw[f][1] = __ldg((const u32*)(cell + 128));
        }
        const u8* tail = record + record_bytes - 80;
        scale_codes[0] = __ldg(tail + first);
        scale_codes[1] = __ldg(tail + first + 8);
        attended = __ldg((const u64*)(tail + 64));
    };
    auto load_latents = [&](int page) {
#pragma unroll
        for (int k = 0; k < LATENT_STEPS; k++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint2 v = __ldg((const uint2*)(own_latents + (long(page) * 64 + 8 * j) * RANK * 2 + k * 32));
                latent[k][j] = v.x;
                latent[k][2 + j] = v.y;
            }
    };
    if (begin < end) {
        following = __ldg(own_table + begin);
        load_page(begin);
        load_latents(begin);
    }
    barrier_wait(barrier, 0);

    for (int start = begin; start < end; start += BATCH) {
        // ---- the queries of eight pages, turned back by the pages' angles -----------------------------------
        team_sync();  // the batch before has been read
        const float* plain = (const float*)(shared + Rest::plain_query);
#pragma unroll 2
        for (int i = thread; i < BATCH * 4 * FAST_PAIRS / 2; i += 128) {
            const int couple = i % (FAST_PAIRS / 2), member = i / (FAST_PAIRS / 2) % 4, local = i / (FAST_PAIRS * 2);
            const int page = min(start + local, end - 1);
            const float4 turn = __ldg((const float4*)(page_turns + (long(row) * num_pages + page) * PAIRS + 2 * couple));
            const float4 q = *(const float4*)(plain + (member * PAIRS + 2 * couple) * 2);
            const uint2 both = make_uint2(
                pack_half2(q.x * turn.x + q.y * turn.y, q.z * turn.z + q.w * turn.w),
                pack_half2(q.y * turn.x - q.x * turn.y, q.w * turn.z - q.z * turn.w));
            *(uint2*)(own + Own::query + (((local * (TILES / 2) + couple / 4) * 4 + member) * 4 + couple % 4) * 8) = both;
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
                        const float2 o = *(const float2*)(shared + Rest::offset + (FAST_PAIRS + pair) * 8);
                        const float angle = ((const float*)(shared + Rest::angle))[pair];
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
                        ((float*)(own + Own::polynomial))[((2 * warp + j) * 4 + member) * 4 + order + 2 * m] = sum;
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
                // What this thread has are fragments of the right operands of the pages' own products.
#pragma unroll
                for (int s = 0; s < 4; s++)
                    if (4 * block + s < STEPS)
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const float* at = sum + 8 * s + 2 * j;
                            const int step = 4 * block + s;
                            *(uint2*)(own + Own::absorbed + (((2 * warp + j) * TWICE + step / 2) * 32 + lane) * 16 + step % 2 * 8) =
                                make_uint2(pack_half2(at[0], at[1]), pack_half2(at[4], at[5]));
                        }
            }
#pragma unroll
            for (int k = 0; k < SLOW / 16; k++) keep(left[k]);
        }
        team_sync();  // the operands of eight pages are there

        // ---- page by page -----------------------------------------------------------------------------------
        const int stop = min(start + BATCH, end);
        for (int page = start; page < stop; page++) {
            const int local = page - start;
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
            u32 inverse[2];
            float scale[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float one = inverse_scale(scale_codes[j]);
                inverse[j] = pack_half2(one, one);
                scale[j] = 1.0f / low_float(inverse[j]);
            }
            const bool seen[2] = {((attended >> first) & 1) != 0 && page * 64 + first < length,
                                  ((attended >> (first + 8)) & 1) != 0 && page * 64 + first + 8 < length};
            if (page + 1 < end) load_page(page + 1);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) latent[k][i] = hmul2(latent[k][i], inverse[i % 2]);

            float score[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                const uint4 right = *(const uint4*)(own + Own::absorbed + ((local * TWICE + s / 2) * 32 + lane) * 16);
                mma_8(score[0], s < CODE_STEPS ? codes[s < CODE_STEPS ? s : 0] : latent[s < CODE_STEPS ? 0 : s - CODE_STEPS], right.x, right.y);
                if (s + 1 < STEPS)
                    mma_8(score[1], s + 1 < CODE_STEPS ? codes[s + 1 < CODE_STEPS ? s + 1 : 0] : latent[s + 1 < CODE_STEPS ? 0 : s + 1 - CODE_STEPS], right.z, right.w);
            }

            float sum[FAST / 2];
            keep(sum);
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++) keep(codes[f]);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
            wgmma_fence();
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++)
                wgmma_columns(sum, codes[f], descriptor128(base + Shared::synthesis + f / 4 * TILES * 1024) + 2 * (f % 4), f > 0);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) {
                const int step = CODE_STEPS + k;
                wgmma_columns(sum, latent[k], descriptor128(base + Shared::synthesis + step / 4 * TILES * 1024) + 2 * (step % 4), true);
            }
            wgmma_commit();
            wgmma_wait<0>();
            keep(sum);
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++) keep(codes[f]);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
            if (RANK > 0 && page + 1 < end) load_latents(page + 1);

            // Rotate pairs by their tokens' offsets from the page's centre; they become the next left operand.
#pragma unroll
            for (int t = 0; t < TILES / 2; t++) {
                const uint4 turn = *(const uint4*)(shared + Shared::turns + (t * 128 + thread) * 16);
                const uint2 offset = *(const uint2*)(shared + Rest::turned_offset + (quad * TILES + 2 * t) * 4);
                u32 rotated[4];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 a = hfma2(offset.x, inverse[j], pack_half2(sum[8 * t + 2 * j], sum[8 * t + 2 * j + 1]));
                    const u32 b = hfma2(offset.y, inverse[j], pack_half2(sum[8 * t + 4 + 2 * j], sum[8 * t + 4 + 2 * j + 1]));
                    const u32 cosine = j ? turn.z : turn.x, sine = j ? turn.w : turn.y;
                    rotated[j] = hfma2(a, cosine, hmul2(b ^ 0x80008000u, sine));
                    rotated[2 + j] = hfma2(b, cosine, hmul2(a, sine));
                }
                // Odd columns of the query are zero, so that a thread's first column is its query head.
                uint2 right = make_uint2(0, 0);
                if (group % 2 == 0)
                    right = *(const uint2*)(own + Own::query + (((local * (TILES / 2) + t) * 4 + group / 2) * 4 + quad) * 8);
                mma_8(score[t % 2], rotated, right.x, right.y);
            }
            if (quad < GROUP) {
                const float4 poly = *(const float4*)(own + Own::polynomial + (local * 4 + quad) * 16);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float x = (float(first + 8 * j) - 31.5f) * (1.0f / 32.0f);
                    float s = score[0][2 * j] + score[1][2 * j];
                    s = scale[j] * fmaf(score[0][2 * j + 1] + score[1][2 * j + 1], x, s);
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
    float* parts = (float*)(own + Own::polynomial);
    if (group == 0) parts[warp * 4 + quad] = largest;
    team_sync();
    if (thread < GROUP && split < splits) {
        const float best = fmaxf(fmaxf(parts[thread], parts[4 + thread]), fmaxf(parts[8 + thread], parts[12 + thread]));
        maxima[(long(row * KV_HEADS + head) * GROUP + thread) * splits + split] = best;
    }
}
