// y = W x for AWQ's words [in, out / 8], eight outputs of an input channel each, on the matrix units (see rows.cu). A warp
// takes 64 WIDE outputs by CHUNK input channels of one group at a time, a block the input channels of one of its cluster's
// PARTS, WARPS chunks at a time. Of 16 channels a lane (g, t) = (lane / 4, lane % 4) has numbers 4 t to 4 t + 3, of words
// WIDE g to WIDE g + WIDE - 1.

constexpr int CHUNKS = INPUTS / CHUNK, WORDS = OUTPUTS / 8, HEIGHT = CHUNK / 4, TILE = 64 * WIDE;

struct __align__(4 * WIDE) Words {
    u32 at[WIDE];
};
struct Staged {
    Words words[HEIGHT][32];
    Two x[HEIGHT / 4][32];
    Four scales[WIDE][32];
    Words zeros[32];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
awq(const u16* x, const u32* qweight, const u32* qzeros, const u16* qscales, u16* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int left = blockIdx.y * (8 * WIDE), word = min(left + g * WIDE, WORDS - WIDE), first = blockIdx.x * WARPS + warp;
    Staged* staged = (Staged*)pool + warp * STAGES;
    auto stage = [&](int step) {
        const int chunk = first + step * (WARPS * PARTS);
        if (chunk < CHUNKS) {
            Staged& to = staged[step % STAGES];
            const long long group = chunk * CHUNK / GROUP;
#pragma unroll
            for (int i = 0; i < HEIGHT; i++)
                copy<4 * WIDE>(&to.words[i][lane], qweight + (long long)(chunk * CHUNK + i / 4 * 16 + 4 * t + i % 4) * WORDS + word);
#pragma unroll
            for (int v = 0; v < WIDE; v++) copy<16>(&to.scales[v][lane], qscales + group * OUTPUTS + 8 * (word + v));
            copy<4 * WIDE>(&to.zeros[lane], qzeros + group * WORDS + word);
#pragma unroll
            for (int i = 0; i < HEIGHT / 4; i++) copy<8>(&to.x[i][lane], x + chunk * CHUNK + 16 * i + 4 * t);
        }
        commit();
    };
    if (first < CHUNKS && WORDS % 4 == 0 && WIDE > 1)
        for (int row = lane; row < CHUNK; row += 32)
            fetch(qweight + (long long)(first * CHUNK + row) * WORDS + left, 4 * min(8 * WIDE, WORDS - left));
    await_launch_ahead();
    for (int step = 0; step < STAGES; step++) stage(step);
    float y[WIDE][8] = {};
    for (int step = 0; first + step * (WARPS * PARTS) < CHUNKS; step++) {
        await<STAGES - 1>();
        const Staged& here = staged[step % STAGES];
        float products[WIDE][4][4] = {}, totals[4] = {}, back = 1;
        u32 b[HEIGHT / 4][2];
#pragma unroll
        for (int i = 0; i < HEIGHT / 4; i++) b[i][0] = here.x[i][lane].at[0], b[i][1] = here.x[i][lane].at[1];
        if (BFLOAT) back = scaled<HEIGHT / 2, 2>(b[0]);
#pragma unroll
        for (int i = 0; i < HEIGHT / 4; i++) {
            multiply(totals, 0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00, b[i][0], b[i][1]);
            Words four[4];
#pragma unroll
            for (int k = 0; k < 4; k++) four[k] = here.words[4 * i + k][lane];
#pragma unroll
            for (int v = 0; v < WIDE; v++)
#pragma unroll
                for (int tile = 0; tile < 4; tile++) {
                    // Two bytes of each of two channels; of these the lower or the upper codes.
                    const u32 selector = tile / 2 ? 0x7632 : 0x5410, down = tile % 2 * 4;
                    const u32 early = permuted(four[0].at[v], four[1].at[v], selector) >> down & 0x0F0F0F0F;
                    const u32 late = permuted(four[2].at[v], four[3].at[v], selector) >> down & 0x0F0F0F0F;
                    multiply(products[v][tile], pair_of(early, 0), pair_of(early, 1), pair_of(late, 0), pair_of(late, 1), b[i][0], b[i][1]);
                }
        }
#pragma unroll
        for (int v = 0; v < WIDE; v++)
#pragma unroll
            for (int n = 0; n < 8; n++) {
                // Bits 4 n of a word are of column 2 n % 8 + n / 4, for zeros as for codes.
                const int column = 2 * n % 8 + n / 4;
                const float zero = byte_of(here.zeros[lane].at[v] >> 4 * (n % 2) & 0x0F0F0F0F, n / 2);
                float low, high;
                halves(here.scales[v][lane].at[column / 2], low, high);
                y[v][column] += (column % 2 ? high : low) * back * (products[v][n / 4 * 2 + n % 2][n / 2 % 2 * 2] - zero * totals[0]);
            }
        stage(step + STAGES);
    }
    __syncthreads();
    float(*sums)[TILE] = (float(*)[TILE])pool;
    // All four lanes of a g have the same sums.
#pragma unroll
    for (int v = 0; v < WIDE; v++)
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (n / 2 == t) sums[warp][(g * WIDE + v) * 8 + n] = y[v][n];
    __syncthreads();
    for (int o = threadIdx.x; o < TILE; o += 32 * WARPS) {
        float sum = sums[0][o];
#pragma unroll
        for (int other = 1; other < WARPS; other++) sum += sums[other][o];
        sums[0][o] = sum;
    }
    if (PARTS > 1) await_cluster();
    else __syncthreads();
    for (int o = threadIdx.x * PARTS + blockIdx.x; o < min(TILE, OUTPUTS - 8 * left); o += 32 * WARPS * PARTS) {
        float sum = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) sum += in_block(&sums[0][o], part);
        store(out + 8 * left + o, sum);
    }
    if (PARTS > 1) await_cluster();
}
