// Sums of key codes, value codes and latents over the tokens, weighted by the softmax of the scores of all heads.
//
// A block takes a slab of up to TEAMS * TILES tiles (64 slots each) of keys or of values over a split of the pages.
// Its last warpgroup brings records, scores and latents to shared memory and makes weights of the scores, a page or
// two ahead of the others (teams), whose asynchronous products have weights as their right operand (64 tokens deep);
// codes are transposed on the way to registers, as the left operand: slots by tokens. Codes of equally spaced levels are
// multiplied where they lie, as halves below the normal ones (see `Bits`); the sums are corrected at the end. The
// products of half a tile run while the next half is unpacked, those of a page's end while the next page begins. The
// latents are one more tile of the first slab, which also sums the weights themselves.
//
// Compile-time numbers: KV_HEADS, GROUP, QUERIES (query heads padded to 8), TILES, CUBIC (the first tiles of a team,
// at least 1, whose levels may be unequally spaced), RANK, BUFFERS (of weights, at least 2), STAGES (at least as many).

constexpr int QUERY_HEADS = KV_HEADS * GROUP;
constexpr int PADDED = (GROUP + 1) / 2 * 2;        // members in the layout of the sums
constexpr int WEIGHT_BYTES = QUERIES * 128;
constexpr int SCORE_BYTES = QUERY_HEADS * 256;     // of a page
constexpr int TEAMS = 3, THREADS = 128 * (TEAMS + 1);
constexpr int ROUNDS = (QUERIES * 4 + 127) / 128;  // query heads of a thread that makes weights
constexpr int WEIGHT_REGISTERS = ROUNDS > 1 ? 80 : 56, SUM_REGISTERS = ROUNDS > 1 ? 144 : 152;  // of a thread
constexpr int LATENT_BYTES = 64 * RANK * 2;
constexpr int LATENT_CHUNKS = RANK / 8 + (RANK == 0);  // sixteen bytes each, of a token

