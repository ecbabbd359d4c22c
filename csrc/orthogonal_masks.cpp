// orthogonal_masks on the CPU, and the op for CPU and CUDA through torch's stable ABI. One build works with every torch
// from TORCH_TARGET_VERSION on, and with every Python, because it does not use Python.

#include "orthogonal_masks.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace mimae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int RUN = 8;
typedef int32_t Run __attribute__((vector_size(RUN * sizeof(int32_t))));

// Work memory of a thread that draws one image after the other.
struct Scratch {
  explicit Scratch(const Masks& m)
      : words(4 * m.word_blocks()), ends((size_t{1} << m.bucket_bits()) + 1), ranked(m.patches), view(m.patches),
        next(m.views + 1), by_view(m.patches), row(m.hidden() + RUN) {}

  std::vector<uint32_t> words;
  std::vector<int32_t> ends, ranked, view, next, by_view, row;
};

// Writes visible (N, K) and hidden (N, L-K) of one image, in time linear in their size.
void draw(const Masks& m, int64_t id, Scratch& scratch, int32_t* visible, int32_t* hidden) {
  const int32_t L = m.patches, N = m.views, K = m.visible, blocks = m.word_blocks();
  uint32_t* words = scratch.words.data();
  for (int32_t block = 0; block < blocks; ++block) mask_words(m, id, block, words + 4 * block);

  // Counting sort by bucket; patches in a bucket keep their order.
  const int shift = 32 - m.bucket_bits();
  int32_t *ends = scratch.ends.data(), *ranked = scratch.ranked.data();
  std::fill(scratch.ends.begin(), scratch.ends.end(), 0);
  for (int32_t p = 0; p < L; ++p) ++ends[(words[p] >> shift) + 1];
  for (size_t bucket = 1; bucket < scratch.ends.size(); ++bucket) ends[bucket] += ends[bucket - 1];
  for (int32_t p = 0; p < L; ++p) ranked[ends[words[p] >> shift]++] = p;

  // The order inside a bucket matters only if a view ends inside it.
  for (int32_t k = 1; k <= N && k * K < L; ++k) {
    const uint32_t bucket = words[ranked[k * K]] >> shift;
    std::sort(ranked + (bucket ? ends[bucket - 1] : 0), ranked + ends[bucket], [words](int32_t p, int32_t q) {
      return words[p] < words[q] || (words[p] == words[q] && p < q);
    });
  }

  // Counting sort by view; patches that no view shows come last.
  int32_t *view = scratch.view.data(), *next = scratch.next.data(), *by_view = scratch.by_view.data();
  for (int32_t k = 0; k <= N; ++k) {
    const int32_t end = k < N ? (k + 1) * K : L;
    for (int32_t rank = k * K; rank < end; ++rank) view[ranked[rank]] = k;
    next[k] = k * K;
  }
  for (int32_t p = 0; p < L; ++p) by_view[next[view[p]]++] = p;
  std::copy(by_view, by_view + N * K, visible);

  // The hidden patches between two visible ones are consecutive. RUN of them are always stored at once: there is no
  // branch to mispredict, and the next run overwrites the excess.
  int32_t* row = scratch.row.data();
  Run first;
  for (int i = 0; i < RUN; ++i) first[i] = i;
  for (int32_t k = 0; k < N; ++k) {
    int32_t p = 0;
    for (int32_t j = 0; j <= K; ++j) {
      const int32_t end = j < K ? by_view[k * K + j] : L;
      do {
        const Run run = first + p;
        std::memcpy(row + p - j, &run, sizeof(run));
        p += RUN;
      } while (p < end);
      p = end + 1;
    }
    std::copy(row, row + m.hidden(), hidden + int64_t{k} * m.hidden());
  }
}

// The op

