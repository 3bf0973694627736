// Holds our own declarations against the CUDA headers, where they are installed. Compiled, not run.
#include "core/cuda_min.h"

#if __has_include(<cuda.h>)

#include <cuda.h>

#include <cstddef>
#include <string_view>
#include <type_traits>

namespace shardckpt::cuda {
namespace {

template <typename A, typename B>
constexpr bool kSameShape = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;

template <typename Ours, typename Theirs>
constexpr bool kSameFunction = false;
template <typename R1, typename... A1, typename R2, typename... A2>
  requires(sizeof...(A1) == sizeof...(A2))
constexpr bool kSameFunction<R1(A1...), R2(A2...)> =
    kSameShape<R1, R2> && (kSameShape<A1, A2> && ...);

#define TEXT(name) #name
// `name` has become what the header's macro makes of it, suffix included.
#define SAME(name, symbol, parameters)                                      \
  static_assert(std::string_view(TEXT(name)) == symbol, "another version"); \
  static_assert(kSameFunction<Result parameters, decltype(::name)>, symbol);
#define SAME_AS_HEADER(name, symbol, parameters) SAME(name, symbol, parameters)
SHARDCKPT_CUDA_SYMBOLS(SAME_AS_HEADER)
SHARDCKPT_CUDA_TRAINER_SYMBOLS(SAME_AS_HEADER)

static_assert(sizeof(Memcpy2D) == sizeof(CUDA_MEMCPY2D));
static_assert(offsetof(Memcpy2D, src_device) == offsetof(CUDA_MEMCPY2D, srcDevice));
static_assert(offsetof(Memcpy2D, src_pitch) == offsetof(CUDA_MEMCPY2D, srcPitch));
static_assert(offsetof(Memcpy2D, dst_host) == offsetof(CUDA_MEMCPY2D, dstHost));
static_assert(offsetof(Memcpy2D, dst_pitch) == offsetof(CUDA_MEMCPY2D, dstPitch));
static_assert(offsetof(Memcpy2D, height) == offsetof(CUDA_MEMCPY2D, Height));

static_assert(kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(kNotInitialized == CUDA_ERROR_NOT_INITIALIZED);
static_assert(kDeinitialized == CUDA_ERROR_DEINITIALIZED);
static_assert(kInvalidContext == CUDA_ERROR_INVALID_CONTEXT);
static_assert(kInvalidHandle == CUDA_ERROR_INVALID_HANDLE);
static_assert(kNotReady == CUDA_ERROR_NOT_READY);
static_assert(kIllegalAddress == CUDA_ERROR_ILLEGAL_ADDRESS);
static_assert(kAlreadyRegistered == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
static_assert(kNotRegistered == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
static_assert(kCaptureUnsupported == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
static_assert(kCaptureImplicit == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);
static_assert(kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(kPointerContext == CU_POINTER_ATTRIBUTE_CONTEXT);
static_assert(kPointerDeviceOrdinal == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
static_assert(kMemoryHost == CU_MEMORYTYPE_HOST);
static_assert(kMemoryDevice == CU_MEMORYTYPE_DEVICE);
static_assert(kCaptureNone == CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(kCaptureActive == CU_STREAM_CAPTURE_STATUS_ACTIVE);
static_assert(kCaptureModeGlobal == CU_STREAM_CAPTURE_MODE_GLOBAL);
static_assert(kCaptureModeRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);

}  // namespace
}  // namespace shardckpt::cuda

#endif
