// orthogonal_masks on a GPU: a block draws the masks of an image by a sort in shared memory. Each id is read once and
// each output is written once, by warps that write neighbouring places. No output depends on the order of atomics.

#include "orthogonal_masks.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace mimae {
namespace {

constexpr int WARP = 32, MOST_THREADS = 512;
constexpr int BLOCKS_OF_A_PROCESSOR = 4;  // of the largest size; this is the limit of sm_80, 90 and 100
constexpr uint32_t ALL_LANES = 0xFFFFFFFF;

// 32 patches of a view: a mask of those that it shows, and the number of shown patches before them.
struct Group {
  uint32_t shown, before;
};

// Work memory of a block for one image: parts of `memory`.
struct Scratch {
  Group* groups;       // (N, ceil(L / 32))
  uint32_t* words;     // (L,), rounded up to a multiple of 4
  uint32_t* ends;      // (buckets,): counts, then starts, then ends
  uint32_t* bucketed;  // (L,): patches by bucket, in any order inside a bucket

  __device__ Scratch(const Masks& m, uint32_t* memory)
      : groups(reinterpret_cast<Group*>(memory)), words(memory + 2 * int64_t{m.views} * groups_of_a_view(m)),
        ends(words + 4 * m.word_blocks()), bucketed(ends + (1 << m.bucket_bits())) {}

  static MIMAE_INLINE int groups_of_a_view(const Masks& m) { return (m.patches + WARP - 1) / WARP; }

  static MIMAE_INLINE int64_t size(const Masks& m) {
    const int64_t words = 2 * int64_t{m.views} * groups_of_a_view(m) + 4 * m.word_blocks() + (1 << m.bucket_bits()) +
                          m.patches;
    return words + words % 2;  // aligns the next block's groups
  }
};

// Turns counts into starts, in place, by one warp.
__device__ void exclusive_sums(uint32_t* counts, int size) {
  uint32_t sum = 0;
  const int lane = threadIdx.x;
  for (int i = lane; i < size; i += WARP) {
    const uint32_t count = counts[i];
    uint32_t up_to = count;
    for (int distance = 1; distance < WARP; distance *= 2) {
      const uint32_t below = __shfl_up_sync(ALL_LANES, up_to, distance);
      if (lane >= distance) up_to += below;
    }
    counts[i] = sum + up_to - count;
    sum += __shfl_sync(ALL_LANES, up_to, WARP - 1);
  }
}

__device__ void draw(const Masks& m, int64_t id, const Scratch& s, int32_t* visible, int32_t* hidden) {
  const int L = m.patches, N = m.views, K = m.visible, thread = threadIdx.x, threads = blockDim.x;
  const int buckets = 1 << m.bucket_bits(), shift = 32 - m.bucket_bits(), width = Scratch::groups_of_a_view(m);
  const int lane = thread % WARP;

  for (int i = thread; i < N * width; i += threads) s.groups[i].shown = 0;
  for (int i = thread; i < buckets; i += threads) s.ends[i] = 0;
  for (int i = thread; i < m.word_blocks(); i += threads) mask_words(m, id, i, s.words + 4 * i);
  __syncthreads();

  for (int p = thread; p < L; p += threads) atomicAdd(&s.ends[s.words[p] >> shift], 1u);
  __syncthreads();
  if (thread < WARP) exclusive_sums(s.ends, buckets);
  __syncthreads();
  for (int p = thread; p < L; p += threads) s.bucketed[atomicAdd(&s.ends[s.words[p] >> shift], 1u)] = p;
  __syncthreads();

  // A patch's rank is the start of its bucket plus the number of patches before it in the bucket.
  for (int p = thread; p - lane < L; p += threads) {
    int view = N;
    if (p < L) {
      const uint32_t word = s.words[p], bucket = word >> shift, start = bucket ? s.ends[bucket - 1] : 0;
      uint32_t rank = start;
      for (uint32_t i = start; i < s.ends[bucket]; ++i) {
        const int q = s.bucketed[i];
        rank += s.words[q] < word || (s.words[q] == word && q < p);
      }
      view = min(static_cast<int>(rank / K), N);
    }
    const uint32_t same = __match_any_sync(ALL_LANES, view);
    if (view < N && lane == __ffs(same) - 1) s.groups[view * width + p / WARP].shown = same;
  }
  __syncthreads();

  for (int i = thread; i < N * width; i += threads) {
    uint32_t before = 0;
    for (int j = i - i % width; j < i; ++j) before += __popc(s.groups[j].shown);
    s.groups[i].before = before;
  }
  __syncthreads();

  for (int p = thread; p < L; p += threads) {
    for (int k = 0; k < N; ++k) {
      const Group group = s.groups[k * width + p / WARP];
      const int before = group.before + __popc(group.shown & ((1u << lane) - 1));
      const bool shown = group.shown >> lane & 1;
      *(shown ? visible + k * K + before : hidden + k * (L - K) + p - before) = p;
    }
  }
  __syncthreads();  // before the next image
}

template <bool IN_SHARED>
__global__ void __launch_bounds__(MOST_THREADS, BLOCKS_OF_A_PROCESSOR)
    draw_images(Masks m, int64_t images, const int64_t* __restrict__ ids, uint32_t* workspace,
                int32_t* __restrict__ visible, int32_t* __restrict__ hidden) {
  extern __shared__ uint2 shared[];
  const Scratch scratch(m, IN_SHARED ? reinterpret_cast<uint32_t*>(shared)
                                     : workspace + blockIdx.x * Scratch::size(m));
  for (int64_t image = blockIdx.x; image < images; image += gridDim.x)
    draw(m, ids[image], scratch, visible + image * m.views * m.visible, hidden + image * m.views * m.hidden());
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

int64_t scratch_bytes(const Masks& m) { return Scratch::size(m) * sizeof(uint32_t); }

bool fits_shared(const Masks& m) { return scratch_bytes(m) <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// One block for each image. If blocks need parts of the workspace, there are only as many blocks as a GPU can hold.
int64_t blocks(const Masks& m, int64_t images) {
  if (fits_shared(m)) return images;
  return std::min<int64_t>(images, BLOCKS_OF_A_PROCESSOR * attribute(cudaDevAttrMultiProcessorCount));
}

}  // namespace

int64_t cuda_workspace(const Masks& m, int64_t images) {
  return fits_shared(m) ? 0 : blocks(m, images) * Scratch::size(m);
}

const char* cuda_draw(const Masks& m, int64_t images, const int64_t* ids, uint32_t* workspace, int32_t* visible,
                      int32_t* hidden, void* stream) {
  if (images == 0) return nullptr;
  const bool in_shared = fits_shared(m);
  const auto kernel = in_shared ? draw_images<true> : draw_images<false>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min<int64_t>(blocks(m, images), INT32_MAX));
  config.blockDim = dim3(std::min(MOST_THREADS, Scratch::groups_of_a_view(m) * WARP));
  config.dynamicSmemBytes = in_shared ? scratch_bytes(m) : 0;
  config.stream = static_cast<cudaStream_t>(stream);
  // Set the limit, not the size of this launch: another thread's launch may need more.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const cudaError_t outcome = cudaLaunchKernelEx(&config, kernel, m, images, ids, workspace, visible, hidden);
  return outcome == cudaSuccess ? nullptr : cudaGetErrorString(outcome);
}

}  // namespace mimae