struct Shared {
    static constexpr int scaled = 0;                                   // [BUFFERS][QUERIES] rows of 64 weights
    static constexpr int plain = scaled + BUFFERS * WEIGHT_BYTES;      // the same without the tokens' scales
    static constexpr int latents = plain + BUFFERS * WEIGHT_BYTES;     // [BUFFERS + 1][64][RANK]
    static constexpr int fields = latents + (BUFFERS + 1) * LATENT_BYTES;  // Bits [4 * TEAMS * TILES]
    static constexpr int sums = fields + 4 * TEAMS * TILES * 32;       // float [2][QUERIES]
    static constexpr int loaded = sums + 2 * QUERIES * 4;              // barriers [STAGES]: record and scores are there
    static constexpr int weighed = loaded + STAGES * 8;                // [BUFFERS]: weights and latents are there
    static constexpr int done = weighed + BUFFERS * 8;                 // [BUFFERS]: teams have left a page
    static constexpr int pages = (done + BUFFERS * 8 + 127) / 128 * 128;  // [STAGES] record and scores
};
static_assert(STAGES >= BUFFERS, "a page's stage is free once the teams have left the page BUFFERS before");

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Two of them, 512 bytes apart, where `load` says so; what is there stays otherwise. No branch, which would part
// asynchronous products.
DEVICE void load_transposed_if(bool load, u32 address, u32 (&to)[2][4]) {
    asm volatile("{.reg .pred load;\nsetp.ne.b32 load, %9, 0;\n"
                 "@load ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%8];\n"
                 "@load ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%4, %5, %6, %7}, [%8 + 512];\n}"
                 : "+r"(to[0][0]), "+r"(to[0][1]), "+r"(to[0][2]), "+r"(to[0][3]),
                   "+r"(to[1][0]), "+r"(to[1][1]), "+r"(to[1][2]), "+r"(to[1][3])
                 : "r"(address), "r"(int(load)) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) code_sum_kernel(
    const u8* __restrict__ scores,           // float [rows, num_pages, QUERY_HEADS, 64], times log2 e
    const float* __restrict__ maxima,        // [rows, QUERY_HEADS, score_splits]
    const u8* __restrict__ key_pages, const u8* __restrict__ value_pages,
    const int* __restrict__ table, const int* __restrict__ lengths,
    const u8* __restrict__ latents,          // half [rows, num_pages * 64, RANK]
    const Bits* __restrict__ fields,         // [key tiles * 4 + value tiles * 4]
    u8* __restrict__ means,                  // half [rows, splits, KV_HEADS, slots, PADDED]
    float* __restrict__ totals,              // [rows, splits, 3, QUERIES]: weights with key, value, no scales
    int key_record, int value_record, int record_room, int num_pages, int splits, int score_splits,
    int key_tiles, int value_tiles, int key_slabs, int value_slabs, int key_share, int value_share) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    const int team = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 7, 0);  // so that the compiler knows that a warp has one
    const int slabs = key_slabs + value_slabs;
    const int slab = blockIdx.x % slabs, split = blockIdx.x / slabs, row = blockIdx.y;
    const bool of_keys = slab < key_slabs, sums_latents = slab == 0;
    const u8* pages = of_keys ? key_pages : value_pages;
    const int record_bytes = of_keys ? key_record : value_record;
    // The first slab of the keys leaves room for the tile of latents.
    const int first_tile = of_keys ? max(0, slab * key_share - 1) : (slab - key_slabs) * value_share;
    const int own_tiles = min(of_keys ? key_share - (slab == 0) : value_share, (of_keys ? key_tiles : value_tiles) - first_tile);
    const int first_field = (first_tile + (of_keys ? 0 : key_tiles)) * 4;
    const int length = lengths[row], used = (length + 63) >> 6;
    const int begin = int(long(split) * used / splits), end = int(long(split + 1) * used / splits);
    const int* own_table = table + long(row) * num_pages;
    const int stage_bytes = record_room + SCORE_BYTES;
    float* weight_sums = (float*)(shared + Shared::sums);
    const Bits* described = (const Bits*)(shared + Shared::fields);

    auto fetch_record = [&](int stage, int record) {
        const u32 loaded = base + Shared::loaded + 8 * stage;
        barrier_expect(loaded, record_bytes + SCORE_BYTES);
        bulk_copy(base + Shared::pages + stage * stage_bytes, pages + long(record) * record_bytes, record_bytes, loaded);
    };
    auto fetch_scores = [&](int stage, int page) {
        bulk_copy(base + Shared::pages + stage * stage_bytes + record_room,
                  scores + (long(row) * num_pages + page) * SCORE_BYTES, SCORE_BYTES, base + Shared::loaded + 8 * stage);
    };
    const bool fetches = team == TEAMS && thread < STAGES;
    if (fetches) {
        barrier_init(base + Shared::loaded + 8 * thread, 1);
        if (thread < BUFFERS) {
            barrier_init(base + Shared::weighed + 8 * thread, 128);
            barrier_init(base + Shared::done + 8 * thread, 4 * TEAMS);
        }
        fence_shared();
        if (begin + thread < end) fetch_record(thread, own_table[begin + thread]);
    }
    for (int i = threadIdx.x; i < TEAMS * TILES * 32; i += THREADS)
        ((u32*)(shared + Shared::fields))[i] = i < own_tiles * 32 ? ((const u32*)(fields + first_field))[i] : 0;
    depend_on_previous();
    let_next_start();
    if (fetches && begin + thread < end) fetch_scores(thread, begin + thread);
    __syncthreads();

    if (team == TEAMS) {
        // ---- weights -------------------------------------------------------------------------------------------
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WEIGHT_REGISTERS));
        // This thread's: query head `member` (others in further rounds), every fourth four of tokens.
        const int member = thread >> 2, part = (thread & 3) * 4;
        const u8* own_latents = latents + long(row) * num_pages * LATENT_BYTES;
        auto fetch_latents = [&](int page, int buffer) {
            if (RANK > 0 && sums_latents && page < end) {
#pragma unroll
                for (int i = 0; i < (RANK + 15) / 16; i++) {
                    const int chunk = i * 128 + thread;
                    const u32 to = base + Shared::latents + buffer * LATENT_BYTES + latent_place<RANK>(chunk / LATENT_CHUNKS, chunk % LATENT_CHUNKS);
                    copy_chunk(to, own_latents + long(page) * LATENT_BYTES + chunk * 16);
                }
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
        };
        fetch_latents(begin, 0);
        float largest[ROUNDS], with_scales[ROUNDS], without[ROUNDS];
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            with_scales[r] = without[r] = 0;
            largest[r] = -INFINITY;
            const int head = member + 32 * r;
            if (head < QUERY_HEADS)
                for (int i = thread & 3; i < score_splits; i += 4)
                    largest[r] = fmaxf(largest[r], maxima[(long(row) * QUERY_HEADS + head) * score_splits + i]);
            for (int step = 1; step < 4; step *= 2) largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xFFFFFFFFu, largest[r], step));
            if (largest[r] == -INFINITY) largest[r] = 0;
        }
        // One step of the weights: four tokens of a query head. Exponents are 6 higher than those of the weights, to
        // keep small ones out of half precision's subnormals; those of scales have 128 / 16 too much.
        auto weigh = [&](const u8* record, int buffer, u32 scale_codes, int token, int r, bool lost) {
            const int head = member + 32 * r;
            if (head >= QUERIES) return;
            float4 score = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            if (head < QUERY_HEADS) score = *(const float4*)(record + record_room + head * 256 + token * 4);
            const float* s = &score.x;
            float w[4], p[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 code = (scale_codes >> (8 * k)) & 255u;
                w[k] = exp2_fast(fmaf(float(int(code)), 0.0625f, s[k] - (largest[r] + 2.0f)));
                // A token that is not attended to may have no scale: nothing times nothing must be nothing.
                if (lost && code == 255u && s[k] > -INFINITY) w[k] = __int_as_float(0x7FC00000);
                if (sums_latents) p[k] = exp2_fast(s[k] - (largest[r] - 6.0f));
            }
            const u32 at = buffer * WEIGHT_BYTES + swizzle128(head, token * 2);
            const uint2 rounded = make_uint2(pack_half2(w[0], w[1]), pack_half2(w[2], w[3]));
            *(uint2*)(shared + Shared::scaled + at) = rounded;
            with_scales[r] += (low_float(rounded.x) + high_float(rounded.x)) + (low_float(rounded.y) + high_float(rounded.y));
            if (sums_latents) {
                *(uint2*)(shared + Shared::plain + at) = make_uint2(pack_half2(p[0], p[1]), pack_half2(p[2], p[3]));
                without[r] += (p[0] + p[1]) + (p[2] + p[3]);
            }
        };
        int stage = 0, parity = 0, latest = 0;  // `latest`: where the newest latents are
        int buffer = 0, left = 1;               // `left`: parity of the teams' leaving what the buffer held before
        int later_record = 0;
