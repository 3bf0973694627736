// The part of the CUDA driver interface that this project uses, declared by ourselves: building
// needs no CUDA. tests/cuda_header_test.cc holds every line against cuda.h where one is installed.
#ifndef SHARDCKPT_CORE_CUDA_MIN_H_
#define SHARDCKPT_CORE_CUDA_MIN_H_

#include <cstddef>
#include <cstdint>

namespace shardckpt::cuda {

using Result = int;
using DeviceId = int;
using DevicePtr = unsigned long long;
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Event = struct CUevent_st*;
using HostFunction = void (*)(void* told);

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNotInitialized = 3;
inline constexpr Result kDeinitialized = 4;
inline constexpr Result kInvalidContext = 201;
inline constexpr Result kInvalidHandle = 400;
inline constexpr Result kNotReady = 600;
inline constexpr Result kIllegalAddress = 700;
inline constexpr Result kAlreadyRegistered = 712;
inline constexpr Result kNotRegistered = 713;
inline constexpr Result kCaptureUnsupported = 900;
inline constexpr Result kCaptureImplicit = 906;

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr int kPointerContext = 1;
inline constexpr int kPointerDeviceOrdinal = 9;
inline constexpr int kMemoryHost = 1;
inline constexpr int kMemoryDevice = 2;
inline constexpr int kCaptureNone = 0;
inline constexpr int kCaptureActive = 1;
inline constexpr int kCaptureModeGlobal = 0;
inline constexpr int kCaptureModeRelaxed = 2;

struct Memcpy2D {
  size_t src_x, src_y;
  int src_memory_type;
  const void* src_host;
  DevicePtr src_device;
  void* src_array;
  size_t src_pitch;
  size_t dst_x, dst_y;
  int dst_memory_type;
  void* dst_host;
  DevicePtr dst_device;
  void* dst_array;
  size_t dst_pitch;
  size_t width_bytes, height;
};

// X(name in cuda.h, symbol in libcuda.so.1, parameters). The header hides the suffixes behind
// macros; the plain names are older functions with other parameters. None is a _ptsz name: those
// give stream 0 another meaning.
#define SHARDCKPT_CUDA_SYMBOLS(X)                                                             \
  X(cuInit, "cuInit", (unsigned flags))                                                       \
  X(cuDriverGetVersion, "cuDriverGetVersion", (int* version))                                 \
  X(cuGetErrorName, "cuGetErrorName", (Result error, const char** out))                       \
  X(cuGetErrorString, "cuGetErrorString", (Result error, const char** out))                   \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int* count))                                       \
  X(cuDeviceGet, "cuDeviceGet", (DeviceId * device, int ordinal))                             \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context * out, DeviceId device))   \
  X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (DeviceId device))             \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (Context context))                               \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (Context * out))                                   \
  X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int* mode))      \
  X(cuMemHostRegister, "cuMemHostRegister_v2", (void* address, size_t bytes, unsigned flags)) \
  X(cuMemHostUnregister, "cuMemHostUnregister", (void* address))                              \
  X(cuPointerGetAttribute, "cuPointerGetAttribute", (void* out, int attribute, DevicePtr p))  \
  X(cuStreamCreate, "cuStreamCreate", (Stream * out, unsigned flags))                         \
  X(cuStreamDestroy, "cuStreamDestroy_v2", (Stream stream))                                   \
  X(cuStreamSynchronize, "cuStreamSynchronize", (Stream stream))                              \
  X(cuStreamIsCapturing, "cuStreamIsCapturing", (Stream stream, int* status))                 \
  X(cuStreamWaitEvent, "cuStreamWaitEvent", (Stream stream, Event event, unsigned flags))     \
  X(cuEventCreate, "cuEventCreate", (Event * out, unsigned flags))                            \
  X(cuEventDestroy, "cuEventDestroy_v2", (Event event))                                       \
  X(cuEventRecord, "cuEventRecord", (Event event, Stream stream))                             \
  X(cuEventQuery, "cuEventQuery", (Event event))                                              \
  X(cuEventSynchronize, "cuEventSynchronize", (Event event))                                  \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2",                                                \
    (void* dst, DevicePtr src, size_t bytes, Stream stream))                                  \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2",                                                \
    (DevicePtr dst, const void* src, size_t bytes, Stream stream))                            \
  X(cuMemcpy2DAsync, "cuMemcpy2DAsync_v2", (const Memcpy2D* copy, Stream stream))

// What only tests call: the trainer's side.
#define SHARDCKPT_CUDA_TRAINER_SYMBOLS(X)                              \
  X(cuMemAlloc, "cuMemAlloc_v2", (DevicePtr * out, size_t bytes))      \
  X(cuMemFree, "cuMemFree_v2", (DevicePtr address))                    \
  X(cuMemsetD8Async, "cuMemsetD8Async",                                \
    (DevicePtr dst, unsigned char value, size_t bytes, Stream stream)) \
  X(cuLaunchHostFunc, "cuLaunchHostFunc", (Stream stream, HostFunction function, void* told))

#define SHARDCKPT_CUDA_MEMBER(name, symbol, parameters) Result(*name) parameters = nullptr;
struct Functions {
  SHARDCKPT_CUDA_SYMBOLS(SHARDCKPT_CUDA_MEMBER)
};
struct TrainerFunctions {
  SHARDCKPT_CUDA_TRAINER_SYMBOLS(SHARDCKPT_CUDA_MEMBER)
};
#undef SHARDCKPT_CUDA_MEMBER

}  // namespace shardckpt::cuda

#endif  // SHARDCKPT_CORE_CUDA_MIN_H_
