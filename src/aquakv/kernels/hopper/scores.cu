// Scores of one KV head's coded keys against its query heads, without reconstructing keys.
//
// Each warpgroup of a block, for itself, takes 64 tokens (a page) at a time as the 64 rows of asynchronous matrix
// products. Each of its warps copies the codes and latents of its own 16 tokens to shared memory a page ahead; they
// become the registers of the left operand. The right operand, synthesis and latent map, stays in shared memory.
// Coordinates that turn by a noticeable angle within half a page (FAST of them) are reconstructed, rotated by their
// offset from the page's centre and multiplied with the query. The others hardly turn: their contribution is a
// polynomial of first order in the offset, so the query, turned back by the page's angle, and its derivative are
// multiplied into the operands once for eight pages ("absorbed": 8 columns instead of up to 64). The warps of a
// warpgroup wait for each other twice in eight pages. While a page's products run, the page before is rotated.
//
// A token's scale belongs to its codes only. All else is divided by it before the products, and the score is
// multiplied by it after them, so that codes and latents are one chain of products.
//
// Compile-time numbers: KV_HEADS, GROUP (query heads of a KV head, at most 4), DIM, FAST, SLOW (padded to 16),
// FIELDS and PLANES (of a head, at most), CUBIC (the first fields, which alone may have cubic levels), EXACT (the
// first fields, which alone may need their codes before they are centred), LOADS (bit f: field f is not in the plane of
// field f + 1, with some head), RANK (0 or a power of two), TEAMS
// (warpgroups), QUERY (0 float32, 1 float16, 2 bfloat16), SOFTCAP.

constexpr int CODE_STEPS = FIELDS;             // products of 16 slots each
constexpr int LATENT_STEPS = RANK / 16;
constexpr int STEPS = CODE_STEPS + LATENT_STEPS;
constexpr int BLOCKS = (STEPS + 3) / 4;        // of 64 slots
constexpr int TILES = FAST / 8;                // of 8 columns: first coordinates of 8 pairs, then second ones
constexpr int FAST_PAIRS = FAST / 2;
constexpr int SLOW_PAIRS = SLOW / 2;
constexpr int PAIRS = FAST_PAIRS + SLOW_PAIRS; // in tables, pairs that do not exist included
constexpr int QUERY_BLOCKS = (FAST + 63) / 64;
constexpr int BATCH = 8;                       // pages whose operands are made together
constexpr int SLOTS = BATCH + 1;               // pages whose queries are there: the last of a batch is late

constexpr int THREADS = 128 * TEAMS;
constexpr int CODE_CHUNKS = PLANES * 16 + 2;   // of 16 bytes, for 16 tokens: planes, scales, attended bits
constexpr int CODE_ROUNDS = (CODE_CHUNKS + 31) / 32;
constexpr int LATENT_CHUNKS = RANK / 8 > 0 ? RANK / 8 : 1;  // of a token
constexpr int OFFSET_ROUNDS = (8 * 64 + THREADS - 1) / THREADS, QUERY_ROUNDS = (4 * PAIRS * 2 + THREADS - 1) / THREADS;
constexpr int WARP_BYTES = (16 * RANK * 2 + CODE_CHUNKS * 16 + 127) / 128 * 128;