#pragma unroll 1
        for (int page = begin; page < end; page++) {
            if (page - begin >= BUFFERS) {
                // The teams have left the page BUFFERS before: its stage, weights and latents are free.
                barrier_wait(base + Shared::done + 8 * buffer, left);
                const int later = page - BUFFERS + STAGES, free = stage >= BUFFERS ? stage - BUFFERS : stage - BUFFERS + STAGES;
                if (thread == 0 && later < end) {
                    fetch_record(free, later_record);
                    fetch_scores(free, later);
                }
            }
            if (thread == 0) later_record = __ldg(own_table + min(page + 1 - BUFFERS + STAGES, end - 1));
            latest = latest == BUFFERS ? 0 : latest + 1;
            fetch_latents(page + 1, latest);
            barrier_wait(base + Shared::loaded + 8 * stage, parity);
            const u8* record = shared + Shared::pages + stage * stage_bytes;
            auto token = [&](int i) { return (i + member & 3) * 16 + part; };  // neighbouring heads in different banks
            u32 scale_codes[4], lost = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scale_codes[i] = *(const u32*)(record + record_bytes - 80 + token(i));
                lost |= (~scale_codes[i] - 0x01010101u) & scale_codes[i] & 0x80808080u;  // a byte of 255
            }
            if (lost) {
#pragma unroll
                for (int r = 0; r < ROUNDS; r++)
#pragma unroll 1
                    for (int i = 0; i < 4; i++)
                        weigh(record, buffer, *(const u32*)(record + record_bytes - 80 + token(i)), token(i), r, true);
            } else {
#pragma unroll
                for (int r = 0; r < ROUNDS; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) weigh(record, buffer, scale_codes[i], token(i), r, false);
            }
            asm volatile("cp.async.wait_group 1;" ::: "memory");  // this page's latents
            fence_shared();
            barrier_arrive(base + Shared::weighed + 8 * buffer);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (++buffer == BUFFERS) buffer = 0, left ^= 1;
        }
        float* out_totals = totals + (long(row) * splits + split) * 3 * QUERIES;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            for (int step = 1; step < 4; step *= 2) {
                with_scales[r] += __shfl_xor_sync(0xFFFFFFFFu, with_scales[r], step);
                without[r] += __shfl_xor_sync(0xFFFFFFFFu, without[r], step);
            }
            const int head = member + 32 * r;
            if (part == 0 && head < QUERIES) {
                weight_sums[head] = with_scales[r];
                weight_sums[QUERIES + head] = without[r];
                if (slab == 0) out_totals[head] = with_scales[r], out_totals[2 * QUERIES + head] = without[r];
                if (slab == key_slabs) out_totals[QUERIES + head] = with_scales[r];
            }
        }
        __syncthreads();
        return;
    }
    // ---- sums --------------------------------------------------------------------------------------------------
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(SUM_REGISTERS));
    const int quad = lane & 3, group = lane >> 2;
    float sum[TILES][QUERIES / 2];
