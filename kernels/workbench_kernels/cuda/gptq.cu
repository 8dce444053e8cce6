// y = W x for GPTQ's words [in / DEEP, out], DEEP = 32 / BITS input channels of an output each, on the matrix units (see
// rows.cu). A warp takes 32 SLICES outputs by CHUNK input channels of one group at a time, a block all input channels,
// WARPS chunks at a time. Of a slice a lane (g, t) = (lane / 4, lane % 4) has the words of outputs 4 g to 4 g + 3 that are
// t, t + 4, ... deep.

constexpr int DEEP = 32 / BITS, CHUNKS = INPUTS / CHUNK, HEIGHT = CHUNK / DEEP, DEPTHS = HEIGHT / 4;

struct __align__(2 * DEEP) Numbers {
    u32 at[DEEP / 2];
};
struct Staged {
    Four words[SLICES][DEPTHS][32];
    Numbers x[DEPTHS][32];
    Two scales[SLICES][32];
    u32 zeros[SLICES][32];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
gptq(const u16* x, const u32* qweight, const u32* qzeros, const u16* qscales, u16* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int left = blockIdx.x * (32 * SLICES);
    Staged* staged = (Staged*)pool + warp * STAGES;
    float* sums = (float*)((Staged*)pool + WARPS * STAGES);  // [WARPS][32 * SLICES]
    auto stage = [&](int step) {
        const int chunk = warp + step * WARPS;
        if (chunk < CHUNKS) {
            Staged& to = staged[step % STAGES];
            const long long group = chunk * CHUNK / GROUP;
#pragma unroll
            for (int s = 0; s < SLICES; s++) {
                const int output = min(left + 32 * s + 4 * g, OUTPUTS - 4);
#pragma unroll
                for (int i = 0; i < DEPTHS; i++)
                    copy<16>(&to.words[s][i][lane], qweight + (long long)(chunk * HEIGHT + 4 * i + t) * OUTPUTS + output);
                copy<8>(&to.scales[s][lane], qscales + group * OUTPUTS + output);
                copy<4>(&to.zeros[s][lane], qzeros + group * (OUTPUTS / DEEP) + output / DEEP);
            }
#pragma unroll
            for (int i = 0; i < DEPTHS; i++) copy<2 * DEEP>(&to.x[i][lane], x + chunk * CHUNK + (4 * i + t) * DEEP);
        }
        commit();
    };
    if (warp < CHUNKS)
        for (int row = lane; row < HEIGHT; row += 32)
            fetch(qweight + (long long)(warp * HEIGHT + row) * OUTPUTS + left, 4 * min(32 * SLICES, OUTPUTS - left));
    await_launch_ahead();
    for (int step = 0; step < STAGES; step++) stage(step);
    float y[SLICES][4] = {};
    for (int step = 0; warp + step * WARPS < CHUNKS; step++) {
        await<STAGES - 1>();
        const Staged& here = staged[step % STAGES];
        float products[SLICES][2][4] = {}, totals[4] = {}, back = 1;
        Numbers numbers[DEPTHS];
#pragma unroll
        for (int i = 0; i < DEPTHS; i++) numbers[i] = here.x[i][lane];
        if (BFLOAT) back = scaled<CHUNK / 8, 2>(numbers[0].at);
#pragma unroll
        for (int i = 0; i < DEPTHS; i++) {
#pragma unroll
            for (int j = 0; j < 8 / BITS; j++) {
                // The jth code of each of a word's bytes, and x likewise.
                constexpr int EACH = 8 / BITS;
                const u32* two = numbers[i].at;
                const u32 b0 = permuted(two[j / 2], two[(2 * EACH + j) / 2], j % 2 ? 0x7632 : 0x5410);
                const u32 b1 = permuted(two[(EACH + j) / 2], two[(3 * EACH + j) / 2], (EACH + j) % 2 ? 0x7632 : 0x5410);
                multiply(totals, 0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00, b0, b1);
#pragma unroll
                for (int s = 0; s < SLICES; s++)
#pragma unroll
                    for (int v = 0; v < 4; v += 2) {
                        constexpr u32 mask = ((1u << BITS) - 1) * 0x01010101u;
                        const u32 upper = here.words[s][i][lane].at[v] >> BITS * j & mask;
                        const u32 lower = here.words[s][i][lane].at[v + 1] >> BITS * j & mask;
                        multiply(products[s][v / 2], pair_of(upper, 0), pair_of(lower, 0), pair_of(upper, 1), pair_of(lower, 1), b0, b1);
                    }
            }
        }
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            const u32 zeros = here.zeros[s][lane] >> (min(left + 32 * s + 4 * g, OUTPUTS - 4) % DEEP * BITS);
#pragma unroll
            for (int v = 0; v < 4; v++) {
                const float zero = byte_of((zeros >> BITS * v) + 1 & (1u << BITS) - 1, 0);
                float low, high;
                halves(here.scales[s][lane].at[v / 2], low, high);
                y[s][v] += (v % 2 ? high : low) * back * (products[s][v / 2][v % 2 * 2] - zero * totals[0]);
            }
        }
        stage(step + STAGES);
    }
    // All four lanes of a g have the same sums.
    if (t == 0)
        for (int i = 0; i < 4 * SLICES; i++) sums[warp * 32 * SLICES + i / 4 * 32 + 4 * g + i % 4] = y[i / 4][i % 4];
    __syncthreads();
    for (int output = threadIdx.x; output < min(32 * SLICES, OUTPUTS - left); output += 32 * WARPS) {
        float sum = 0;
        for (int other = 0; other < WARPS; other++) sum += sums[other * 32 * SLICES + output];
        store(out + left + output, sum);
    }
}