struct Shared {
    static constexpr int synthesis = 0;                                      // [BLOCKS][TILES] atoms
    static constexpr int slow = synthesis + BLOCKS * TILES * 1024;           // [BLOCKS][8] atoms
    static constexpr int turns = slow + BLOCKS * 8 * 1024;                   // [TILES / 2][128] uint4
    static constexpr int slow_offset = turns + TILES / 2 * 2048;             // one atom
    static constexpr int own = slow_offset + 1024;                           // [TEAMS][Own::bytes]
};
struct Own {
    static constexpr int absorbed = 0;                                       // [BATCH][BLOCKS] atoms
    static constexpr int query = absorbed + BATCH * BLOCKS * 1024;           // [SLOTS][QUERY_BLOCKS] atoms
    static constexpr int polynomial = query + SLOTS * QUERY_BLOCKS * 1024;    // float [SLOTS][4][4]
    static constexpr int turns = polynomial + SLOTS * 64;                    // float2 [BATCH][PAIRS]
    static constexpr int warps = (turns + BATCH * PAIRS * 8 + 127) / 128 * 128;  // [4][WARP_BYTES]: latents, codes
    static constexpr int bytes = (warps + 4 * WARP_BYTES + 1023) / 1024 * 1024;
};
struct Rest {
    static constexpr int fast_query = Shared::own + TEAMS * Own::bytes;      // float [4][FAST_PAIRS][2]
    static constexpr int slow_query = fast_query + 4 * FAST_PAIRS * 8;       // float [4][2: derivative][SLOW_PAIRS][2]
    static constexpr int fields = slow_query + 8 * SLOW_PAIRS * 8;           // Field [FIELDS]
    static constexpr int fast_offset = fields + FIELDS * 32;                 // u32 [4][TILES], pairs of halves
    static constexpr int barrier = fast_offset + FAST * 2;
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
    const Field* __restrict__ fields,        // [KV_HEADS, FIELDS], offsets among the head's own planes
    const int* __restrict__ planes,          // [KV_HEADS, PLANES] bytes from the page to the plane, -1: no plane
    const int* __restrict__ pair_order,      // [PAIRS, 2] coordinates of the pairs, -1 where there is none
    const float* __restrict__ angles,        // [PAIRS] radians of 32 tokens
    const float2* __restrict__ page_turns,   // [rows, num_pages, PAIRS] cosine and sine at the page's centre
    const u8* __restrict__ offset_turns,     // [TILES / 2][128 threads]: cosines and sines of offsets, as read
    float* __restrict__ scores,              // [rows, num_pages, KV_HEADS * GROUP, 64], times log2 e
    float* __restrict__ maxima,              // [rows, KV_HEADS * GROUP, splits]
    int record_bytes, int num_pages, int splits, float query_factor, float softcap) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared);
    asm volatile("" : "+r"(base));  // computed once
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    const int team = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 7, 0);
    const int quad = lane & 3, group = lane >> 2;
    const int head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS * TEAMS + team, row = blockIdx.y;
    u8* own = shared + Shared::own + team * Own::bytes;
    const u32 own_base = base + Shared::own + team * Own::bytes;
    auto team_sync = [&] { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); };
    const u32 barrier = base + Rest::barrier;
    constexpr u32 synthesis_bytes = BLOCKS * TILES * 1024, slow_bytes = BLOCKS * 8 * 1024;
    constexpr u32 image_bytes = synthesis_bytes + slow_bytes;
    const int length = __ldg(lengths + row);
    // All that is read of tables, asked for at once.
    const u32 field_word = threadIdx.x < FIELDS * 8 ? __ldg((const u32*)(fields + head * FIELDS) + threadIdx.x) : 0;
    int plane[CODE_ROUNDS];
#pragma unroll
    for (int i = 0; i < CODE_ROUNDS; i++)
        plane[i] = 32 * i + lane < PLANES * 16 ? __ldg(planes + head * PLANES + (32 * i + lane) / 16) : -1;
    float slow_offsets[OFFSET_ROUNDS], slow_angles[OFFSET_ROUNDS], fast_offsets[2];
#pragma unroll
    for (int k = 0; k < OFFSET_ROUNDS; k++) {
        const int i = threadIdx.x + k * THREADS, column = i / 64, coordinate = i % 64;
        const bool there = column < 4 && coordinate < SLOW;
        slow_offsets[k] = there ? __ldg(offsets + (head * PAIRS + FAST_PAIRS) * 2 + coordinate) : 0;
        slow_angles[k] = there ? __ldg(angles + FAST_PAIRS + coordinate / 2) : 0;
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        // Of tile t: coordinate t % 2 of the pairs 8 * (t / 2) + 2 * quad and the next.
        const int t = threadIdx.x % TILES, pair = t / 2 * 8 + threadIdx.x / TILES * 2 + k;
        fast_offsets[k] = threadIdx.x < FAST / 2 ? __ldg(offsets + (head * PAIRS + pair) * 2 + t % 2) : 0;
    }
    int query_places[QUERY_ROUNDS];
    float query_angles[QUERY_ROUNDS];
