// The only file that touches Python: turns buffers into spans, drops the GIL around every core
// call, and turns a Status into a Python exception.
#include <Python.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/chunk_read.h"
#include "core/copy.h"
#include "core/crc32c.h"
#include "core/cuda_driver.h"
#include "core/device.h"
#include "core/device_stage.h"
#include "core/engine.h"
#include "core/file.h"
#include "core/memory_limit.h"
#include "core/status.h"

namespace nb = nanobind;

namespace shardckpt {
namespace {

bool IsFinalizing() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Drops the GIL for a block. A thread that comes back while the interpreter ends stays here: until
// 3.14 Python would end it by unwinding its stack, which in C++ aborts the whole process.
class GilReleased {
 public:
  GilReleased() : was_finalizing_(IsFinalizing()), state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    // Only the thread that ends the interpreter can have had the GIL then; it goes on.
    while (!was_finalizing_ && IsFinalizing()) pause();
    PyEval_RestoreThread(state_);
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  const bool was_finalizing_;
  PyThreadState* const state_;
};

// Holds a contiguous buffer of a Python object; needs the GIL to be made and to go.
class Buffer {
 public:
  explicit Buffer(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
      throw nb::python_error();
    }
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const void* data() const { return view_.buf; }
  size_t size_bytes() const { return static_cast<size_t>(view_.len); }

  std::span<const int64_t> rows() const {
    const char code = view_.format == nullptr ? 'B' : view_.format[0];
    if (view_.itemsize != sizeof(int64_t) || (code != 'q' && code != 'l')) {
      throw nb::value_error("rows are not 64-bit integers; pass an array('q').");
    }
    return {static_cast<const int64_t*>(view_.buf), size_bytes() / sizeof(int64_t)};
  }

 private:
  Py_buffer view_;
};

// Null: an OSError with its errno.
PyObject* ErrorFor(StatusCode code) {
  switch (code) {
    case StatusCode::kUnavailable:
    case StatusCode::kDevice:
      return PyExc_RuntimeError;
    case StatusCode::kNoMemory:
      return PyExc_MemoryError;
    case StatusCode::kTimeout:
      return PyExc_TimeoutError;
    default:
      return nullptr;
  }
}

void RaiseUnlessOk(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalid) throw nb::value_error(status.message().c_str());
  if (PyObject* error = ErrorFor(status.code()); error != nullptr) {
    PyErr_SetString(error, status.message().c_str());
    throw nb::python_error();
  }
  // OSError picks its subclass by errno only when it is called with both arguments.
  nb::object error =
      nb::borrow(PyExc_OSError)(status.system_errno(), nb::str(status.message().c_str()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

uint32_t Crc32cOfBuffer(nb::handle data, uint32_t initial) {
  const Buffer buffer(data);
  const GilReleased unlocked;
  return Crc32c(initial, buffer.data(), buffer.size_bytes());
}

template <typename Byte>
Byte* Memory(uintptr_t address) {
  return reinterpret_cast<Byte*>(address);
}

uint32_t Crc32cAt(uintptr_t address, size_t size_bytes, uint32_t initial) {
  if (address == 0 && size_bytes > 0) {
    throw nb::value_error("crc32c_at: a null address with bytes; pass memory that exists.");
  }
  const GilReleased unlocked;
  return Crc32c(initial, Memory<const void>(address), size_bytes);
}

nb::bytes ChunkCrcsOfRows(nb::handle rows, uint32_t seed, int64_t chunk_bytes) {
  const Buffer buffer(rows);
  const std::span<const int64_t> fields = buffer.rows();
  static_assert(sizeof(ChunkRow) == 3 * sizeof(int64_t));
  if (fields.size() % 3 != 0) {
    throw nb::value_error("chunk_crcs: rows are not triples [address, nbytes, file_offset].");
  }
  const std::span<const ChunkRow> table(reinterpret_cast<const ChunkRow*>(fields.data()),
                                        fields.size() / 3);
  size_t num_chunks = 0;
  RaiseUnlessOk(CountChunks(table, chunk_bytes, &num_chunks));
  nb::object out =
      nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(4 * num_chunks)));
  if (!out.is_valid()) throw nb::python_error();
  auto* bytes = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr()));
  {
    const GilReleased unlocked;
    ChunkCrcs(table, seed, chunk_bytes, bytes);
  }
  return nb::borrow<nb::bytes>(out);
}

