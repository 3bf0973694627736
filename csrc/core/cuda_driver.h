// The CUDA driver, found when it is first needed and never linked.
#ifndef SHARDCKPT_CORE_CUDA_DRIVER_H_
#define SHARDCKPT_CORE_CUDA_DRIVER_H_

#include <string>

#include "core/cuda_min.h"
#include "core/status.h"

namespace shardckpt {

// As cuDriverGetVersion tells it: CUDA 11.8, the oldest that a supported torch or JAX runs on.
inline constexpr int kMinDriverVersion = 11080;

// Functions of a loaded driver. Immutable once loaded; the library is never unloaded.
struct CudaDriver : cuda::Functions {
  int version = 0;  // 12040 is CUDA 12.4.

  // Loads the driver and calls cuInit, which makes no context.
  // kUnavailable: there is none, it lacks a function, is too old, or finds no device.
  static Status Load(const std::string& path, CudaDriver* out);

  // The driver of this process: libcuda.so.1, or what SHARDCKPT_LIBCUDA names (for tests). Tries
  // once, when it is first called; later calls repeat the outcome. Thread-safe.
  static Status Get(const CudaDriver** out);

  // Ok for kSuccess. Else kNoMemory or kDevice, and a message "<what> failed: <name> (<number>):
  // <text>".
  Status Check(cuda::Result result, const std::string& what) const;
};

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_CUDA_DRIVER_H_