#pragma unroll
    for (int k = 0; k < QUERY_ROUNDS; k++) {
        const int i = threadIdx.x + k * THREADS, member = i / (PAIRS * 2);
        query_places[k] = member < GROUP ? __ldg(pair_order + i % (PAIRS * 2)) : -1;
        query_angles[k] = __ldg(angles + i % (PAIRS * 2) / 2);
    }
    const int used = (length + 63) >> 6;
    const int begin = int(long(split) * used / splits), end = split < splits ? int(long(split + 1) * used / splits) : begin;
    const int* own_table = table + long(row) * num_pages;

    const int last_page = max(end - 1, 0);

    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_shared();
        barrier_expect(barrier, image_bytes + TILES / 2 * 2048);
        bulk_copy(base + Shared::synthesis, operands + long(head) * image_bytes, image_bytes, barrier);
        bulk_copy(base + Shared::turns, offset_turns, TILES / 2 * 2048, barrier);
    }
    // The same number, by a way that the compiler does not see through: kept in a register, where it would be computed
    // anew for every page.
    auto pinned = [&](u32 x) { return __shfl_sync(0xFFFFFFFFu, x, lane); };
    // What this thread copies of every page: chunks of its warp's tokens.
    const u32 own_latents_at = own_base + Own::warps + warp * WARP_BYTES, own_codes_at = own_latents_at + 16 * RANK * 2;
    int source[CODE_ROUNDS];
#pragma unroll
    for (int i = 0; i < CODE_ROUNDS; i++) {
        const int chunk = 32 * i + lane;
        source[i] = -1;
        if (chunk < PLANES * 16) {
            if (plane[i] >= 0) source[i] = plane[i] + (warp * 16 + chunk % 16) * 16;
        } else if (chunk == PLANES * 16) {
            source[i] = record_bytes - 80 + warp * 16;
        } else if (chunk == PLANES * 16 + 1) {
            source[i] = record_bytes - 16;
        }
        asm volatile("" : "+r"(source[i]));
    }
    int following = begin < end ? __ldg(own_table + begin) : 0;  // record of the next page to copy
    const u32 codes_to = pinned(own_codes_at + lane * 16);
    auto copy_codes = [&] {
        const u8* record = pages + long(following) * record_bytes;
#pragma unroll
        for (int i = 0; i < CODE_ROUNDS; i++)
            if (source[i] >= 0) copy_chunk(codes_to + 512 * i, record + source[i]);
    };
    const u8* next_latents = latents + (long(row) * num_pages * 64 + long(begin) * 64 + warp * 16) * RANK * 2 + lane * 16;
    const u32 latents_to = pinned(own_latents_at + latent_place<RANK>(lane / LATENT_CHUNKS, lane % LATENT_CHUNKS));
    auto copy_latents = [&] {
#pragma unroll
        for (int i = 0; i < RANK / 16; i++)  // RANK is a power of two; with 64 every other four tokens differ in place
            copy_chunk((latents_to ^ (RANK == 64 && i % 2 ? 64 : 0)) + i * 512, next_latents + i * 512);
        next_latents += 64 * RANK * 2;
    };
    auto copy_turns = [&](int start) {
        for (int i = thread; i < BATCH * PAIRS / 2; i += 128) {
            const int page = min(start + i / (PAIRS / 2), last_page);
            copy_chunk(own_base + Own::turns + i * 16, page_turns + (long(row) * num_pages + page) * PAIRS + i % (PAIRS / 2) * 2);
        }
    };
    if (begin < end) copy_codes();
    following = __ldg(own_table + min(begin + 1, last_page));
    if (threadIdx.x < FIELDS * 8) ((u32*)(shared + Rest::fields))[threadIdx.x] = field_word;
    // Offsets of slow coordinates as columns of a right operand: as they are and times minus the square of the angle,
    // each as a half and what it leaves.
