// y = W x for blocks in planes, on the matrix units: they multiply codes as they are, and leave the processors little
// more than to cut them out. A warp takes 16 rows of W by 256 columns at a time; these have RUNS = 8 or 16 runs that share
// a scale, and x, spread over eight columns so that each has one run of it and is zero elsewhere, makes the product the
// sums of runs, each in the thread that has its scale. A warp keeps its 256 numbers of x for TILES times 16 rows, so x is
// unpacked rarely; a block has WARPS warps, which share the columns, and adds their sums up at the end.
//
// Of a row and 256 columns a lane has PIECES of 16 bytes of codes, numbers t = lane % 4, t + 4, ...; a piece has GROUPS of
// 16 codes. A type gives these, LESS, SHIFTED, FOURS and WORDS (how often a lane reads 16 and 4 bytes), and functions:
// `place` (where those are, the pieces first), `codes` (four of them, a byte each), `column` (of a piece's group) and
// `scales` (of run 8 d + 2 t + e).

struct Scales {
    float scale, shift;
};
struct Unit {
    Four four[FOURS];
    u32 word[WORDS ? WORDS : 1];
};

TYPE_FUNCTIONS

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) rows(const u16* x, const char* w, u16* out) {
    constexpr int ACROSS = INPUTS / 256, BLOCKS = INPUTS / WEIGHTS, DS = RUNS / 8;
    constexpr long long COUNT = (long long)OUTPUTS * BLOCKS;
    constexpr int UNIT = 512 * FOURS + 128 * WORDS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * (16 * TILES);
    const int steps = (ACROSS - warp + WARPS - 1) / WARPS * TILES;
    float* sums = (float*)((char*)pool + WARPS * STAGES * 2 * UNIT);  // [WARPS][TILES][2][32]
    // A lane reads only what it copied itself, so warps wait for nobody.
    auto staged = [&](int step, int h, int f) {
        char* here = (char*)pool + ((warp * STAGES + step % STAGES) * 2 + h) * UNIT;
        return f < FOURS ? here + 512 * f + 16 * lane : here + 512 * FOURS + 128 * (f - FOURS) + 4 * lane;
    };
    auto block_of = [&](int step, int row) {
        return (long long)min(first + step % TILES * 16 + row, OUTPUTS - 1) * BLOCKS + (warp + step / TILES * WARPS) * (256 / WEIGHTS);
    };
    auto stage = [&](int step) {
        if (step < steps) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const long long block = block_of(step, g + 8 * h);
#pragma unroll
                for (int f = 0; f < FOURS; f++) copy<16>(staged(step, h, f), place(w, COUNT, block, t, f));
#pragma unroll
                for (int f = FOURS; f < FOURS + WORDS; f++) copy<4>(staged(step, h, f), place(w, COUNT, block, t, f));
            }
        }
        commit();
    };
    if (lane < 16)
        for (int step = 0; step < min(STAGES, steps); step++) fetch(w + block_of(step, lane) * (PIECES * 64 * WEIGHTS / 256), PIECES * 64);
    await_launch_ahead();
    for (int step = 0; step < STAGES; step++) stage(step);
    u32 part[PIECES][GROUPS][4][2];
    float totals[DS][4], back = 1;
    for (int step = 0; step < steps; step++) {
        if (step % TILES == 0) {
            const u16* here = x + (warp + step / TILES * WARPS) * 256;
#pragma unroll
            for (int i = 0; i < 4 * PIECES * GROUPS; i++) {
                const int j = i / 4 / GROUPS, group = i / 4 % GROUPS, at = column(t + 4 * j, group) + i % 4 * 4;
                u32 low = 0, high = 0;
                if (at / (256 / RUNS) % 8 == g) {
                    const Two two = *(const Two*)(here + at);
                    low = two.at[0], high = two.at[1];
                }
                part[j][group][i % 4][0] = permuted(low, high, 0x5410), part[j][group][i % 4][1] = permuted(low, high, 0x7632);
            }
            if (BFLOAT) back = scaled<8 * PIECES * GROUPS, 5>(part[0][0][0]);
            if (SHIFTED) {
#pragma unroll
                for (int d = 0; d < DS; d++)
                    for (int e = 0; e < 4; e++) totals[d][e] = 0;
#pragma unroll
                for (int i = 0; i < 4 * PIECES * GROUPS; i++) {
                    u32* b = part[i / 4 / GROUPS][i / 4 % GROUPS][i % 4];
                    multiply(totals[i / 4 / GROUPS * DS / PIECES], 0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00, b[0], b[1]);
                }
            }
        }
        await<STAGES - 1>();
        Unit unit[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            for (int f = 0; f < FOURS; f++) unit[h].four[f] = *(Four*)staged(step, h, f);
            for (int f = 0; f < WORDS; f++) unit[h].word[f] = *(u32*)staged(step, h, FOURS + f);
        }
        float products[DS][4] = {};
#pragma unroll
        for (int i = 0; i < 4 * PIECES * GROUPS; i++) {
            const int j = i / 4 / GROUPS, group = i / 4 % GROUPS;
            const u32 upper = codes(unit[0], t, j, group, i % 4), lower = codes(unit[1], t, j, group, i % 4);
            u32* b = part[j][group][i % 4];
            multiply(products[j * DS / PIECES], pair_of(upper, 0), pair_of(lower, 0), pair_of(upper, 1), pair_of(lower, 1), b[0], b[1]);
        }
        float* sum = sums + (warp * TILES + step % TILES) * 64 + lane;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float y = 0;
            const int odd = block_of(step, g + 8 * h) % 2;
#pragma unroll
            for (int d = 0; d < DS; d++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const Scales found = scales(unit[h], t, d, e, odd);
                    y += found.scale * products[d][2 * h + e];
                    if (SHIFTED) y += found.shift * totals[d][e];
                }
            sum[32 * h] = (step < TILES ? 0 : sum[32 * h]) + y * back;
        }
        stage(step + STAGES);
    }
    __syncthreads();
    for (int row = threadIdx.x; row < 16 * TILES; row += 32 * WARPS) {
        float y = 0;
        for (int other = 0; other < min(WARPS, ACROSS); other++)
#pragma unroll
            for (int i = 0; i < 4; i++) y += sums[((other * TILES + row / 16) * 2 + row / 8 % 2) * 32 + row % 8 * 4 + i];
        if (first + row < OUTPUTS) store(out + first + row, y);
    }
}
