#include "core/cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>

namespace shardckpt {
namespace {

Status Unavailable(std::string message) {
  return Status::Of(StatusCode::kUnavailable, std::move(message));
}

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

struct Outcome {
  CudaDriver driver;
  Status status;
};

Outcome LoadOnce() {
  const char* told = std::getenv("SHARDCKPT_LIBCUDA");
  Outcome outcome;
  outcome.status =
      CudaDriver::Load(told == nullptr || *told == '\0' ? "libcuda.so.1" : told, &outcome.driver);
  return outcome;
}

}  // namespace

Status CudaDriver::Load(const std::string& path, CudaDriver* out) {
  // The framework's own handle first: two drivers in one process would not share contexts.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) library = dlopen(path.c_str(), RTLD_NOW);
  if (library == nullptr) {
    const char* error = dlerror();
    return Unavailable("the CUDA driver " + path +
                       " cannot be loaded: " + (error == nullptr ? "unknown error" : error) +
                       ". Install the NVIDIA driver, or save arrays of host memory.");
  }
  const char* missing = nullptr;
#define SHARDCKPT_CUDA_FIND(name, symbol, parameters)                        \
  out->name = reinterpret_cast<decltype(out->name)>(dlsym(library, symbol)); \
  if (out->name == nullptr && missing == nullptr) missing = symbol;
  SHARDCKPT_CUDA_SYMBOLS(SHARDCKPT_CUDA_FIND)
#undef SHARDCKPT_CUDA_FIND
  if (missing != nullptr) {
    return Unavailable("the CUDA driver " + path + " has no function " + missing +
                       ". Install a driver for CUDA " + VersionText(kMinDriverVersion) +
                       " or newer.");
  }
  if (Status status = out->Check(out->cuDriverGetVersion(&out->version), "cuDriverGetVersion");
      !status.ok()) {
    return status;
  }
  if (out->version < kMinDriverVersion) {
    return Unavailable("the CUDA driver " + path + " is for CUDA " + VersionText(out->version) +
                       ", needed is " + VersionText(kMinDriverVersion) +
                       " or newer. Install a newer driver.");
  }
  if (Status status = out->Check(out->cuInit(0), "cuInit"); !status.ok()) {
    return Unavailable("the CUDA driver " + path + " finds no device: " + status.message());
  }
  return Status::Ok();
}

Status CudaDriver::Get(const CudaDriver** out) {
  static const Outcome outcome = LoadOnce();
  *out = &outcome.driver;
  return outcome.status;
}

Status CudaDriver::Check(cuda::Result result, const std::string& what) const {
  if (result == cuda::kSuccess) return Status::Ok();
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  return Status::Of(result == cuda::kOutOfMemory ? StatusCode::kNoMemory : StatusCode::kDevice,
                    what + " failed: " + (name == nullptr ? "unknown CUDA error" : name) + " (" +
                        std::to_string(result) + ")" +
                        (text == nullptr ? "" : std::string(": ") + text));
}

}  // namespace shardckpt
