// The kernels on a processor: `pages.cu` as it is, with stand-ins for what the device has. The threads of a block take
// turns, each running until it waits for the others or ends.
//
//   c++ -std=c++17 -O1 -shared -fPIC -fno-strict-aliasing -o kernel.so without_gpu.cpp

#include <cstddef>
#include <cstdint>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Number {
    unsigned x;
};
static Number blockIdx, gridDim, blockDim;
static Number threadIdx;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// Where a whole unit does not lie at a whole address, a device stops. So is it here.
static bool misaligned;
template <typename Unit> static Unit __ldcs(const Unit *from) {
    misaligned |= reinterpret_cast<std::uintptr_t>(from) % sizeof(Unit) != 0;
    Unit value;
    __builtin_memcpy(&value, from, sizeof(Unit));
    return value;
}
template <typename Unit> static void __stcs(Unit *to, Unit value) {
    misaligned |= reinterpret_cast<std::uintptr_t>(to) % sizeof(Unit) != 0;
    __builtin_memcpy(to, &value, sizeof(Unit));
}

static ucontext_t scheduler;
static ucontext_t *current;
static bool waits;

static void __syncthreads() {
    Number thread = threadIdx;
    waits = true;
    swapcontext(current, &scheduler);
    threadIdx = thread;
}

#include "pages.cu"

struct Launch {
    void (*kernel)(const Launch &);
    const void *table;
    u32 count;
    u64 *sums;
};
static const Launch *launch;

static void begin() {
    launch->kernel(*launch);
}

// 0, or what a kernel did that a device does not bear: 1, threads of a block that do not all come to wait;
// 2, a unit at an address that is not its own multiple.
static int run(const Launch &wanted, u32 blocks, u32 threads) {
    static const std::size_t STACK_BYTES = 64 << 10;
    std::vector<char> stacks(threads * STACK_BYTES);
    std::vector<ucontext_t> contexts(threads);
    launch = &wanted;
    misaligned = false;
    gridDim = {blocks};
    blockDim = {threads};
    for (u32 block = 0; block < blocks; block++) {
        blockIdx = {block};
        for (u32 thread = 0; thread < threads; thread++) {
            getcontext(&contexts[thread]);
            contexts[thread].uc_stack.ss_sp = &stacks[thread * STACK_BYTES];
            contexts[thread].uc_stack.ss_size = STACK_BYTES;
            contexts[thread].uc_link = &scheduler;
            makecontext(&contexts[thread], begin, 0);
        }
        for (u32 waiting = threads; waiting > 0;) {
            waiting = 0;
            for (u32 thread = 0; thread < threads; thread++) {
                waits = false;
                current = &contexts[thread];
                threadIdx = {thread};
                swapcontext(&scheduler, current);
                waiting += waits;
            }
            if (waiting != 0 && waiting != threads) {
                return 1;
            }
        }
    }
    return misaligned ? 2 : 0;
}

static void run_pages(const Launch &launch) {
    pages(static_cast<const Piece *>(launch.table), launch.count);
}

static void run_checksums(const Launch &launch) {
    checksums(static_cast<const Run *>(launch.table), launch.count, launch.sums);
}

extern "C" int launch_pages(const void *table, u32 count, u32 blocks, u32 threads) {
    return run({run_pages, table, count, nullptr}, blocks, threads);
}

extern "C" int launch_checksums(const void *table, u32 count, u64 *sums, u32 blocks, u32 threads) {
    return run({run_checksums, table, count, sums}, blocks, threads);
}