void CopyTable(nb::handle rows, int64_t num_threads) {
  const Buffer buffer(rows);
  const std::span<const int64_t> table = buffer.rows();
  Status status;
  {
    const GilReleased unlocked;
    status = CopyRows(table, num_threads);
  }
  RaiseUnlessOk(status);
}

void WriteFullAt(int fd, uintptr_t address, size_t size_bytes, int64_t offset_bytes) {
  Status status;
  {
    const GilReleased unlocked;
    status = WriteFull(SystemFileOps(), fd, Memory<const void>(address), size_bytes, offset_bytes);
  }
  RaiseUnlessOk(status);
}

size_t ReadFullAt(int fd, uintptr_t address, size_t size_bytes, int64_t offset_bytes) {
  Status status;
  size_t num_read_bytes = 0;
  {
    const GilReleased unlocked;
    status = ReadFull(SystemFileOps(), fd, Memory<void>(address), size_bytes, offset_bytes,
                      &num_read_bytes);
  }
  RaiseUnlessOk(status);
  return num_read_bytes;
}

const char* NameOf(FailureKind kind) {
  switch (kind) {
    case FailureKind::kTorn:
      return "torn";
    case FailureKind::kGone:
      return "gone";
    case FailureKind::kWrite:
      return "write";
    case FailureKind::kDevice:
      return "device";
    case FailureKind::kCancelled:
      return "cancelled";
    case FailureKind::kNone:
      break;
  }
  return "";
}

// Owns an engine; one whose threads hang, or that a fork copied, is leaked.
class PyEngine {
 public:
  PyEngine(int64_t num_copy_threads, int64_t num_flush_threads, std::vector<int> cpus) {
    RaiseUnlessOk(Engine::Create({num_copy_threads, num_flush_threads, std::move(cpus)}, &engine_));
  }
  ~PyEngine() { Close(1000); }

  bool Close(int64_t timeout_ms) {
    if (engine_ == nullptr) return true;
    const GilReleased unlocked;
    const bool is_closed = engine_->Close(timeout_ms);
    Engine* engine = engine_.release();
    if (is_closed) delete engine;
    return is_closed;
  }

  void Reserve(int64_t size_bytes, int64_t most_bytes) {
    RaiseUnlessOk(Unlocked([&](Engine& e) { return e.Reserve(size_bytes, most_bytes); }));
  }

  int64_t Begin(nb::handle rows, nb::handle file_bytes, bool check_all, nb::handle streams) {
    const Buffer numbers(rows);
    const Buffer files(file_bytes);
    const std::optional<Buffer> pairs = BufferUnlessNone(streams);
    const std::span<const int64_t> numbers_span = numbers.rows();
    const std::span<const int64_t> files_span = files.rows();
    const std::span<const DeviceStream> streams_span = StreamsOf(pairs);
    int64_t ticket = 0;
    RaiseUnlessOk(Unlocked([&](Engine& e) {
      return e.Begin(numbers_span, files_span, check_all, &ticket, streams_span);
    }));
    return ticket;
  }

  bool WaitStaged(int64_t ticket, int64_t group, int64_t timeout_ms, nb::handle streams) {
    const std::optional<Buffer> pairs = BufferUnlessNone(streams);
    const std::span<const DeviceStream> streams_span = StreamsOf(pairs);
    return Unlocked(
        [&](Engine& e) { return e.WaitStaged(ticket, group, timeout_ms, streams_span); });
  }

  std::string PinProblem() { return Checked().PinProblem(); }

  void Attach(int64_t ticket, int64_t file, int fd, int direct_fd, uintptr_t calls) {
    const FileOps* ops = calls == 0 ? &SystemFileOps() : reinterpret_cast<const FileOps*>(calls);
    RaiseUnlessOk(Unlocked([&](Engine& e) { return e.Attach(ticket, file, fd, direct_fd, ops); }));
  }

  bool WaitFlushed(int64_t ticket, int64_t file, int64_t timeout_ms) {
    return Unlocked([&](Engine& e) { return e.WaitFlushed(ticket, file, timeout_ms); });
  }

  nb::object Take(int64_t ticket, int64_t file, int64_t timeout_ms) {
    Engine::Taken taken;
    RaiseUnlessOk(Unlocked([&](Engine& e) { return e.Take(ticket, file, timeout_ms, &taken); }));
    if (!taken.more) return nb::none();
    return nb::make_tuple(taken.extent, reinterpret_cast<uintptr_t>(taken.data), taken.size_bytes,
                          taken.offset_bytes);
  }

