// The GPU's source of the K-quants for a processor: what threads do between two barriers, one after the other.
#include "k_quants.cu"

template <int KIND, bool WEIGHTED>
static void blocks_of(const float *weight, const float *importance, byte *out, long long blocks, int row_blocks) {
    constexpr int RUNS = Type<KIND>::RUNS;
    for (long long i = 0; i < blocks; i++) {
        const float *block = weight + i * 256, *means = WEIGHTED ? importance + i % row_blocks * 256 : nullptr;
        Desk desk;
        memset(&desk, 0xA5, sizeof desk);
        for (int run = 0; run < RUNS; run++) search<KIND, WEIGHTED>(block, means, run, desk);
        for (int run = 0; run < RUNS; run++) settle<KIND, WEIGHTED>(run, desk);
        for (int run = 0; run < RUNS; run++) recode<KIND>(block, run, desk);
        for (int run = 0; run < RUNS; run++) pack<KIND>(run, desk, out + i * Type<KIND>::BYTES);
    }
}

#define BOTH(kind)                                                                                           \
    extern "C" void q##kind##_k(const float *weight, const float *importance, byte *out, long long blocks,   \
                                int row_blocks) {                                                            \
        if (importance) blocks_of<kind, true>(weight, importance, out, blocks, row_blocks);                  \
        else blocks_of<kind, false>(weight, importance, out, blocks, row_blocks);                            \
    }

BOTH(2)
BOTH(3)
BOTH(4)
BOTH(5)
BOTH(6)
