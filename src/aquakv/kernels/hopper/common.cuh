// What the Hopper kernels share: half-precision pairs in 32-bit registers, unpacking of byte planes, shared-memory
// descriptors and asynchronous copies. Compiled at run time, without any header.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// ---- pairs of halves ----------------------------------------------------------------------------------------

DEVICE u32 pack_half2(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE u32 hadd2(u32 a, u32 b) { u32 d; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 hmul2(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 hfma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 hneg2(u32 a) { u32 d; asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a)); return d; }
// Infinity and not-a-number become the largest numbers.
DEVICE u32 finite_half2(u32 a) {
    u32 d;
    asm("{.reg .b32 t; max.f16x2 t, %1, %2; min.f16x2 %0, t, %3;}" : "=r"(d) : "r"(a), "r"(0xFBFFFBFFu), "r"(0x7BFF7BFFu));
    return d;
}
DEVICE float low_float(u32 a) {
    float d;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(d) : "r"(a));
    return d;
}
DEVICE float high_float(u32 a) {
    float d;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(d) : "r"(a));
    return d;
}
DEVICE float reciprocal(float x) { float d; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x)); return d; }
DEVICE float exp2_fast(float x) { float d; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x)); return d; }

// ---- codes --------------------------------------------------------------------------------------------------

// One field of 16 coefficients, as the host describes it.
struct __align__(16) Field {
    u32 offset;    // bytes from the page to the plane
    u32 mask;      // the field's bits, in each of four bytes
    u32 unit;      // 2^-shift, twice
    u32 centre;    // minus the code that is level 0, twice
    u32 gain;      // cubic over linear coefficient of the levels, twice; 0: equally spaced
    u32 unused[3];
};

// The field's bits of a word's bytes 0 and 1, 2 and 3 as halves, each plus 1024.
DEVICE void raised(u32 word, const Field& f, u32& first, u32& second) {
    const u32 bits = word & f.mask;
    asm("prmt.b32 %0, %1, %2, 0x4140;" : "=r"(first) : "r"(bits), "r"(0x64646464u));
    asm("prmt.b32 %0, %1, %2, 0x4342;" : "=r"(second) : "r"(bits), "r"(0x64646464u));
}
// Four codes to two pairs of levels.
DEVICE void unpack_centred(u32 word, const Field& f, u32& first, u32& second) {
    u32 a, b;
    raised(word, f, a, b);
    // In two steps: 1024 plus half a code is no half-precision number.
    first = hfma2(hadd2(a, 0xE400E400u), f.unit, f.centre);
    second = hfma2(hadd2(b, 0xE400E400u), f.unit, f.centre);
}
// The same in one step, where 1024 plus the centre is a half-precision number: the field's `centre` is minus both.
DEVICE void unpack_at_once(u32 word, const Field& f, u32& first, u32& second) {
    u32 a, b;
    raised(word, f, a, b);
    first = hfma2(a, f.unit, f.centre);
    second = hfma2(b, f.unit, f.centre);
}
DEVICE u32 cubic(u32 x, u32 gain) { return hmul2(x, hfma2(hmul2(x, x), gain, 0x3C003C00u)); }

// One field of 16 coefficients whose codes are used where they lie: what is left of the bits 0 to 7 of a half is the
// number code * 2^(shift - 24), below the normal ones, which products take as it is. Bytes 0 and 2 of a word are two
// of them; bytes 1 and 3 are, once the word is shifted by 8.
struct __align__(16) Bits {
    u32 offset;    // bytes from the page to the plane
    u32 mask;      // the field's bits, in bytes 0 and 2
    u32 centre;    // minus 2^(shift - 9) times the code that is level 0, twice
    u32 gain;      // 2^(18 - 2 shift) times the cubic over linear coefficient of the levels, twice; 0: equally spaced
    float factor;  // levels over what stands for them: 2^(24 - shift) times codes, or 2^(9 - shift)
    float middle;  // the code that is level 0, where levels are equally spaced; 0 where they are not
    u32 unused[2];
};
static_assert(sizeof(Bits) == 32, "the host counts on it");

// Two codes to what stands for their unequally spaced levels: 2^(shift - 9) times the levels.
DEVICE u32 cubic_bits(u32 bits, u32 centre, u32 gain) { return cubic(hfma2(bits, 0x78007800u, centre), gain); }

DEVICE float scale_of(u32 code) {
    return code == 255u ? __int_as_float(0x7FC00000) : exp2f((float(int(code)) - 128.0f) * 0.0625f);
}
// One over sixteen times the scale, so that what it multiplies is far from the ends of half precision.
DEVICE float inverse_scale(u32 code) {
    const float inverse = exp2_fast(fmaf(float(int(code)), -0.0625f, 4.0f));
    return code == 255u ? __int_as_float(0x7FC00000) : inverse;
}

// ---- shared memory and asynchronous products ----------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

DEVICE void load_shared(u32 address, u32& a) { asm volatile("ld.shared.b32 %0, [%1];" : "=r"(a) : "r"(address)); }
DEVICE void store_shared(u32 address, u32 a) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(a) : "memory"); }
DEVICE void load_shared_byte(u32 address, u32& a) { asm volatile("ld.shared.u8 %0, [%1];" : "=r"(a) : "r"(address)); }
DEVICE void load_shared(u32 address, u32& a, u32& b) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(address));
}
DEVICE void load_shared(u32 address, u32& a, u32& b, u32& c, u32& d) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address));
}
// Four matrices of 8 rows of 16 bytes, one row's address from each thread.
DEVICE void load_matrices(u32 address, u32 (&to)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address));
}
// The same, each transposed.
DEVICE void load_transposed(u32 address, u32 (&to)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
// A product of 16 by 16 and 16 by 8, at once.
DEVICE void multiply_add(float (&sum)[4], const u32 (&left)[4], u32 right, u32 other) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right), "r"(other));
}

// Where a sixteen-byte chunk of a token's latent lies: exchanged so that eight tokens lie in different banks.
template <int RANKS>
DEVICE u32 latent_place(u32 token, u32 chunk) {
    constexpr u32 CHUNKS = RANKS / 8 > 0 ? RANKS / 8 : 1, PER = CHUNKS >= 8 ? 1 : 8 / CHUNKS;
    return token * (RANKS * 2) + ((chunk ^ (token / PER % CHUNKS)) << 4);
}
DEVICE void copy_chunk(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Rows of 128 bytes, 8 rows to an atom of 1024, sixteen-byte chunks exchanged by the row's number.
DEVICE u32 swizzle128(u32 row, u32 byte) { return row * 128 + (byte ^ ((row & 7) << 4)); }
// A right operand's descriptor: the part with the address, to which sixteenths of bytes may be added, and the rest.
DEVICE u32 descriptor_low(u32 address) { return ((address & 0x3FFFF) >> 4) | (1u << 16); }
DEVICE u64 descriptor(u32 low) { return u64(low) | (u64(1024 >> 4 | 1u << 30) << 32); }
DEVICE u64 descriptor128(u32 address) { return descriptor(descriptor_low(address)); }
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
template <int N>
DEVICE void keep(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
DEVICE void keep(u32 (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(registers[i])::"memory");
}
DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
DEVICE void depend_on_previous() {
#ifdef DEPENDENT
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#ifdef DEPENDENT
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