#pragma unroll
    for (int k = 0; k < OFFSET_ROUNDS; k++) {
        const int i = threadIdx.x + k * THREADS, column = i / 64, coordinate = i % 64;
        float value = slow_offsets[k] * (column < 2 ? 1.0f : -slow_angles[k] * slow_angles[k]);
        if (column % 2) value -= low_float(pack_half2(value, value));
        if (i < 8 * 64)
            *(unsigned short*)(shared + Shared::slow_offset + swizzle128(column, coordinate * 2)) = (unsigned short)pack_half2(value, value);
    }
    if (threadIdx.x < FAST / 2) ((u32*)(shared + Rest::fast_offset))[threadIdx.x] = pack_half2(fast_offsets[0], fast_offsets[1]);
    // Odd columns of the query stay zero, so that a thread's first column is its query head.
    for (int i = thread; i < SLOTS * QUERY_BLOCKS * 256; i += 128) ((u32*)(own + Own::query))[i] = 0;
    depend_on_previous();
    if (begin < end) {
        copy_latents();
        copy_turns(begin);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    float query_values[QUERY_ROUNDS];
#pragma unroll
    for (int k = 0; k < QUERY_ROUNDS; k++) {
        const int member = (threadIdx.x + k * THREADS) / (PAIRS * 2), place = query_places[k];
        query_values[k] = place >= 0 ? load_query(query, (long(row * KV_HEADS + head) * GROUP + member) * DIM + place) : 0;
    }
#pragma unroll
    for (int k = 0; k < QUERY_ROUNDS; k++) {
        const int i = threadIdx.x + k * THREADS, member = i / (PAIRS * 2), pair = i % (PAIRS * 2) / 2, which = i % 2;
        const float value = query_factor * query_values[k];
        if (member >= 4) break;
        if (pair < FAST_PAIRS) {
            ((float*)(shared + Rest::fast_query))[(member * FAST_PAIRS + pair) * 2 + which] = value;
        } else {
            // The derivative by the offset: turned by a right angle, times the pair's angle.
            const float angle = query_angles[k];
            float* to = (float*)(shared + Rest::slow_query) + (member * 2 * SLOW_PAIRS + pair - FAST_PAIRS) * 2;
            to[which] = value;
            to[2 * SLOW_PAIRS + 1 - which] = which ? angle * value : -angle * value;
        }
    }
    __syncthreads();

    // Where this thread's tokens are: rows `first` and `first + 8` of a page.
    const int first = pinned(warp * 16 + group);
    const u32 described = base + Rest::fields;
    constexpr int PAGE_SCORES = KV_HEADS * GROUP * 64;
    float* out = scores + ((long(row) * num_pages + begin) * KV_HEADS + head) * GROUP * 64 + quad * 64 + first;
    float largest = -INFINITY;

    barrier_wait(barrier, 0);

    const u32 synthesis = descriptor_low(base + Shared::synthesis);
    const u32 absorbed_by_page = descriptor_low(own_base + Own::absorbed), query_by_page = descriptor_low(own_base + Own::query);
    const u32 latents_from = pinned(own_latents_at + latent_place<RANK>(lane & 15, lane >> 4));
    // What this thread reads of every page and of tables, in shared memory.
    const u32 cells = pinned(own_codes_at + group * 16 + quad * 4);
    const u32 offsets_at = pinned(base + Rest::fast_offset + quad * TILES * 4);
    const u32 tails = pinned(own_codes_at + PLANES * 256 + group);
    const u32 turns_at = pinned(base + Shared::turns + thread * 16);
    auto slot_of = [&](int page) {
        const int turn = (page - begin) & (2 * BATCH - 1);
        return turn == 2 * BATCH - 1 ? BATCH : turn & (BATCH - 1);
    };
    // Of the page before: coordinates as pairs of halves, part of the slow ones, scale, whether tokens are seen.
    u32 coordinates[TILES / 2][4], inverse[2] = {0, 0};
    float smooth[4] = {0, 0, 0, 0}, scale[2] = {0, 0}, score[4];
    u32 seen = 0;  // bits 0 and 8
#pragma unroll
    for (int t = 0; t < TILES / 2; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) coordinates[t][i] = 0;
    auto multiply_query = [&](int page) {
        // Rotate pairs by their tokens' offsets from the page's centre; they become the next left operand.
#pragma unroll
        for (int t = 0; t < TILES / 2; t++) {
            uint4 turn;
            load_shared(turns_at + t * 2048, turn.x, turn.y, turn.z, turn.w);
            uint2 offset;
            load_shared(offsets_at + 8 * t, offset.x, offset.y);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 a = hfma2(offset.x, inverse[j], coordinates[t][j]), b = hfma2(offset.y, inverse[j], coordinates[t][2 + j]);
                const u32 cosine = j ? turn.z : turn.x, sine = j ? turn.w : turn.y;
                coordinates[t][j] = hfma2(a, cosine, hneg2(hmul2(b, sine)));
                coordinates[t][2 + j] = hfma2(b, cosine, hmul2(a, sine));
            }
        }
        const u32 right = query_by_page + slot_of(page) * QUERY_BLOCKS * 64;
        keep(score);
#pragma unroll
        for (int t = 0; t < TILES / 2; t++) keep(coordinates[t]);
        wgmma_fence();
#pragma unroll
        for (int t = 0; t < TILES / 2; t++) wgmma_8(score, coordinates[t], descriptor(right + t / 4 * 64 + 2 * (t % 4)), t > 0);
        wgmma_commit();
    };
    // What its products and scales say of a page's scores, and the rest, which is put off until other products run.
    float coded[2] = {0, 0};
    u32 coded_seen = 0;
    auto settle = [&] {
        keep(score);
#pragma unroll
        for (int t = 0; t < TILES / 2; t++) keep(coordinates[t]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x = (float(first + 8 * j) - 31.5f) * (1.0f / 32.0f);
            coded[j] = scale[j] * fmaf(smooth[2 * j + 1], x, smooth[2 * j] + score[2 * j]);
        }
        coded_seen = seen;
    };
    auto finish = [&](int page, bool there) {
        if (quad < GROUP) {
            u32 p[4];
            load_shared(own_base + Own::polynomial + (slot_of(page) * 4 + quad) * 16, p[0], p[1], p[2], p[3]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float x = (float(first + 8 * j) - 31.5f) * (1.0f / 32.0f);
                const float high = fmaf(__uint_as_float(p[3]), x, __uint_as_float(p[2]));
                float s = coded[j] + fmaf(fmaf(high, x, __uint_as_float(p[1])), x, __uint_as_float(p[0]));
#if SOFTCAP
                s = softcap * 1.4426950408889634f * tanhf(s / softcap);
#endif
                s = coded_seen >> (8 * j) & 1 ? s : -INFINITY;
                if (there) {
                    out[8 * j] = s;
                    largest = fmaxf(largest, s);
                }
            }
        }
        if (there) out += PAGE_SCORES;
    };

    for (int start = begin; start < end; start += BATCH) {
        // ---- the queries of eight pages, turned back by the pages' angles -----------------------------------
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        team_sync();  // the batch before has been read, the pages' turns are there
#pragma unroll 2
        for (int i = thread; i < BATCH * 4 * FAST_PAIRS / 2; i += 128) {
            const int couple = i % (FAST_PAIRS / 2), member = i / (FAST_PAIRS / 2) % 4, local = i / (FAST_PAIRS * 2);
            const float4 turn = *(const float4*)(own + Own::turns + (local * PAIRS + 2 * couple) * 8);
            const float4 q = *(const float4*)(shared + Rest::fast_query + (member * FAST_PAIRS + 2 * couple) * 8);
            const uint2 both = make_uint2(
                pack_half2(q.x * turn.x + q.y * turn.y, q.z * turn.z + q.w * turn.w),
                pack_half2(q.y * turn.x - q.x * turn.y, q.w * turn.z - q.z * turn.w));
            const int column = couple / 4 * 16 + couple % 4 * 2, slot = slot_of(start + local);
            u8* to = own + Own::query + (slot * QUERY_BLOCKS + column / 64) * 1024;
            *(u32*)(to + swizzle128(2 * member, column % 64 * 2)) = both.x;
            *(u32*)(to + swizzle128(2 * member, column % 64 * 2 + 16)) = both.y;
        }
        {
            // Rows of this product: page 2 * warp + j, column `group`: query head, and order of the derivative.
            u32 left[SLOW / 16][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int k = 0; k < SLOW / 16; k++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int pair = 8 * k + 4 * h + quad;
                        const float2 turn = *(const float2*)(own + Own::turns + ((2 * warp + j) * PAIRS + FAST_PAIRS + pair) * 8);
                        const float2 q = *(const float2*)(shared + Rest::slow_query + (group * SLOW_PAIRS + pair) * 8);
                        left[k][2 * h + j] = pack_half2(q.x * turn.x + q.y * turn.y, q.y * turn.x - q.x * turn.y);
                    }
            u32 places[8];
#pragma unroll
            for (int t = 0; t < 8; t++) {
                places[t] = own_base + Own::absorbed + 2 * warp * BLOCKS * 1024 + swizzle128(group, t * 16 + quad * 4);
                asm volatile("" : "+r"(places[t]));
            }
            float constant[4];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                float sum[32];
                const u64 right = descriptor128(base + Shared::slow + block * 8192);
                keep(sum);
                if (block == 0) keep(constant);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < SLOW / 16; k++) wgmma_64(sum, left[k], right + 2 * k, k > 0);
                if (block == 0)
#pragma unroll
                    for (int k = 0; k < SLOW / 16; k++) wgmma_8(constant, left[k], descriptor128(base + Shared::slow_offset) + 2 * k, k > 0);
                wgmma_commit();
                wgmma_wait<0>();
                keep(sum);
                if (block == 0) keep(constant);
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int t = 0; t < 8; t++)
                        store_shared(places[t] + (j * BLOCKS + block) * 1024, pack_half2(sum[t * 4 + 2 * j], sum[t * 4 + 2 * j + 1]));
            }
