// Runs csrc/orthogonal_masks.cu on the CPU. Arguments: seed, epoch, L, N, K, bytes of shared memory, ids.
// Prints visible, then hidden, one number a line.

#include "orthogonal_masks.cu"

#include <cstdio>
#include <cstdlib>

namespace mimae {
namespace {
uint2 shared[1 << 14];
}
}  // namespace mimae

int main(int count, char** arguments) {
  const auto number = [&](int i) { return static_cast<int64_t>(std::strtoull(arguments[i], nullptr, 10)); };
  const mimae::Masks masks = {static_cast<uint64_t>(number(1)), static_cast<uint32_t>(number(2)),
                              static_cast<int32_t>(number(3)), static_cast<int32_t>(number(4)),
                              static_cast<int32_t>(number(5))};
  shared_limit = static_cast<int>(number(6));
  std::vector<int64_t> ids;
  for (int i = 7; i < count; ++i) ids.push_back(number(i));

  const auto images = static_cast<int64_t>(ids.size());
  std::vector<uint32_t> workspace(mimae::cuda_workspace(masks, images), 0xDEADBEEF);
  std::vector<int32_t> visible(images * masks.views * masks.visible, -1);
  std::vector<int32_t> hidden(images * masks.views * masks.hidden(), -1);
  const char* mistake =
      mimae::cuda_draw(masks, images, ids.data(), workspace.data(), visible.data(), hidden.data(), nullptr);
  if (mistake) return 1;
  for (int32_t p : visible) std::printf("%d\n", p);
  for (int32_t p : hidden) std::printf("%d\n", p);
}
