// What the kernels ask of a GPU beyond plain C++, and x as they take it. A test replaces the first part by one of a
// CPU's (tests/kernels/emulated.h).

typedef unsigned int u32;
typedef unsigned short u16;

struct __align__(16) Four {
    u32 at[4];
};
struct __align__(8) Two {
    u32 at[2];
};

#ifndef EMULATED
#define SM90 (__CUDA_ARCH__ >= 900)

// Copies of 4, 8 or 16 bytes into a block's memory that need no registers while they are on their way: a thread waits for
// its own, all but the LEFT groups that it committed last.
template <int BYTES> __device__ __forceinline__ void copy(void* to, const void* from) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
            : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
            ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES)
            : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void await() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ u32 permuted(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }
__device__ __forceinline__ void halves(u32 word, float& low, float& high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(word));
}
__device__ __forceinline__ u32 halves_of(float low, float high) {
    u32 found;
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
        : "=r"(found) : "f"(low), "f"(high));
    return found;
}
// Two float16 less two others.
__device__ __forceinline__ u32 less(u32 two, u32 others) {
    asm("sub.f16x2 %0, %0, %1;" : "+r"(two) : "r"(others));
    return two;
}
// sum += a b for a [16, 16] and b [16, 8] in float16: a thread (g, t) = (lane / 4, lane % 4) has rows g and g + 8 of a,
// column g of b, and of both 4 of the 16 in between, any that are the same in both; of the sum rows g (0, 1) and g + 8
// (2, 3) at columns 2 t and 2 t + 1.
__device__ __forceinline__ void multiply(float* sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 from_lane_bits(u32 value, int away) { return __shfl_xor_sync(~0u, value, away); }

// Programmatic dependent launch. `fetch` brings bytes (a multiple of 16) into the second-level cache, which may be done
// before the launch ahead has ended: whatever it still writes there is written there.
__device__ __forceinline__ void fetch(const void* place, u32 bytes) {
#if SM90
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(place), "r"(bytes));
#endif
}
__device__ __forceinline__ void await_launch_ahead() {
#if SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
    // After the wait: what starts now may read all that was written two launches ahead of it.
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

extern __shared__ Four pool[];
#endif

// --- numbers ------------------------------------------------------------------------------------

// Numbers of x and y are 16 bits: float16, or bfloat16 with BFLOAT.
__device__ __forceinline__ float half_of(u32 bits) {
    float low, high;
    halves(bits, low, high);
    return low;
}
__device__ __forceinline__ void store(u16* out, float value) {
    if (!BFLOAT) {
        *out = halves_of(value, 0);
    } else {
        const u32 bits = as_bits(value);
        *out = value != value ? 0x7FFF : bits + 0x7FFF + (bits >> 16 & 1) >> 16;
    }
}
// Bytes `e` and `e` + 2 of four codes, less LESS, as two float16, exactly.
__device__ __forceinline__ u32 pair_of(u32 codes, int e) {
    constexpr u32 zero = 0x6400 + LESS;  // the bits of 1024 + LESS
    return less(permuted(codes, 0x64646464, e ? 0x4341 : 0x4240), zero | zero << 16);
}
// Byte i of a word as a float, exactly.
__device__ __forceinline__ float byte_of(u32 word, int i) {
    return as_float(permuted(word, 0x4B000000, 0x7440 + i)) - 8388608.f;
}
// COUNT words of two bfloat16 each as float16, times a power of two that makes the largest that any lane of each 2^LANES
// has just fit; what the sums have to be multiplied by.
template <int COUNT, int LANES> __device__ __forceinline__ float scaled(u32* words) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) most = max(most, max(words[i] & 0x7FFF, words[i] >> 16 & 0x7FFF));
#pragma unroll
    for (int away = 1; away < 1 << LANES; away *= 2) most = max(most, from_lane_bits(most, away));
    const int exponent = min(max((int)(most >> 7), 15), 254);
    const float up = as_float(268 - exponent << 23);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        words[i] = halves_of(as_float(words[i] << 16) * up, as_float(words[i] & 0xFFFF0000u) * up);
    return as_float(exponent - 14 << 23);
}
