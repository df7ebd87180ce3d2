// What the copier has a device do by itself: copy many pieces in one launch, and sum runs of its memory.
//
//   pages      table: | to | from | bytes |  a piece to a warp, which walks it 16 bytes a lane and four deep
//   checksums  table: | from | bytes |       a run to a block; sums: | CRC-64/NVME | of each
//
// Who launches splits what is long, so that few long pieces and many short ones both give every warp something to do.
// Addresses are of device memory or of host memory that the device reaches; a piece may begin and end at any byte.
//
// Compiled by NVRTC to `pages.ptx` (see `generate`); no headers. `without_gpu.cpp` compiles it for a processor too,
// where a test compares it with something simpler.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

// ---- pages

struct Piece {
    u64 to;
    u64 from;
    u64 bytes;
};

enum : u32 { LANES = 32 };

// Moves `bytes` from one end to the other, which are aligned alike to a `Unit`: bytes up to the first whole unit,
// units, bytes after the last. It is read once and written once, so it need not stay in a cache.
template <typename Unit>
__device__ __forceinline__ void move(u8 *to, const u8 *from, u64 bytes, u32 lane) {
    u64 head = (0 - (u64)to) & (sizeof(Unit) - 1);
    head = head < bytes ? head : bytes;
    #pragma unroll 1
    for (u64 at = lane; at < head; at += LANES) {
        __stcs(to + at, __ldcs(from + at));
    }
    Unit *to_units = (Unit *)(to + head);
    const Unit *from_units = (const Unit *)(from + head);
    const u64 units = (bytes - head) / sizeof(Unit);
    u64 at = lane;
    // Four are asked for before the first is waited for: the other end may be a microsecond away.
    #pragma unroll 1
    for (; at + 3 * LANES < units; at += 4 * LANES) {
        const Unit first = __ldcs(from_units + at);
        const Unit second = __ldcs(from_units + at + LANES);
        const Unit third = __ldcs(from_units + at + 2 * LANES);
        const Unit fourth = __ldcs(from_units + at + 3 * LANES);
        __stcs(to_units + at, first);
        __stcs(to_units + at + LANES, second);
        __stcs(to_units + at + 2 * LANES, third);
        __stcs(to_units + at + 3 * LANES, fourth);
    }
    #pragma unroll 1
    for (; at < units; at += LANES) {
        __stcs(to_units + at, __ldcs(from_units + at));
    }
    #pragma unroll 1
    for (at = head + units * sizeof(Unit) + lane; at < bytes; at += LANES) {
        __stcs(to + at, __ldcs(from + at));
    }
}

extern "C" __global__ void __launch_bounds__(256) pages(const Piece *__restrict__ table, u32 count) {
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 warps = gridDim.x * blockDim.x / LANES;
    const u32 lane = thread % LANES;
    for (u32 at = thread / LANES; at < count; at += warps) {
        const Piece piece = table[at];
        u8 *to = (u8 *)piece.to;
        const u8 *from = (const u8 *)piece.from;
        // What differs in the low bits of the two is what no whole unit can bridge.
        const u64 apart = piece.to ^ piece.from;
        if ((apart & 15) == 0) {
            move<uint4>(to, from, piece.bytes, lane);
        } else if ((apart & 7) == 0) {
            move<u64>(to, from, piece.bytes, lane);
        } else if ((apart & 3) == 0) {
            move<u32>(to, from, piece.bytes, lane);
        } else if ((apart & 1) == 0) {
            move<u16>(to, from, piece.bytes, lane);
        } else {
            move<u8>(to, from, piece.bytes, lane);
        }
    }
}

// ---- checksums
//
// A word of eight bytes is a polynomial of degree 63 over two elements, its lowest bit the highest power, as the CRC
// takes bytes. A run is then the sum of word(i) * x^(64 * (words - 1 - i)), and its CRC is that times x^64, modulo P.
//
//   thread 0   thread 1  ...  thread 255
//   [zeros]    word 0    ...  word 254       the run ends with the last thread: zeros in front change nothing
//   word 255   word 256  ...  word 510       a thread: sum = sum * x^(64 * 256) + word, by eight look-ups
//                                            in the end: each sum times the power of its place, all added

struct Run {
    u64 from;
    u64 bytes;
};

enum : u32 { THREADS = 256 };
// x^64 modulo the polynomial of CRC-64/NVME, and one: both with the lowest bit as the highest power.
enum : u64 { POLYNOMIAL = 0x9a6c9329ac4bc9b5, ONE = 1ull << 63 };

