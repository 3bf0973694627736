// The only file that touches Python: turns buffers into spans, drops the GIL around every core
// call, and turns a Status into a Python exception.
#include <Python.h>
#include <nanobind/nanobind.h>

#include <cstdint>
#include <span>

#include "core/copy.h"
#include "core/crc32c.h"
#include "core/file.h"
#include "core/status.h"

namespace nb = nanobind;

namespace shardckpt {
namespace {

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

void RaiseUnlessOk(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalid) throw nb::value_error(status.message().c_str());
  // OSError picks its subclass by errno only when it is called with both arguments.
  nb::object error =
      nb::borrow(PyExc_OSError)(status.system_errno(), nb::str(status.message().c_str()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

uint32_t Crc32cOfBuffer(nb::handle data, uint32_t initial) {
  const Buffer buffer(data);
  nb::gil_scoped_release unlocked;
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
  nb::gil_scoped_release unlocked;
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
    nb::gil_scoped_release unlocked;
    ChunkCrcs(table, seed, chunk_bytes, bytes);
  }
  return nb::borrow<nb::bytes>(out);
}

void CopyTable(nb::handle rows, int64_t num_threads) {
  const Buffer buffer(rows);
  const std::span<const int64_t> table = buffer.rows();
  Status status;
  {
    nb::gil_scoped_release unlocked;
    status = CopyRows(table, num_threads);
  }
  RaiseUnlessOk(status);
}

void WriteFullAt(int fd, uintptr_t address, size_t size_bytes, int64_t offset_bytes) {
  Status status;
  {
    nb::gil_scoped_release unlocked;
    status = WriteFull(SystemFileOps(), fd, Memory<const void>(address), size_bytes, offset_bytes);
  }
  RaiseUnlessOk(status);
}

size_t ReadFullAt(int fd, uintptr_t address, size_t size_bytes, int64_t offset_bytes) {
  Status status;
  size_t num_read_bytes = 0;
  {
    nb::gil_scoped_release unlocked;
    status = ReadFull(SystemFileOps(), fd, Memory<void>(address), size_bytes, offset_bytes,
                      &num_read_bytes);
  }
  RaiseUnlessOk(status);
  return num_read_bytes;
}

}  // namespace
}  // namespace shardckpt

NB_MODULE(_native, m) {
  using namespace nb::literals;
  m.def("crc32c", shardckpt::Crc32cOfBuffer, "data"_a, "initial"_a = 0);
  m.def("crc32c_at", shardckpt::Crc32cAt, "address"_a, "nbytes"_a, "initial"_a = 0);
  m.def("crc32c_path", shardckpt::Crc32cPathName);
  m.def("chunk_crcs", shardckpt::ChunkCrcsOfRows, "rows"_a, "seed"_a, "chunk_bytes"_a);
  m.def("copy_rows", shardckpt::CopyTable, "rows"_a, "num_threads"_a);
  m.def("write_full", shardckpt::WriteFullAt, "fd"_a, "address"_a, "nbytes"_a, "offset"_a);
  m.def("read_full", shardckpt::ReadFullAt, "fd"_a, "address"_a, "nbytes"_a, "offset"_a);
}
