// The outcome of a core call: a code and a message that holds operation and values. The core never
// throws.
#ifndef SHARDCKPT_CORE_STATUS_H_
#define SHARDCKPT_CORE_STATUS_H_

#include <string>
#include <utility>

namespace shardckpt {

enum class StatusCode {
  kOk,
  kInvalid,      // The caller passed nonsense; nothing was touched.
  kIo,           // The operating system refused; system_errno() says why.
  kUnavailable,  // What the call needs is not on this machine: no driver, too old, no device.
  kDevice,       // The CUDA driver refused or the device failed; the message names its error.
  kNoMemory,     // The driver has no room, or may not lock more memory.
  kTimeout,      // Not yet; the call may be made again.
};

// Owns its message. Immutable, so that it may be read from any thread.
class [[nodiscard]] Status {
 public:
  Status() = default;

  static Status Ok() { return Status(); }
  static Status Invalid(std::string message) {
    return Status(StatusCode::kInvalid, 0, std::move(message));
  }
  static Status Io(int system_errno, std::string message) {
    return Status(StatusCode::kIo, system_errno, std::move(message));
  }
  static Status Of(StatusCode code, std::string message) {
    return Status(code, 0, std::move(message));
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  // errno of the failed system call; 0 unless the code is kIo.
  int system_errno() const { return system_errno_; }
  const std::string& message() const { return message_; }

 private:
  Status(StatusCode code, int system_errno, std::string message)
      : code_(code), system_errno_(system_errno), message_(std::move(message)) {}

  StatusCode code_ = StatusCode::kOk;
  int system_errno_ = 0;
  std::string message_;
};

}  // namespace shardckpt

#endif  // SHARDCKPT_CORE_STATUS_H_
