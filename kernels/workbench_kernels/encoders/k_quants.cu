// Q2_K, Q3_K, Q4_K, Q5_K and Q6_K blocks made on a CUDA GPU: the arithmetic of k_quants.py and search.py, operation by
// operation, a thread a run of 16 or 32 weights. Those two say what is computed and from where it comes; here is why it
// is the same to the last bit:
//
// - compiled without fused multiply-adds (--fmad=false), with IEEE division and square root and with denormal numbers;
// - a thread has its run in registers and sums it weight by weight; what is summed over a block, one thread sums;
// - a search does not keep the best codes, but what they were made of, and makes them again at its end;
// - codes are whole numbers in floats, which add and compare as integers do.
//
// A block goes through four steps with a desk of shared memory: `search`, `recode` and `pack` by all of its threads,
// `settle` by one or two. Nothing here needs a GPU but the kernel at the end: tests compile the rest for a processor.
//
// Which type (K_QUANT, 2 to 6) and whether with importances (IMPORTANCES, 0 or 1) the compiler is told, so that a
// program is one kernel.

#ifdef __CUDACC_RTC__
#define INSIDE __device__ __forceinline__
#define UNROLLED _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#else
#include <math.h>
#include <string.h>
#define INSIDE inline
#define UNROLLED
#define ROLLED
#endif

typedef unsigned char byte;

template <int KIND> struct Type {
    static constexpr bool OFFSET = KIND == 2 || KIND == 4 || KIND == 5;  // scale x code - least
    static constexpr int RUN = KIND == 4 || KIND == 5 ? 32 : 16;
    static constexpr int RUNS = 256 / RUN;
    static constexpr int BYTES = KIND == 2 ? 84 : KIND == 3 ? 110 : KIND == 4 ? 144 : KIND == 5 ? 176 : 210;
    static constexpr int LEVELS = KIND == 2 ? 3 : KIND == 3 ? 4 : KIND == 4 ? 15 : KIND == 5 ? 31 : 32;
    static constexpr int TOP = KIND == 2 ? 15 : 63;  // of the codes of scales and leasts
};

struct Desk {
    float scale[16], least[16], share[16];  // of the runs: as found, and the sum of their weights' weights
    byte scale_code[16], least_code[16];
    unsigned short d, dmin;  // float16
    byte codes[256];
};

// --- numbers --------------------------------------------------------------------------------------

