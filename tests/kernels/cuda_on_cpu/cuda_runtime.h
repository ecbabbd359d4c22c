// CUDA for a machine without a GPU, as much of it as csrc needs: a block is run by one host thread for each of its
// threads, blocks one after the other. What __syncthreads() and the warp's functions promise holds, and nothing more.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline int shared_limit;  // set by the test

struct Warp {
  std::barrier<> all{32};
  uint32_t values[32];

  // Each lane gives a value and reads those of all.
  template <class Read>
  auto exchange(uint32_t value, Read read) {
    values[threadIdx.x % 32] = value;
    all.arrive_and_wait();
    const auto result = read(values);
    all.arrive_and_wait();
    return result;
  }
};

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline Warp& warp() { return *warps[threadIdx.x / 32]; }

inline uint32_t __shfl_sync(uint32_t, uint32_t value, int lane) {
  return warp().exchange(value, [=](const uint32_t* values) { return values[lane]; });
}

inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, int distance) {
  const int lane = threadIdx.x % 32, from = lane < distance ? lane : lane - distance;
  return warp().exchange(value, [=](const uint32_t* values) { return values[from]; });
}

inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  return warp().exchange(value, [=](const uint32_t* values) {
    uint32_t same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= uint32_t{values[lane] == value} << lane;
    return same;
  });
}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t atomicAdd(uint32_t* place, uint32_t value) { return std::atomic_ref(*place).fetch_add(value); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? shared_limit : 1;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  block_barrier = std::make_unique<std::barrier<>>(blockDim.x);
  warps.clear();
  for (unsigned i = 0; i < blockDim.x / 32; ++i) warps.push_back(std::make_unique<Warp>());
  for (unsigned block = 0; block < gridDim.x; ++block) {
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < blockDim.x; ++thread)
      threads.emplace_back([=] {
        blockIdx.x = block;
        threadIdx.x = thread;
        kernel(arguments...);
      });
    for (std::thread& thread : threads) thread.join();
  }
  return cudaSuccess;
}