#pragma unroll
            for (int k = 0; k < SLOW / 16; k++) keep(left[k]);
            // Coefficients of orders 0 and 1 by quad 0, of 2 and 3 by quad 1: cosine and sine go on from them.
            if (quad < 2)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float factor = quad == 0 ? 1.0f : group & 1 ? 1.0f / 6.0f : 0.5f;
                    const int place = slot_of(start + 2 * warp + j) * 16 + (group >> 1) * 4 + (group & 1) + 2 * quad;
                    ((float*)(own + Own::polynomial))[place] = (constant[2 * j] + constant[2 * j + 1]) * factor;
                }
        }
        fence_shared();
        team_sync();  // the operands of eight pages are there
        if (start + BATCH < end) copy_turns(start + BATCH);

        // ---- page by page -----------------------------------------------------------------------------------
        const int stop = min(start + BATCH, end);
        for (int page = start; page < stop; page++) {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            __syncwarp();  // the warp's codes and latents are there
            u32 scale_codes[2], attended;
            load_shared_byte(tails, scale_codes[0]);
            load_shared_byte(tails + 8, scale_codes[1]);
            load_shared(own_codes_at + PLANES * 256 + 16 + (warp >> 1) * 4, attended);
            attended >>= first & 31;
            const u32 absorbed = absorbed_by_page + (page - start) * BLOCKS * 64;
            float sum[FAST / 2], still[4];
            u32 codes[CODE_STEPS][4], latent[LATENT_STEPS + (RANK == 0)][4], words[2];
            keep(sum);
            keep(still);
            auto multiply = [&](const u32 (&left)[4], int step, bool add) {
                wgmma_columns(sum, left, descriptor(synthesis + step / 4 * TILES * 64 + 2 * (step % 4)), add);
                wgmma_8(still, left, descriptor(absorbed + step / 4 * 64 + 2 * (step % 4)), add);
            };
            // From the last field to the first, whose levels take longest: the products of half the fields run while
            // the other half is unpacked, and theirs while the latents are scaled and the next page is asked for.
#pragma unroll
            for (int part = 1; part >= 0; part--) {
                constexpr int HALF = CODE_STEPS / 2;
#pragma unroll
                for (int f = CODE_STEPS - 1; f >= 0; f--) {
                    if ((f >= HALF) != (part == 1)) continue;
                    // In this order: all descriptions at once are more than registers hold.
                    Field field;
                    load_shared(described + 32 * f, field.offset, field.mask, field.unit, field.centre);
                    if (f < CUBIC) load_shared(described + 32 * f + 16, field.gain);
                    if (LOADS >> f & 1) {
                        load_shared(cells + field.offset, words[0]);
                        load_shared(cells + field.offset + 128, words[1]);
                    }
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        u32 low, high;
                        if (f < EXACT) unpack_centred(words[j], field, low, high);
                        else unpack_at_once(words[j], field, low, high);
                        if (f < CUBIC) low = cubic(low, field.gain), high = cubic(high, field.gain);
                        codes[f][j] = low;
                        codes[f][2 + j] = high;
                    }
                    keep(codes[f]);
                }
                wgmma_fence();
#pragma unroll
                for (int f = CODE_STEPS - 1; f >= 0; f--)
                    if ((f >= HALF) == (part == 1)) multiply(codes[f], f, f < CODE_STEPS - 1);
                wgmma_commit();
                if (part == 1) finish(page - 2, page - 2 >= begin && page > start);
            }
            u32 own_inverse[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float one = inverse_scale(scale_codes[j]);
                own_inverse[j] = pack_half2(one, one);
            }
            if (RANK > 0) {
#pragma unroll
                for (int k = 0; k < LATENT_STEPS; k++) load_matrices(latents_from ^ (k << 5), latent[k]);
#pragma unroll
                for (int k = 0; k < LATENT_STEPS; k++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) latent[k][i] = hmul2(latent[k][i], own_inverse[i % 2]);
                    keep(latent[k]);
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < LATENT_STEPS; k++) multiply(latent[k], CODE_STEPS + k, true);
                wgmma_commit();
            }
            __syncwarp();  // codes and latents have been read
            if (page + 1 < end) {
                copy_codes();
                copy_latents();
            }
            following = __ldg(own_table + min(page + 2, last_page));
            asm volatile("cp.async.commit_group;" ::: "memory");
            multiply_query(page - 1);
            wgmma_wait<0>();
            keep(sum);
            keep(still);
#pragma unroll
            for (int f = 0; f < CODE_STEPS; f++) keep(codes[f]);
#pragma unroll
            for (int k = 0; k < LATENT_STEPS; k++) keep(latent[k]);
            settle();
#pragma unroll
            for (int t = 0; t < TILES / 2; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) coordinates[t][i] = pack_half2(sum[8 * t + 4 * (i / 2) + 2 * (i % 2)], sum[8 * t + 4 * (i / 2) + 2 * (i % 2) + 1]);
#pragma unroll
            for (int i = 0; i < 4; i++) smooth[i] = still[i];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                inverse[j] = own_inverse[j];
                scale[j] = reciprocal(low_float(inverse[j]));
            }
            const int tokens = length - (page * 64 + first);  // from this thread's first one on
            seen = attended & (tokens > 0 ? tokens > 8 ? 0x101u : 1u : 0u);
        }
        finish(stop - 2, stop - 2 >= begin);  // before its polynomial's place is taken
    }
    if (begin < end) {
        multiply_query(end - 1);
        wgmma_wait<0>();
        settle();
        finish(end - 1, true);
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