#pragma unroll
    for (int i = 0; i < QUERIES / 2; i++)
#pragma unroll
        for (int t = 0; t < TILES; t++) sum[t][i] = 0;
    u32 codes[4][4], raws[2][2][4];  // raw words of two tiles: of the one that is unpacked, and of the next one
    const bool adds_latents = RANK > 0 && sums_latents && team == TEAMS - 1;
    u32 own[TILES];  // where fields are and, in the highest byte, their masks
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const Bits& field = described[(t * TEAMS + team) * 4 + warp];
        own[t] = field.offset | field.mask << 24;
    }
    u32 pages_at = base + Shared::pages + lane * 16;  // of the page's stage
    auto load_codes = [&](int t, bool load) {
        load_transposed_if(load, pages_at + (own[t] & 0xFFFFFF), raws[t % 2]);
    };
    auto leave = [&](int from) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + Shared::done + 8 * from);
    };
    int stage = 0, parity = 0, latest = 0, buffer = 0, made = 0;  // `made`: parity of the buffer's weights
    auto follow = [&](int page) {  // the first words of the next page
        pages_at += stage_bytes;
        if (++stage == STAGES) stage = 0, parity ^= 1, pages_at = base + Shared::pages + lane * 16;
        if (page + 1 < end) barrier_wait(base + Shared::loaded + 8 * stage, parity);
        load_codes(0, page + 1 < end);
    };
#pragma unroll
    for (int i = 0; i < 4; i++) raws[0][0][i] = raws[0][1][i] = raws[1][0][i] = raws[1][1][i] = 0;
    if (begin < end) barrier_wait(base + Shared::loaded, 0);
    load_codes(0, begin < end);