  void Give(int64_t ticket, int64_t extent) {
    RaiseUnlessOk(Unlocked([&](Engine& e) { return e.Give(ticket, extent); }));
  }

  nb::bytes ChunkCrcsOf(int64_t ticket, int64_t file, uint32_t seed) {
    std::vector<uint8_t> out;
    RaiseUnlessOk(Unlocked([&](Engine& e) { return e.ChunkCrcsOf(ticket, file, seed, &out); }));
    return nb::bytes(out.data(), out.size());
  }

  std::tuple<std::string, int64_t, int64_t, int, std::string> FailureOf(int64_t ticket) {
    const Failure failure = Unlocked([&](Engine& e) { return e.FailureOf(ticket); });
    return {NameOf(failure.kind), failure.payload, failure.file, failure.system_errno,
            failure.message};
  }

  void Cancel(int64_t ticket, const std::string& why) {
    Unlocked([&](Engine& e) {
      e.Cancel(ticket, why);
      return true;
    });
  }

  bool Release(int64_t ticket, int64_t timeout_ms) {
    return Unlocked([&](Engine& e) { return e.Release(ticket, timeout_ms); });
  }

  void SetRate(int64_t bytes_per_s) { Checked().SetRate(bytes_per_s); }
  void SetPaused(bool is_paused) { Checked().SetPaused(is_paused); }

  std::tuple<int64_t, int64_t, int64_t> Stats() {
    const EngineStats stats = Checked().Stats();
    return {stats.num_slots, stats.num_free_slots, stats.written_bytes};
  }

 private:
  static std::optional<Buffer> BufferUnlessNone(nb::handle object) {
    if (object.is_none()) return std::nullopt;
    return std::optional<Buffer>(std::in_place, object);
  }

  static std::span<const DeviceStream> StreamsOf(const std::optional<Buffer>& pairs) {
    static_assert(sizeof(DeviceStream) == 2 * sizeof(int64_t));
    if (!pairs.has_value()) return {};
    const std::span<const int64_t> fields = pairs->rows();
    if (fields.size() % 2 != 0) throw nb::value_error("streams are not pairs [device, stream].");
    return {reinterpret_cast<const DeviceStream*>(fields.data()), fields.size() / 2};
  }

  Engine& Checked() {
    if (engine_ == nullptr) throw nb::value_error("the staging engine is closed.");
    return *engine_;
  }

  template <typename Call>
  std::invoke_result_t<Call, Engine&> Unlocked(Call call) {
    Engine& engine = Checked();
    const GilReleased unlocked;
    return call(engine);
  }

  std::unique_ptr<Engine> engine_;
};

// [where the range or the file ended, offset of the first bad chunk or -1, its checksum].
nb::tuple RaiseOrReturn(const Status& status, const ChunkOutcome& outcome) {
  RaiseUnlessOk(status);
  return nb::make_tuple(outcome.end_bytes, outcome.bad_offset_bytes, outcome.found_crc);
}

// Holds the buffers of a range while the core works on it.
class Chunks {
 public:
  Chunks(int64_t start_bytes, int64_t stop_bytes, nb::handle pieces, nb::handle rows,
         nb::handle crcs, uint32_t seed, int64_t chunk_bytes)
      : pieces_(pieces), rows_(rows), crcs_(crcs) {
    static_assert(sizeof(ChunkPiece) == 4 * sizeof(int64_t));
    const std::span<const int64_t> fields = pieces_.rows();
    if (fields.size() % 4 != 0) {
      throw nb::value_error(
          "chunks: pieces are not rows of [offset, nbytes, first_chunk, address].");
    }
    range_ = {start_bytes,
              stop_bytes,
              {reinterpret_cast<const ChunkPiece*>(fields.data()), fields.size() / 4},
              rows_.rows(),
              {static_cast<const uint8_t*>(crcs_.data()), crcs_.size_bytes()},
              seed,
              chunk_bytes};
  }

  const ChunkRange& range() const { return range_; }

 private:
  const Buffer pieces_;
  const Buffer rows_;
  const Buffer crcs_;
  ChunkRange range_;
};