INSIDE unsigned bits_of(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INSIDE float float_of(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INSIDE bool infinite(float value) { return (bits_of(value) & 0x7FFFFFFF) == 0x7F800000; }

// `nearest` of search.py as a float, from -2^22 on: the lower 23 bits as the fraction of a number from 2^23 on.
INSIDE float nearest(float value) {
    return float_of((bits_of(value + 12582912.0f) & 0x7FFFFF) | 0x4B000000) - 12582912.0f;
}

INSIDE float within(float value, float low, float high) { return fminf(fmaxf(value, low), high); }

// A whole number as the byte that a cast makes of it.
INSIDE float as_byte(float whole) { return (float)((int)whole & 255); }

INSIDE unsigned short half_of(float value) {
    unsigned sign = bits_of(value) >> 16 & 0x8000, size = bits_of(value) & 0x7FFFFFFF;
    if (size >= 0x47800000) return sign | (size > 0x7F800000 ? 0x7E00 : 0x7C00);
    // Below 2^-14 a float16 is a multiple of 2^-24, as is a float from 0.5 to 1: adding 0.5 rounds to one.
    if (size < 0x38800000) return sign | (bits_of(float_of(size) + 0.5f) - 0x3F000000);
    return sign | ((size + 0xFFF + (size >> 13 & 1) - 0x38000000) >> 13);
}

// Of finite numbers.
INSIDE float from_half(unsigned short half) {
    unsigned size = half & 0x7FFF;
    float value = size < 0x400 ? size * 0x1p-24f : float_of((size << 13) + 0x38000000);
    return half & 0x8000 ? -value : value;
}

// `inverse` of search.py.
INSIDE float inverse(float levels, float size) {
    float found = levels / size;
    return infinite(found) ? 0.0f : found;
}

template <int N> INSIDE float first_largest(const float *x) {
    float largest = 0.0f;
    UNROLLED for (int i = 0; i < N; i++)
        if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
    return largest;
}

template <int N> INSIDE float total(const float *x) {
    float sum = 0.0f;
    UNROLLED for (int i = 0; i < N; i++) sum += x[i];
    return sum;
}

// --- searches: those of search.py, by name ----------------------------------------------------------

constexpr float EPSILON = 1e-15f;

// Codes from 0 on into `codes`; returns the scale.
template <int N> INSIDE float signed_fit(const float *x, const float *weights, float levels, byte *codes) {
    float largest = first_largest<N>(x);
    if (fabsf(largest) < EPSILON) {
        UNROLLED for (int i = 0; i < N; i++) codes[i] = 0;
        return 0.0f;
    }
    float scale = 0.0f, best = 0.0f, best_reach = 0.0f;
    ROLLED for (int trial = 0; trial < 19; trial++) {
        int step = trial == 0 ? 0 : trial < 10 ? trial - 10 : trial - 9;
        float reach = -(levels + 0.1f * step) / largest, products = 0.0f, norms = 0.0f;
        UNROLLED for (int i = 0; i < N; i++) {
            float code = within(nearest(x[i] * reach), -levels, levels - 1);
            products += weights[i] * x[i] * code;
            norms += weights[i] * code * code;
        }
        if (trial == 0) {
            best_reach = reach;
            scale = norms == 0.0f ? 0.0f : products / norms;
            best = scale * products;
        } else if (norms > 0.0f && products * products > best * norms) {
            best_reach = reach;
            scale = products / norms;
            best = scale * products;
        }
    }
    UNROLLED for (int i = 0; i < N; i++)
        codes[i] = (byte)(int)(within(nearest(x[i] * best_reach), -levels, levels - 1) + levels);
    return scale;
}

// `_rounds` of search.py. BYTES: codes have no lowest number and are kept as bytes. Changes codes, returns their scale.
template <int N, bool BYTES>
INSIDE float rounds(const float *x, const float *weights, float *codes, float low, float high) {
    float products = 0.0f, norms = 0.0f;
    UNROLLED for (int i = 0; i < N; i++) {
        products += weights[i] * x[i] * codes[i];
        norms += weights[i] * codes[i] * codes[i];
        if (BYTES) codes[i] = as_byte(codes[i]);
    }
    ROLLED for (int round = 0; round < 5; round++) {
        UNROLLED for (int i = 0; i < N; i++) {
            float code = codes[i], weighted = weights[i] * x[i];
            float less = products - weighted * code, norm_less = norms - weights[i] * code * code;
            if (!(less > 0.0f)) continue;
            float moved = fminf(nearest(x[i] * norm_less / less), high);
            if (!BYTES) moved = fmaxf(moved, low);
            float more = less + weighted * moved, norm_more = norm_less + weights[i] * moved * moved;
            if (moved == code || !((BYTES ? norm_less : norm_more) > 0.0f)) continue;
            if (!(more * more * norms > products * products * norm_more)) continue;
            codes[i] = BYTES ? as_byte(moved) : moved;
            products = more;
            norms = norm_more;
        }
    }
    return norms > 0.0f ? products / norms : 0.0f;
}

template <int N> INSIDE float descended(const float *x, float levels, byte *codes) {
    float largest = first_largest<N>(x);
    bool empty = fabsf(largest) < EPSILON;
    float weights[N], found[N], reach = -levels / largest, scale = 0.0f;
    if (!empty) {
        UNROLLED for (int i = 0; i < N; i++) {
            weights[i] = x[i] * x[i];
            found[i] = within(nearest(x[i] * reach), -levels, levels - 1);
        }
        scale = rounds<N, false>(x, weights, found, -levels, levels - 1);
    }
    UNROLLED for (int i = 0; i < N; i++) codes[i] = empty ? 0 : (byte)(int)(found[i] + levels);
    return scale;
}

// Codes into `codes`, the scale and the least of the run into `scale` and `least`.
template <int N, bool ABSOLUTE>
INSIDE void offset(const float *x, const float *weights, float levels, float start, float step, int steps, byte *codes,
                   float *scale_out, float *least_out) {
    float low = x[0], high = x[0], sum_w = weights[0], sum_x = weights[0] * x[0];
    UNROLLED for (int i = 1; i < N; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
        sum_w += weights[i];
        sum_x += weights[i] * x[i];
    }
    if (low > 0.0f) low = 0.0f;
    if (high == low) {
        UNROLLED for (int i = 0; i < N; i++) codes[i] = 0;
        *scale_out = 0.0f;
        *least_out = -low;
        return;
    }
    float first = levels / (high - low), scale = 1.0f / first, error = 0.0f;
    float best_grid = infinite(first) ? 0.0f : first, best_from = low;
    UNROLLED for (int i = 0; i < N; i++) {
        float code = within(nearest((x[i] - low) * best_grid), 0.0f, levels);
        float away = code * scale + low - x[i];
        error += (ABSOLUTE ? fabsf(away) : away * away) * weights[i];
    }
    ROLLED for (int trial = 0; trial <= steps; trial++) {
        float grid = inverse(start + step * trial + levels, high - low);
        float trials[N], sum_l = 0.0f, sum_xl = 0.0f, sum_l2 = 0.0f;
        UNROLLED for (int i = 0; i < N; i++) {
            float code = trials[i] = within(nearest((x[i] - low) * grid), 0.0f, levels), term = weights[i] * code;
            sum_l += term;
            sum_xl += term * x[i];
            sum_l2 += term * code;
        }
        float determinant = sum_w * sum_l2 - sum_l * sum_l;
        if (!(determinant > 0.0f)) continue;
        float new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        float new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant, new_error = 0.0f;
        if (new_low > 0.0f) {
            new_low = 0.0f;
            new_scale = sum_xl / sum_l2;
        }
        UNROLLED for (int i = 0; i < N; i++) {
            float away = trials[i] * new_scale + new_low - x[i];
            new_error += (ABSOLUTE ? fabsf(away) : away * away) * weights[i];
        }
        if (new_error < error) {
            best_grid = grid;
            best_from = low;
            error = new_error;
            scale = new_scale;
            low = new_low;
        }
    }
    UNROLLED for (int i = 0; i < N; i++)
        codes[i] = (byte)(int)within(nearest((x[i] - best_from) * best_grid), 0.0f, levels);
    *scale_out = scale;
    *least_out = -low;
}

template <int N> INSIDE float positive_error(const float *x, const float *weights, const float *codes, float scale) {
    float error = 0.0f;
    UNROLLED for (int i = 0; i < N; i++) {
        float away = x[i] - scale * codes[i];
        error += weights[i] * away * away;
    }
    return error;
}

template <int N> INSIDE float positive(const float *x, const float *weights, float levels, byte *codes) {
    float high = 0.0f, found[N];
    UNROLLED for (int i = 0; i < N; i++) high = fmaxf(high, x[i]);
    if (high < EPSILON) {
        UNROLLED for (int i = 0; i < N; i++) codes[i] = 0;
        return 0.0f;
    }
    float grid = inverse(levels, high);
    UNROLLED for (int i = 0; i < N; i++) found[i] = as_byte(nearest(x[i] * grid));
    float error = positive_error<N>(x, weights, found, 1.0f / grid);
    ROLLED for (int trial = 0; trial < 8; trial++) {
        int step = trial < 4 ? trial - 4 : trial - 3;
        float new_grid = inverse(0.1f * step + levels, high);
        UNROLLED for (int i = 0; i < N; i++) found[i] = fminf(nearest(x[i] * new_grid), levels);
        float new_error = positive_error<N>(x, weights, found, 1.0f / new_grid);
        if (new_error < error) {
            grid = new_grid;
            error = new_error;
        }
    }
    UNROLLED for (int i = 0; i < N; i++) found[i] = fminf(nearest(x[i] * grid), levels);
    float scale = rounds<N, true>(x, weights, found, 0.0f, levels);
    UNROLLED for (int i = 0; i < N; i++) codes[i] = (byte)(int)found[i];
    return scale;
}

// `_shares` of k_quants.py.
template <int N> INSIDE float shares(const float *x, float levels, byte *codes) {
    float high = 0.0f;
    UNROLLED for (int i = 0; i < N; i++) high = fmaxf(high, x[i]);
    float grid = inverse(levels, high);
    UNROLLED for (int i = 0; i < N; i++) codes[i] = (byte)(int)as_byte(nearest(x[i] * grid));
    return high / levels;
}

// --- a block, step by step --------------------------------------------------------------------------

// A run: its codes, scale and least weight, and the sum of its weights' weights. `block` and `importance` are 256 floats.
template <int KIND, bool WEIGHTED> INSIDE void search(const float *block, const float *importance, int run, Desk &desk) {
    using T = Type<KIND>;
    constexpr int N = T::RUN;
    constexpr float levels = T::LEVELS;
    float x[N], weights[N];
    byte *codes = desk.codes + run * N;
    UNROLLED for (int i = 0; i < N; i++) x[i] = block[run * N + i];
    if (WEIGHTED && KIND == 6) {
        UNROLLED for (int i = 0; i < N; i++) weights[i] = importance[run * N + i];
    } else if (WEIGHTED) {
        float squares = 0.0f;
        ROLLED for (int i = 0; i < 256; i += 16)
            UNROLLED for (int j = i; j < i + 16; j++) squares += block[j] * block[j];
        float spread = squares * (KIND == 2 ? 0x1p-8f : 0x1p-7f);
        UNROLLED for (int i = 0; i < N; i++) weights[i] = importance[run * N + i] * sqrtf(x[i] * x[i] + spread);
    } else if (N == 32) {
        float squares = 0.0f;
        UNROLLED for (int i = 0; i < N; i++) squares += x[i] * x[i];
        float size = sqrtf(squares / 32.0f);
        UNROLLED for (int i = 0; i < N; i++) weights[i] = size + fabsf(x[i]);
    } else {
        UNROLLED for (int i = 0; i < N; i++) weights[i] = KIND == 2 ? fabsf(x[i]) : x[i] * x[i];
    }
    if constexpr (T::OFFSET) {
        float start = WEIGHTED ? -0.9f : KIND == 4 ? -1.0f : -0.5f, step = WEIGHTED ? 0.05f : 0.1f;
        int steps = WEIGHTED ? 36 : KIND == 4 ? 20 : 15;
        offset<N, KIND == 2 && !WEIGHTED>(x, weights, levels, start, step, steps, codes, desk.scale + run,
                                          desk.least + run);
    } else if constexpr (KIND == 3 && !WEIGHTED) {
        desk.scale[run] = descended<N>(x, levels, codes);
    } else {
        desk.scale[run] = signed_fit<N>(x, weights, levels, codes);
    }
    desk.share[run] = total<N>(weights);
}

// The block's own numbers: its scales as codes and their unit. Of the leasts by thread 1, where there are any.
template <int KIND, bool WEIGHTED> INSIDE void settle(int thread, Desk &desk) {
    using T = Type<KIND>;
    constexpr int N = T::RUNS;
    if (thread > T::OFFSET) return;
    const float *x = thread ? desk.least : desk.scale;
    byte *codes = thread ? desk.least_code : desk.scale_code;
    float unit;
    if constexpr (T::OFFSET) {
        unit = WEIGHTED ? positive<N>(x, desk.share, T::TOP, codes) : shares<N>(x, T::TOP, codes);
        // Not so in llama.cpp's Q4_K with importances: there a code beyond 6 bits spills over.
        if (KIND == 5 || (KIND == 4 && !WEIGHTED))
            UNROLLED for (int i = 0; i < N; i++) codes[i] = codes[i] > 63 ? 63 : codes[i];
    } else if constexpr (KIND == 3 && WEIGHTED) {
        unit = signed_fit<N>(x, desk.share, 32.0f, codes);
    } else {
        float largest = first_largest<N>(x), grid = (KIND == 3 ? -32.0f : -128.0f) / largest;
        bool empty = KIND == 3 ? largest == 0.0f : fabsf(largest) < EPSILON;
        unit = empty ? 0.0f : 1.0f / grid;
        UNROLLED for (int i = 0; i < N; i++) {
            float whole = fminf(nearest(x[i] * grid), KIND == 3 ? 31.0f : 127.0f);
            if (KIND == 3) whole = fmaxf(whole, -32.0f) + 32.0f;
            codes[i] = empty ? 0 : (byte)(int)as_byte(whole);
        }
        if (KIND == 6 && empty)
            ROLLED for (int i = 0; i < 256; i++) desk.codes[i] = 0;
    }
    (thread ? desk.dmin : desk.d) = half_of(unit);
}

// The 12 bytes of Q4_K and Q5_K that hold the codes of 8 scales and 8 leasts.
INSIDE byte pair_byte(int i, const Desk &desk) {
    const byte *scale = desk.scale_code, *least = desk.least_code;
    if (i < 4) return scale[i] | scale[i + 4] >> 4 << 6;
    if (i < 8) return least[i - 4] | least[i] >> 4 << 6;
    return (scale[i - 4] & 15) | (least[i - 4] & 15) << 4;
}

// A run's codes anew, for its scale and least weight as they are stored; those of the search where that scale is 0.
template <int KIND> INSIDE void recode(const float *block, int run, Desk &desk) {
    using T = Type<KIND>;
    constexpr int N = T::RUN;
    byte *codes = desk.codes + run * N;
    int scale_code, least_code = 0;
    if constexpr (KIND == 2) {
        byte packed = desk.scale_code[run] | desk.least_code[run] << 4;
        scale_code = packed & 15, least_code = packed >> 4;
    } else if constexpr (T::OFFSET) {
        byte first = pair_byte(run & 3, desk), second = pair_byte(4 + (run & 3), desk);
        byte third = pair_byte(8 + (run & 3), desk);
        scale_code = run < 4 ? first & 63 : (third & 15) | first >> 6 << 4;
        least_code = run < 4 ? second & 63 : third >> 4 | second >> 6 << 4;
    } else {
        scale_code = KIND == 3 ? desk.scale_code[run] - 32 : (signed char)desk.scale_code[run];
    }
    float scale = from_half(desk.d) * scale_code, least = T::OFFSET ? from_half(desk.dmin) * least_code : 0.0f;
    float low = T::OFFSET ? 0.0f : -T::LEVELS, high = T::OFFSET ? T::LEVELS : T::LEVELS - 1;
    if (scale != 0.0f)
        UNROLLED for (int i = 0; i < N; i++) {
            float x = block[run * N + i];
            codes[i] = (byte)(int)(within(nearest((T::OFFSET ? x + least : x) / scale), low, high) - low);
        }
}

// Two bits of each of four codes, 32 apart: byte i of 64.
INSIDE byte quarter_byte(int i, int shift, const Desk &desk) {
    const byte *codes = desk.codes + i / 32 * 128 + i % 32;
    byte found = 0;
    UNROLLED for (int k = 0; k < 4; k++) found |= (codes[32 * k] >> shift & 3) << 2 * k;
    return found;
}

// Bit `shift` of each of eight codes, 32 apart: byte i of 32.
INSIDE byte bit_byte(int i, int shift, const Desk &desk) {
    byte found = 0;
    UNROLLED for (int k = 0; k < 8; k++) found |= (desk.codes[32 * k + i] >> shift & 1) << k;
    return found;
}

// Four bits of each of two codes, `apart`: byte i of 128.
INSIDE byte half_byte(int i, int apart, const Desk &desk) {
    const byte *codes = desk.codes + i / apart * 2 * apart + i % apart;
    return (codes[0] & 15) | (codes[apart] & 15) << 4;
}

// Byte i of the block.
template <int KIND> INSIDE byte block_byte(int i, const Desk &desk) {
    const byte *scale = desk.scale_code;
    if constexpr (KIND == 2) {
        if (i < 16) return scale[i] | desk.least_code[i] << 4;
        if (i < 80) return quarter_byte(i - 16, 0, desk);
        return (i < 82 ? desk.d : desk.dmin) >> i % 2 * 8;
    } else if constexpr (KIND == 3) {
        if (i < 32) return bit_byte(i, 2, desk);
        if (i < 96) return quarter_byte(i - 32, 0, desk);
        if (i < 104) return (scale[i - 96] & 15) | (scale[i - 88] & 15) << 4;
        if (i < 108) {
            scale += i - 104;
            return scale[0] >> 4 | scale[4] >> 4 << 2 | scale[8] >> 4 << 4 | scale[12] >> 4 << 6;
        }
        return desk.d >> i % 2 * 8;
    } else if constexpr (KIND == 6) {
        if (i < 128) return half_byte(i, 64, desk);
        if (i < 192) return quarter_byte(i - 128, 4, desk);
        return i < 208 ? scale[i - 192] : desk.d >> i % 2 * 8;
    } else {
        if (i < 4) return (i < 2 ? desk.d : desk.dmin) >> i % 2 * 8;
        if (i < 16) return pair_byte(i - 4, desk);
        if (KIND == 5 && i < 48) return bit_byte(i - 16, 4, desk);
        return half_byte(i - (KIND == 5 ? 48 : 16), 32, desk);
    }
}

template <int KIND> INSIDE void pack(int thread, const Desk &desk, byte *out) {
    for (int i = thread; i < Type<KIND>::BYTES; i += Type<KIND>::RUNS) out[i] = block_byte<KIND>(i, desk);
}

// --- the kernel -------------------------------------------------------------------------------------

#ifdef __CUDACC_RTC__
// weight: float32 [blocks x 256]; importance: float32 [row_blocks x 256], of no use without importances; out: `blocks` blocks.
// 128 threads; as many of them as there are blocks x runs of one.
extern "C" __global__ void __launch_bounds__(128)
    encode(const float *__restrict__ weight, const float *__restrict__ importance, byte *__restrict__ out,
           long long blocks, int row_blocks) {
    constexpr int RUNS = Type<K_QUANT>::RUNS;
    __shared__ Desk desks[128 / RUNS];
    long long index = (long long)blockIdx.x * (128 / RUNS) + threadIdx.x / RUNS;
    // What is beyond the last block makes that again, and does not write it.
    bool there = index < blocks;
    if (!there) index = blocks - 1;
    int run = threadIdx.x % RUNS;
    Desk &desk = desks[threadIdx.x / RUNS];
    const float *block = weight + index * 256;
    if (IMPORTANCES) importance += index % row_blocks * 256;
    search<K_QUANT, IMPORTANCES>(block, importance, run, desk);
    __syncwarp();
    settle<K_QUANT, IMPORTANCES>(run, desk);
    __syncwarp();
    recode<K_QUANT>(block, run, desk);
    __syncwarp();
    if (there) pack<K_QUANT>(run, desk, out + index * Type<K_QUANT>::BYTES);
}
#endif