#pragma unroll 1
    for (int page = begin; page < end; page++) {
        barrier_wait(base + Shared::weighed + 8 * buffer, made);
        const u32 scaled = descriptor_low(base + Shared::scaled) + buffer * (WEIGHT_BYTES / 16);
        const u32 plain = descriptor_low(base + Shared::plain) + buffer * (WEIGHT_BYTES / 16);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            // No branch may part products that are under way: what a team lacks of the last tiles it multiplies as zeros.
            const bool of_latents = t == TILES - 1 && adds_latents;
            u32 (&raw)[2][4] = raws[t % 2];
            if (t + 1 < TILES) load_codes(t + 1, true);
            else if (TILES % 2 == 0) follow(page);
            u32 mask;
            asm("prmt.b32 %0, %1, 0, 0x4343;" : "=r"(mask) : "r"(own[t]));
            u32 centre = 0, gain = 0;
            if (t < CUBIC) load_shared(base + Shared::fields + ((t * TEAMS + team) * 4 + warp) * 32 + 8, centre, gain);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                wgmma_wait<1>();  // the products of this half of the tile before
                keep(codes[2 * half]);
                keep(codes[2 * half + 1]);
                keep(raw[half]);  // what follows from them is not computed before, over codes that are in use
                // With them the last products of the page before have ended.
                if (t == 0 && half == 1 && page > begin) leave(buffer > 0 ? buffer - 1 : BUFFERS - 1);
                if (of_latents) {
#pragma unroll
                    for (int k = 2 * half; k < 2 * half + 2; k++) {
                        codes[k][0] = codes[k][1] = codes[k][2] = codes[k][3] = 0;
                        if (warp * 16 < RANK) {
                            const int from = 16 * k + (lane & 7) + ((lane >> 4) << 3);
                            load_transposed(base + Shared::latents + latest * LATENT_BYTES + latent_place<RANK>(from, 2 * warp + ((lane >> 3) & 1)), codes[k]);
                            // What nobody attends to may be no number: nothing times a finite number is nothing. What
                            // is attended to and no number has no score either, so that its weight says so.
#pragma unroll
                            for (int i = 0; i < 4; i++) codes[k][i] = finite_half2(codes[k][i]);
                        }
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        codes[2 * half + i / 2][i % 2 * 2] = raw[half][i] & mask;
                        codes[2 * half + i / 2][i % 2 * 2 + 1] = raw[half][i] >> 8 & mask;
                    }
                    if (t < CUBIC && gain) {
#pragma unroll
                        for (int k = 2 * half; k < 2 * half + 2; k++)
#pragma unroll
                            for (int i = 0; i < 4; i++) codes[k][i] = cubic_bits(codes[k][i], centre, gain);
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int k = 2 * half; k < 2 * half + 2; k++)
                    wgmma_queries(sum[t], codes[k], descriptor((of_latents ? plain : scaled) + 2 * k), true);
                wgmma_commit();
            }
        }
        if (TILES % 2) follow(page);
        if (++buffer == BUFFERS) buffer = 0, made ^= 1;
        latest = latest == BUFFERS ? 0 : latest + 1;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < TILES; t++) keep(sum[t]);
    __syncthreads();  // the sums of the weights are there
    // ---- means -------------------------------------------------------------------------------------------------
    const int slots = (key_tiles + value_tiles) * 64 + RANK;
    const int first_slot = (first_tile + (of_keys ? 0 : key_tiles)) * 64;
    u8* out = means + (long(row) * splits + split) * KV_HEADS * slots * PADDED * 2;
    auto store = [&](int slot, int query, float x, float y) {
        if (GROUP % 2 == 0) {
            if (query < QUERY_HEADS)
                *(u32*)(out + ((query / GROUP * slots + slot) * PADDED + query % GROUP) * 2) = pack_half2(x, y);
        } else {
            const u32 both = pack_half2(x, y);
            if (query < QUERY_HEADS)
                *(unsigned short*)(out + ((query / GROUP * slots + slot) * PADDED + query % GROUP) * 2) = (unsigned short)both;
            query++;
            if (query < QUERY_HEADS)
                *(unsigned short*)(out + ((query / GROUP * slots + slot) * PADDED + query % GROUP) * 2) = (unsigned short)(both >> 16);
        }
    };
#pragma unroll
    for (int i = 0; i < QUERIES / 8; i++) {
        const int query = 8 * i + 2 * quad;
        const float2 weight = *(const float2*)(weight_sums + query);
        const float x = weight.x > 0 ? 1.0f / weight.x : weight.x, y = weight.y > 0 ? 1.0f / weight.y : weight.y;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int tile = t * TEAMS + team;
            if (tile < own_tiles) {
                const float factor = described[tile * 4 + warp].factor, middle = described[tile * 4 + warp].middle;
                auto level = [&](float sum, float weight) { return fmaf(sum, factor, -middle * weight); };
                const int slot = first_slot + tile * 64 + warp * 16 + 2 * group;
                const float a = level(sum[t][4 * i], weight.x) * x, b = level(sum[t][4 * i + 1], weight.y) * y;
                const float c = level(sum[t][4 * i + 2], weight.x) * x, d = level(sum[t][4 * i + 3], weight.y) * y;
                if (GROUP == 4) {
                    // Neighbouring threads have two members of a KV head each: one takes the slot, one the next.
                    const u32 here = pack_half2(a, b), next = pack_half2(c, d);
                    const u32 other = __shfl_xor_sync(0xFFFFFFFFu, quad & 1 ? here : next, 1);
                    if (query < QUERY_HEADS)
                        *(uint2*)(out + (query / 4 * slots + slot + (quad & 1)) * 8) = quad & 1 ? make_uint2(other, next) : make_uint2(here, other);
                } else {
                    store(slot, query, a, b);
                    store(slot + 1, query, c, d);
                }
            } else if (t == TILES - 1 && adds_latents && warp * 16 < RANK) {
                const float2 mass = *(const float2*)(weight_sums + QUERIES + query);
                const float u = mass.x > 0 ? 1.0f / mass.x : mass.x, v = mass.y > 0 ? 1.0f / mass.y : mass.y;
                const int slot = (key_tiles + value_tiles) * 64 + warp * 16 + group;
                store(slot, query, sum[t][4 * i] * u, sum[t][4 * i + 1] * v);
                store(slot + 8, query, sum[t][4 * i + 2] * u, sum[t][4 * i + 3] * v);
            }
        }
    }
}