nb::tuple ReadChunksOf(int fd, int direct_fd, uintptr_t calls, int64_t start_bytes,
                       int64_t stop_bytes, nb::handle pieces, nb::handle rows, nb::handle crcs,
                       uint32_t seed, int64_t chunk_bytes) {
  const Chunks chunks(start_bytes, stop_bytes, pieces, rows, crcs, seed, chunk_bytes);
  const FileOps* ops = calls == 0 ? &SystemFileOps() : reinterpret_cast<const FileOps*>(calls);
  ChunkOutcome outcome{};
  Status status;
  {
    const GilReleased unlocked;
    status = ReadChunks({ops, fd, direct_fd}, chunks.range(), &outcome);
  }
  return RaiseOrReturn(status, outcome);
}

nb::tuple PlaceChunksOf(uintptr_t address, int64_t start_bytes, int64_t stop_bytes,
                        nb::handle pieces, nb::handle rows, nb::handle crcs, uint32_t seed,
                        int64_t chunk_bytes) {
  const Chunks chunks(start_bytes, stop_bytes, pieces, rows, crcs, seed, chunk_bytes);
  ChunkOutcome outcome{};
  Status status;
  {
    const GilReleased unlocked;
    status = PlaceChunks(Memory<const uint8_t>(address), chunks.range(), &outcome);
  }
  return RaiseOrReturn(status, outcome);
}

std::tuple<int, int, std::string> ProbeCuda() {
  const GilReleased unlocked;
  const CudaDriver* driver = nullptr;
  int num_devices = 0;
  Status status = CudaDriver::Get(&driver);
  if (status.ok())
    status = driver->Check(driver->cuDeviceGetCount(&num_devices), "counting devices");
  return {driver->version, num_devices, status.message()};
}

// Owns a stage; one whose device hangs, or that a fork copied, is leaked.
class PyDeviceStage {
 public:
  PyDeviceStage(int ordinal, int64_t piece_bytes, int64_t num_in_flight) {
    DeviceStageOptions options;
    options.piece_bytes = piece_bytes;
    options.num_in_flight = num_in_flight;
    Status status;
    {
      const GilReleased unlocked;
      status = Device::Open(ordinal, &device_);
      if (status.ok()) status = DeviceStage::Open(device_, options, &stage_);
    }
    RaiseUnlessOk(status);
  }
  ~PyDeviceStage() { Close(1000); }

  bool Close(int64_t timeout_ms) {
    if (stage_ == nullptr) return true;
    const GilReleased unlocked;
    const bool is_closed = stage_->Close(timeout_ms);
    DeviceStage* stage = stage_.release();
    if (is_closed) {
      delete stage;
      device_.reset();
    } else {
      static_cast<void>(new std::shared_ptr<Device>(std::move(device_)));
    }
    return is_closed;
  }

  void Pin(uintptr_t address, int64_t size_bytes) {
    Unlocked([&] { return device_->Pin(Memory<void>(address), size_bytes); });
  }
  void Unpin(uintptr_t address) {
    Unlocked([&] { return device_->Unpin(Memory<void>(address)); });
  }
  void After(uint64_t stream) {
    Unlocked([&] { return stage_->After(stream); });
  }
  void Add(nb::handle rows) {
    const Buffer buffer(rows);
    const std::span<const int64_t> fields = buffer.rows();
    if (fields.size() % 3 != 0) {
      throw nb::value_error(
          "device_stage: rows are not triples [dst_address, src_address, nbytes].");
    }
    std::vector<DeviceBatch> batches(fields.size() / 3);
    for (size_t i = 0; i < batches.size(); ++i) {
      batches[i].copies.push_back({Memory<void>(static_cast<uintptr_t>(fields[3 * i])),
                                   static_cast<uint64_t>(fields[3 * i + 1]), fields[3 * i + 2]});
    }
    Unlocked([&] { return stage_->Add(std::move(batches)); });
  }
  void Fence(uint64_t stream) {
    Unlocked([&] { return stage_->Fence(stream); });
  }
  void Wait(int64_t timeout_ms) {
    Unlocked([&] { return stage_->Wait(timeout_ms); });
  }

 private:
  template <typename Call>
  void Unlocked(Call call) {
    if (stage_ == nullptr) throw nb::value_error("the device stage is closed.");
    Status status;
    {
      const GilReleased unlocked;
      status = call();
    }
    RaiseUnlessOk(status);
  }

  std::shared_ptr<Device> device_;
  std::unique_ptr<DeviceStage> stage_;
};

}  // namespace
}  // namespace shardckpt

