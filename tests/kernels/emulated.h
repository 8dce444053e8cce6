// CUDA's words on a CPU, as far as the kernels of workbench_kernels/cuda use them: threads of a block are threads, its
// blocks run one after the other. Stands in for the first part of machine.cu.
#define EMULATED
#include <algorithm>
#include <barrier>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static
using std::max, std::min;

struct Place {
    unsigned x, y;
};
inline thread_local Place threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> all;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline float lanes[1024];
alignas(16) inline char pool[1 << 18];
inline void __syncthreads() { all->arrive_and_wait(); }

inline unsigned as_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// The kernel on every thread of every block.
inline void launched(int across, int down, int threads, const std::function<void()>& kernel) {
    for (unsigned block = 0; block < unsigned(across * down); block++) {
        all = std::make_unique<std::barrier<>>(threads);
        warps.clear();
        for (int warp = 0; warp < threads / 32; warp++) warps.push_back(std::make_unique<std::barrier<>>(32));
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < unsigned(threads); thread++)
            running.emplace_back([=, &kernel] {
                threadIdx = {thread, 0}, blockIdx = {block % across, block / across};
                kernel();
            });
        for (auto& one : running) one.join();
    }
}

template <class Number> Number at(const void* place) {
    Number found;
    memcpy(&found, place, sizeof found);
    return found;
}
template <int BYTES> void copy(void* to, const void* from) { memcpy(to, from, BYTES); }
inline void commit() {}
template <int LEFT> void await() {}

inline float as_float(unsigned bits) { return at<float>(&bits); }
inline unsigned permuted(unsigned low, unsigned high, unsigned selector) {
    unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
inline void halves(unsigned word, float& low, float& high) {
    unsigned short up = word >> 16, down = word;
    low = at<_Float16>(&down), high = at<_Float16>(&up);
}
inline unsigned halves_of(float low, float high) {
    _Float16 both[2] = {(_Float16)low, (_Float16)high};
    return at<unsigned>(both);
}
inline unsigned less(unsigned two, unsigned others) {
    float low, high, less_low, less_high;
    halves(two, low, high), halves(others, less_low, less_high);
    return halves_of(low - less_low, high - less_high);
}
inline void await_warp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
inline float from_lane(float value, int away) {
    std::barrier<>& warp = *warps[threadIdx.x / 32];
    lanes[threadIdx.x] = value;
    warp.arrive_and_wait();
    value = lanes[threadIdx.x ^ away];
    warp.arrive_and_wait();
    return value;
}
inline unsigned from_lane_bits(unsigned value, int away) {
    const float found = from_lane(at<float>(&value), away);
    return at<unsigned>(&found);
}
inline unsigned factors[1024][6];
inline void multiply(float* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(factors[threadIdx.x], mine, sizeof mine);
    await_warp();
    const int first = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++) {
            float a[2], b[2];
            halves(factors[first + 4 * g + k / 2][i / 2 + k % 2 * 2], a[0], a[1]);
            halves(factors[first + 4 * (2 * t + i % 2) + k / 2][4 + k % 2], b[0], b[1]);
            sum[i] += a[0] * b[0] + a[1] * b[1];
        }
    await_warp();
}
inline void fetch(const void*, unsigned) {}
inline void await_launch_ahead() {}
