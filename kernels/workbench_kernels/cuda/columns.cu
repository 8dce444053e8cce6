// y = W x for words that lie side by side along the outputs, [in / DEEP, words]: a word holds the codes of DEEP input
// channels by 32 / BITS / DEEP outputs (AWQ: DEEP 1, eight outputs; GPTQ: DEEP 32 / BITS, one). A thread has WIDE words
// beside each other, a warp EACH chunks of CHUNK input channels, a block of WARPS warps those of one of the cluster's
// PARTS. Sums are joined in the block, then in the cluster: no memory, no counters.

constexpr int CODES = 32 / BITS, ACROSS = CODES / DEEP, HEIGHT = CHUNK / DEEP, MINE = WIDE * ACROSS;
constexpr int WORDS = OUTPUTS / ACROSS, TALL = (INPUTS + DEEP - 1) / DEEP;
constexpr int CHUNKS = (INPUTS + CHUNK - 1) / CHUNK, EACH = (CHUNKS + PARTS * WARPS - 1) / (PARTS * WARPS);
constexpr int PIECE = DEEP > 4 ? DEEP : 4;

struct __align__(4 * WIDE) Words {
    u32 at[WIDE];
};
struct __align__(16) Values {
    float at[4];
};
struct __align__(16) Staged {
    Words words[HEIGHT][32];
    u16 scales[32][MINE];
    u32 zeros[32][DEEP == 1 ? WIDE : 1];
};
struct Warp {
    Staged staged[STAGES];
    Values values[EACH][CHUNK / 4];
    float totals[(EACH + 3) / 4 * 4];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
columns(const Value* x, const u32* qweight, const u32* qzeros, const u16* qscales, Value* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int left = blockIdx.y * 32 * WIDE, word = left + lane * WIDE;
    const int begin = min((int)(blockIdx.x * WARPS + warp) * EACH, CHUNKS), end = min(begin + EACH, CHUNKS);
    Warp& my = ((Warp*)pool)[warp];
    if (FETCH && begin < end)
        for (int row = begin * HEIGHT + lane; row < min(min(begin + STAGES, end) * HEIGHT, TALL); row += 32)
            fetch(qweight + (long long)row * WORDS + left, 4 * min(32 * WIDE, WORDS - left));
    await_launch_ahead();
    auto stage = [&](int chunk, int slot) {
        if (chunk < end) {
            Staged& to = my.staged[slot];
            // Sixteen bytes a lane, some rows a time.
#pragma unroll
            for (int r = 0; r < HEIGHT; r += 4 / WIDE) {
                const int row = chunk * HEIGHT + r + lane / (8 * WIDE), piece = lane % (8 * WIDE) * 4;
                if (row < TALL && left + piece < WORDS)
                    copy<16>(to.words[r + lane / (8 * WIDE)][0].at + piece, qweight + (long long)row * WORDS + left + piece);
            }
            if (word < WORDS) {
                // Groups are whole chunks, or all input channels.
                const long long group = chunk * CHUNK / GROUP;
                constexpr int WIDEST = MINE < 8 ? 2 * MINE : 16;
#pragma unroll
                for (int o = 0; o < MINE; o += WIDEST / 2)
                    copy<WIDEST>(&to.scales[lane][o], qscales + group * OUTPUTS + word * ACROSS + o);
                if (DEEP == 1) copy<4 * (DEEP == 1 ? WIDE : 1)>(to.zeros[lane], qzeros + group * WORDS + word);
                else copy<4>(to.zeros[lane], qzeros + group * (OUTPUTS * BITS / 32) + word * BITS / 32);
            }
        }
        commit();
    };
#pragma unroll
    for (int slot = 0; slot < STAGES; slot++) stage(begin + slot, slot);
    for (int chunk = begin; chunk < end; chunk++) {
        float total = 0;
#pragma unroll
        for (int k = lane; k < CHUNK; k += 32) {
            const float value = chunk * CHUNK + k < INPUTS ? value_of(x[chunk * CHUNK + k]) : 0;
            my.values[chunk - begin][k / 4].at[k % 4] = value;
            total += value;
        }
#pragma unroll
        for (int away = 16; away; away /= 2) total += from_lane(total, away);
        my.totals[chunk - begin] = total;
    }
    float y[MINE] = {};
    int slot = 0;
    for (int chunk = begin; chunk < end; chunk++) {
        await<STAGES - 1>();
        await_warp();
        const Staged& here = my.staged[slot];
        const float total = my.totals[chunk - begin];
        float products[MINE] = {};
#pragma unroll 8
        for (int first = 0; first < CHUNK; first += PIECE) {
            Values value[PIECE / 4];
#pragma unroll
            for (int k = 0; k < PIECE / 4; k++) value[k] = my.values[chunk - begin][first / 4 + k];
#pragma unroll
            for (int r = 0; r < PIECE / DEEP; r++) {
                const Words words = here.words[first / DEEP + r][lane];
#pragma unroll
                for (int v = 0; v < WIDE; v++)
#pragma unroll
                    for (int i = 0; i < 8 / BITS; i++) {
                        const u32 codes = cut(words.at[v], i);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int e = j * (8 / BITS) + i, k = DEEP == 1 ? r : r * DEEP + e;
                            products[DEEP == 1 ? v * ACROSS + e : v] += valued(codes, j) * value[k / 4].at[k % 4];
                        }
                    }
            }
        }
#pragma unroll
        for (int v = 0; v < WIDE; v++)
#pragma unroll
            for (int e = 0; e < ACROSS; e++) {
                // AWQ: bits 4 e of a word are of column 2 e % 8 + e / 4, for zeros as for codes.
                const int o = DEEP == 1 ? v * ACROSS + 2 * e % 8 + e / 4 : v;
                float less;
                if (DEEP == 1) {
                    less = valued(cut(here.zeros[lane][DEEP == 1 ? v : 0], e % 2), e / 2);
                } else {
                    const u32 stored = here.zeros[lane][0] >> (word * BITS % 32 + BITS * v);
                    less = ABOVE + (as_float(0x4B000000 | (stored + 1 & (1u << BITS) - 1)) - 8388608.f) / SCALE;
                }
                y[o] += half_of(here.scales[lane][o]) * (products[v * ACROSS + e] - less * total);
            }
        await_warp();
        stage(chunk + STAGES, slot);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    __syncthreads();
    float(*sums)[32 * MINE] = (float(*)[32 * MINE])pool;
#pragma unroll
    for (int o = 0; o < MINE; o++) sums[warp][lane * MINE + o] = y[o];
    __syncthreads();
    for (int o = threadIdx.x; o < 32 * MINE; o += 32 * WARPS) {
        float sum = sums[0][o];
#pragma unroll
        for (int other = 1; other < WARPS; other++) sum += sums[other][o];
        sums[0][o] = sum;
    }
    if (PARTS > 1) await_cluster();
    else __syncthreads();
    for (int o = threadIdx.x * PARTS + blockIdx.x; o < 32 * MINE; o += 32 * WARPS * PARTS) {
        float sum = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) sum += in_block(&sums[0][o], part);
        const int column = blockIdx.y * 32 * MINE + o;
        if (column < OUTPUTS) store(out + column, sum * SCALE);
    }
    if (PARTS > 1) await_cluster();
}