NB_MODULE(_native, m) {
  using namespace nb::literals;
  // A checkpointer that is never closed lives until the process ends; that is no error.
  nb::set_leak_warnings(false);
  m.def("crc32c", shardckpt::Crc32cOfBuffer, "data"_a, "initial"_a = 0);
  m.def("crc32c_at", shardckpt::Crc32cAt, "address"_a, "nbytes"_a, "initial"_a = 0);
  m.def("crc32c_path", shardckpt::Crc32cPathName);
  m.def("chunk_crcs", shardckpt::ChunkCrcsOfRows, "rows"_a, "seed"_a, "chunk_bytes"_a);
  m.def("copy_rows", shardckpt::CopyTable, "rows"_a, "num_threads"_a);
  m.def("read_chunks", shardckpt::ReadChunksOf, "fd"_a, "direct_fd"_a, "calls"_a, "start"_a,
        "stop"_a, "pieces"_a, "rows"_a, "crcs"_a, "seed"_a, "chunk_bytes"_a);
  m.def("place_chunks", shardckpt::PlaceChunksOf, "address"_a, "start"_a, "stop"_a, "pieces"_a,
        "rows"_a, "crcs"_a, "seed"_a, "chunk_bytes"_a);
  m.def("write_full", shardckpt::WriteFullAt, "fd"_a, "address"_a, "nbytes"_a, "offset"_a);
  m.def("read_full", shardckpt::ReadFullAt, "fd"_a, "address"_a, "nbytes"_a, "offset"_a);

  m.def("memory_limit", [] { return shardckpt::MemoryLimitBytes(); });

  using shardckpt::PyEngine;
  nb::class_<PyEngine>(m, "Engine")
      .def(nb::init<int64_t, int64_t, std::vector<int>>(), "num_copy_threads"_a,
           "num_flush_threads"_a, "cpus"_a)
      .def("close", &PyEngine::Close, "timeout_ms"_a)
      .def("reserve", &PyEngine::Reserve, "nbytes"_a, "most_bytes"_a = 0)
      .def("begin", &PyEngine::Begin, "rows"_a, "file_bytes"_a, "check_all"_a,
           "streams"_a = nb::none())
      .def("wait_staged", &PyEngine::WaitStaged, "ticket"_a, "group"_a, "timeout_ms"_a,
           "streams"_a = nb::none())
      .def("pin_problem", &PyEngine::PinProblem)
      .def("attach", &PyEngine::Attach, "ticket"_a, "file"_a, "fd"_a, "direct_fd"_a, "calls"_a)
      .def("wait_flushed", &PyEngine::WaitFlushed, "ticket"_a, "file"_a, "timeout_ms"_a)
      .def("take", &PyEngine::Take, "ticket"_a, "file"_a, "timeout_ms"_a)
      .def("give", &PyEngine::Give, "ticket"_a, "extent"_a)
      .def("chunk_crcs", &PyEngine::ChunkCrcsOf, "ticket"_a, "file"_a, "seed"_a)
      .def("failure", &PyEngine::FailureOf, "ticket"_a)
      .def("cancel", &PyEngine::Cancel, "ticket"_a, "why"_a)
      .def("release", &PyEngine::Release, "ticket"_a, "timeout_ms"_a)
      .def("set_rate", &PyEngine::SetRate, "bytes_per_s"_a)
      .def("set_paused", &PyEngine::SetPaused, "is_paused"_a)
      .def("stats", &PyEngine::Stats);

  m.def("cuda_probe", shardckpt::ProbeCuda);
  using shardckpt::PyDeviceStage;
  nb::class_<PyDeviceStage>(m, "DeviceStage")
      .def(nb::init<int, int64_t, int64_t>(), "ordinal"_a, "piece_bytes"_a, "num_in_flight"_a)
      .def("close", &PyDeviceStage::Close, "timeout_ms"_a)
      .def("pin", &PyDeviceStage::Pin, "address"_a, "nbytes"_a)
      .def("unpin", &PyDeviceStage::Unpin, "address"_a)
      .def("after", &PyDeviceStage::After, "stream"_a)
      .def("add", &PyDeviceStage::Add, "rows"_a)
      .def("fence", &PyDeviceStage::Fence, "stream"_a)
      .def("wait", &PyDeviceStage::Wait, "timeout_ms"_a);
}
