// Code of orthogonal_masks that C++ and CUDA share: the request, Philox4x32-10, the sizes of the sort.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MIMAE_INLINE __host__ __device__ __forceinline__
#else
#define MIMAE_INLINE inline __attribute__((always_inline))
#endif

namespace mimae {

// N disjoint views of K patches out of L, for each id of a batch: view k shows the patches of ranks kK .. (k+1)K - 1,
// where patches are ranked by (word l of the id's mask stream, l).
struct Masks {
  uint64_t seed;
  uint32_t epoch;
  int32_t patches, views, visible;

  MIMAE_INLINE int32_t hidden() const { return patches - visible; }
  MIMAE_INLINE int32_t word_blocks() const { return (patches + 3) / 4; }

  // Words are uniform. With as many buckets (by leading bits) as patches, a bucket has about one patch. There are at
  // least as many buckets as threads in a warp.
  MIMAE_INLINE int bucket_bits() const {
    int bits = 5;
    while ((1 << bits) < patches) ++bits;
    return bits;
  }
};

constexpr uint32_t MASK_PURPOSE = 1;
constexpr int64_t WORDS_OF_A_STREAM = int64_t{1} << 26;

// Words 4 block .. 4 block + 3 of the mask stream of `id`.
MIMAE_INLINE void mask_words(const Masks& m, int64_t id, uint32_t block, uint32_t words[4]) {
  uint32_t c0 = block + (MASK_PURPOSE << 24), c1 = m.epoch;
  uint32_t c2 = static_cast<uint32_t>(id), c3 = static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32);
  uint32_t k0 = static_cast<uint32_t>(m.seed), k1 = static_cast<uint32_t>(m.seed >> 32);
#if defined(__CUDACC__)
#pragma unroll 5  // unrolling all ten needs more registers than a full processor has
#elif defined(__clang__)
#pragma unroll
#else
#pragma GCC unroll 10  // the compiler vectorises the outer loop only with this
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// In orthogonal_masks.cu. Returns the memory that the launch needs in addition to its outputs, in words: 0 if an image
// fits into shared memory.
int64_t cuda_workspace(const Masks& m, int64_t images);

// Draws ids (images,) into visible (images, N, K) and hidden (images, N, L-K), all on the current device, on `stream`.
// Returns a description of the error, or nullptr.
const char* cuda_draw(const Masks& m, int64_t images, const int64_t* ids, uint32_t* workspace, int32_t* visible,
                      int32_t* hidden, void* stream);

}  // namespace mimae