Masks checked(int64_t seed, int64_t epoch, const Tensor& ids, int64_t L, int64_t N, int64_t K) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "sample_ids must be int64 (B,)");
  STD_TORCH_CHECK(0 <= epoch && epoch < int64_t{1} << 32, "epoch ", epoch, " is no 32-bit number");
  STD_TORCH_CHECK(L <= WORDS_OF_A_STREAM, "a stream has words for ", WORDS_OF_A_STREAM, " patches, asked for ", L);
  STD_TORCH_CHECK(N > 0 && K > 0 && K <= L / N, N, " disjoint views of ", K, " patches do not fit into ", L);
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), static_cast<int32_t>(L), static_cast<int32_t>(N),
          static_cast<int32_t>(K)};
}

std::tuple<Tensor, Tensor> outputs(const Tensor& ids, const Masks& m) {
  return {torch::stable::new_empty(ids, {ids.size(0), m.views, m.visible}, ScalarType::Int),
          torch::stable::new_empty(ids, {ids.size(0), m.views, m.hidden()}, ScalarType::Int)};
}

std::tuple<Tensor, Tensor> on_cpu(int64_t seed, int64_t epoch, const Tensor& sample_ids, int64_t L, int64_t N,
                                  int64_t K) {
  constexpr int64_t PATCHES_WORTH_A_THREAD = 8192;
  const Masks m = checked(seed, epoch, sample_ids, L, N, K);
  const Tensor ids = torch::stable::contiguous(sample_ids);
  auto [visible, hidden] = outputs(ids, m);
  const int64_t* from = ids.const_data_ptr<int64_t>();
  int32_t *to_visible = visible.mutable_data_ptr<int32_t>(), *to_hidden = hidden.mutable_data_ptr<int32_t>();
  const auto draw_range = [&](int64_t begin, int64_t end) {
    Scratch scratch(m);
    for (int64_t i = begin; i < end; ++i)
      draw(m, from[i], scratch, to_visible + i * N * K, to_hidden + i * N * m.hidden());
  };
  torch::stable::parallel_for(0, ids.size(0), std::max<int64_t>(1, PATCHES_WORTH_A_THREAD / L), draw_range);
  return {visible, hidden};
}

#if defined(MIMAE_CUDA)
std::tuple<Tensor, Tensor> on_cuda(int64_t seed, int64_t epoch, const Tensor& sample_ids, int64_t L, int64_t N,
                                   int64_t K) {
  const Masks m = checked(seed, epoch, sample_ids, L, N, K);
  STD_TORCH_CHECK(N <= INT32_MAX / L, "the lists of ", N, " views of ", L, " patches pass 2^31 entries in one image");
  const int32_t device = sample_ids.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor ids = torch::stable::contiguous(sample_ids);
  auto [visible, hidden] = outputs(ids, m);
  const Tensor workspace = torch::stable::new_empty(ids, {cuda_workspace(m, ids.size(0))}, ScalarType::Int);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* mistake = cuda_draw(m, ids.size(0), ids.const_data_ptr<int64_t>(),
                                  reinterpret_cast<uint32_t*>(workspace.mutable_data_ptr<int32_t>()),
                                  visible.mutable_data_ptr<int32_t>(), hidden.mutable_data_ptr<int32_t>(), stream);
  STD_TORCH_CHECK(mistake == nullptr, mistake);
  return {visible, hidden};
}
#endif

}  // namespace
}  // namespace mimae

STABLE_TORCH_LIBRARY_FRAGMENT(mimae, library) {
  library.def(
      "orthogonal_masks_native(int seed, int epoch, Tensor sample_ids, int num_patches, int num_views, int num_visible)"
      " -> (Tensor visible, Tensor hidden)");
}

STABLE_TORCH_LIBRARY_IMPL(mimae, CPU, library) {
  library.impl("orthogonal_masks_native", TORCH_BOX(&mimae::on_cpu));
}

#if defined(MIMAE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(mimae, CUDA, library) {
  library.impl("orthogonal_masks_native", TORCH_BOX(&mimae::on_cuda));
}
#endif