__device__ constexpr u64 times_x(u64 value) {
    return (value >> 1) ^ ((value & 1) ? POLYNOMIAL : 0);
}

__device__ constexpr u64 times(u64 left, u64 right) {
    u64 sum = 0;
    #pragma unroll 1
    for (u32 bit = 0; bit < 64; bit++) {
        sum ^= (left >> 63) ? right : 0;
        left <<= 1;
        right = times_x(right);
    }
    return sum;
}

// x to the power of 64 * `words`.
__device__ constexpr u64 power(u32 words) {
    u64 found = ONE;
    u64 square = POLYNOMIAL;
    #pragma unroll 1
    for (; words > 0; words /= 2) {
        found = (words & 1) ? times(found, square) : found;
        square = times(square, square);
    }
    return found;
}

__device__ __forceinline__ u64 add_byte(u64 sum, u8 byte) {
    sum ^= byte;
    #pragma unroll 1
    for (u32 bit = 0; bit < 8; bit++) {
        sum = times_x(sum);
    }
    return sum;
}

// A word of the run. The run may begin within the first; what is before it counts as zero. A CRC begins with ones:
// they are added to the first eight bytes, wherever those are.
__device__ __forceinline__ u64 word_at(const u64 *words, u64 at, u32 head) {
    u64 word = __ldcs(words + at);
    if (at < 2) {
        const u64 first = ~0ull << (8 * head);
        word = at == 0 ? (word & first) ^ first : word ^ ~first;
    }
    return word;
}

// A sum times a round.
__device__ __forceinline__ u64 after_round(const u64 (&bytes_of)[8][256], u64 sum) {
    u64 next = 0;
    #pragma unroll
    for (u32 place = 0; place < 8; place++) {
        next ^= bytes_of[place][sum >> (8 * place) & 255];
    }
    return next;
}

extern "C" __global__ void __launch_bounds__(256)
    checksums(const Run *__restrict__ table, u32 count, u64 *__restrict__ sums) {
    __shared__ u64 bits[64];
    __shared__ u64 bytes_of[8][256];
    __shared__ u64 parts[THREADS];
    constexpr u64 ROUND = power(THREADS);
    const u32 thread = threadIdx.x;
    // Each byte of a sum, at each of its eight places, times a round.
    if (thread < 64) {
        bits[thread] = times(1ull << thread, ROUND);
    }
    __syncthreads();
    for (u32 place = 0; place < 8; place++) {
        u64 sum = 0;
        for (u32 bit = 0; bit < 8; bit++) {
            sum ^= (thread >> bit & 1) ? bits[8 * place + bit] : 0;
        }
        bytes_of[place][thread] = sum;
    }
    const u64 weight = power(THREADS - 1 - thread);
    __syncthreads();

    for (u32 run = blockIdx.x; run < count; run += gridDim.x) {
        const u64 from = table[run].from;
        const u64 bytes = table[run].bytes;
        const u8 *start = (const u8 *)from;
        if (bytes < 16) {
            if (thread == 0) {
                u64 sum = ~0ull;
                for (u64 at = 0; at < bytes; at++) {
                    sum = add_byte(sum, start[at]);
                }
                sums[run] = ~sum;
            }
            continue;
        }
        const u32 head = from & 7;
        const u64 *words = (const u64 *)(from - head);
        const u64 count_of_words = (head + bytes) / 8;
        const u64 before = (THREADS - count_of_words % THREADS) % THREADS;
        u64 sum = thread < before ? 0 : word_at(words, thread - before, head);
        // The second word may be in the second round, and none of the first two after that.
        u64 at = THREADS + thread - before;
        if (at < count_of_words) {
            sum = after_round(bytes_of, sum) ^ word_at(words, at, head);
        }
        #pragma unroll 4
        for (at += THREADS; at < count_of_words; at += THREADS) {
            sum = after_round(bytes_of, sum) ^ __ldcs(words + at);
        }
        parts[thread] = times(sum, weight);
        for (u32 half = THREADS / 2; half > 0; half /= 2) {
            __syncthreads();
            if (thread < half) {
                parts[thread] ^= parts[thread + half];
            }
        }
        if (thread == 0) {
            u64 sum = times(parts[0], POLYNOMIAL);
            for (u64 at = count_of_words * 8 - head; at < bytes; at++) {
                sum = add_byte(sum, start[at]);
            }
            sums[run] = ~sum;
        }
        // The parts are of the next run from here on.
        __syncthreads();
    }
}
