#include "core/copy.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "core/stream_copy.h"

namespace shardckpt {
namespace {

// Threads take this much at a time: large beside the cost of a hand-over, small beside a large
// tensor.
constexpr int64_t kTaskBytes = int64_t{4} << 20;

struct Dim {
  int64_t size;
  int64_t dst_stride_bytes;
  int64_t src_stride_bytes;
};

// One array, simplified: equal strides are joined, so `run_bytes` is the longest contiguous
// stretch.
struct CopyRow {
  uint8_t* dst;
  const uint8_t* src;
  int64_t run_bytes;
  int64_t num_runs;
  int num_dims;  // Dims around the run, outermost first.
  std::array<Dim, kMaxCopyDims> dims;
};

// Runs [first_run, last_run) of a row; of a row that is one run, bytes [first_byte, last_byte).
struct CopyTask {
  const CopyRow* row;
  int64_t first_run;
  int64_t last_run;
  int64_t first_byte;
  int64_t last_byte;
};

Status InvalidRow(size_t row, const std::string& problem) {
  return Status::Invalid("copy_rows: row " + std::to_string(row) + ": " + problem);
}

int64_t Magnitude(int64_t stride) { return stride < 0 ? -stride : stride; }

// Orders the dims so that the destination is written front to back, then joins what touches.
void Simplify(int64_t itemsize_bytes, CopyRow* row) {
  const auto begin = row->dims.begin();
  const auto end = begin + row->num_dims;
  std::stable_sort(begin, end, [](const Dim& a, const Dim& b) {
    return Magnitude(a.dst_stride_bytes) > Magnitude(b.dst_stride_bytes);
  });
  std::array<Dim, kMaxCopyDims> joined;  // Innermost first.
  int num_joined = 0;
  row->run_bytes = itemsize_bytes;
  for (int i = row->num_dims - 1; i >= 0; --i) {
    const Dim& dim = row->dims[i];
    if (num_joined == 0 && dim.dst_stride_bytes == row->run_bytes &&
        dim.src_stride_bytes == row->run_bytes) {
      row->run_bytes *= dim.size;
      continue;
    }
    if (num_joined > 0) {
      Dim& inner = joined[num_joined - 1];
      if (dim.dst_stride_bytes == inner.dst_stride_bytes * inner.size &&
          dim.src_stride_bytes == inner.src_stride_bytes * inner.size) {
        inner.size *= dim.size;
        continue;
      }
    }
    joined[num_joined++] = dim;
  }
  row->num_dims = num_joined;
  row->num_runs = 1;
  for (int i = 0; i < num_joined; ++i) {
    row->dims[i] = joined[num_joined - 1 - i];
    row->num_runs *= row->dims[i].size;
  }
}

// Reads the row at the front of `fields` and drops it from there; is_empty says there is nothing to
// do.
Status ParseRow(size_t index, int64_t src_base, std::span<const int64_t>* fields, CopyRow* row,
                bool* is_empty) {
  if (fields->size() < 4) {
    return InvalidRow(
        index, "the table ends after " + std::to_string(fields->size()) + " of at least 4 fields.");
  }
  const int64_t dst = (*fields)[0];
  int64_t src = 0;
  if (__builtin_add_overflow((*fields)[1], src_base, &src)) {
    return InvalidRow(index, "src_address " + std::to_string((*fields)[1]) + " and src_base " +
                                 std::to_string(src_base) + " make no address.");
  }
  const int64_t itemsize_bytes = (*fields)[2];
  const int64_t ndim = (*fields)[3];
  if (itemsize_bytes < 1 || ndim < 0 || ndim > kMaxCopyDims) {
    return InvalidRow(index, "itemsize " + std::to_string(itemsize_bytes) + " and ndim " +
                                 std::to_string(ndim) + "; allowed are >= 1 and 0 to " +
                                 std::to_string(kMaxCopyDims) + ".");
  }
  const auto num_dims = static_cast<size_t>(ndim);
  if (fields->size() < 4 + 3 * num_dims) {
    return InvalidRow(index, "ndim " + std::to_string(ndim) + " needs " +
                                 std::to_string(4 + 3 * ndim) + " fields, the table has " +
                                 std::to_string(fields->size()) + " left.");
  }
  *is_empty = false;
  row->num_dims = 0;
  int64_t total_bytes = itemsize_bytes;
  bool is_too_large = false;
  int64_t overwritten_dim = -1;
  for (size_t i = 0; i < num_dims; ++i) {
    const Dim dim{(*fields)[4 + i], (*fields)[4 + num_dims + i], (*fields)[4 + 2 * num_dims + i]};
    int64_t span_bytes = 0;
    if (dim.size < 0 || __builtin_mul_overflow(dim.size, dim.dst_stride_bytes, &span_bytes) ||
        __builtin_mul_overflow(dim.size, dim.src_stride_bytes, &span_bytes)) {
      return InvalidRow(
          index, "dim " + std::to_string(i) + " has size " + std::to_string(dim.size) +
                     " and strides " + std::to_string(dim.dst_stride_bytes) + ", " +
                     std::to_string(dim.src_stride_bytes) + "; that is no memory of this machine.");
    }
    if (dim.size == 0) *is_empty = true;
    // Both judged after the loop: a later dim of size 0 leaves nothing to copy.
    if (dim.size > 1 && dim.dst_stride_bytes == 0) overwritten_dim = static_cast<int64_t>(i);
    if (__builtin_mul_overflow(total_bytes, dim.size, &total_bytes)) is_too_large = true;
    if (dim.size != 1) row->dims[row->num_dims++] = dim;
  }
  *fields = fields->subspan(4 + 3 * num_dims);
  if (*is_empty) return Status::Ok();
  if (is_too_large) return InvalidRow(index, "more than 2^63 bytes.");
  if (overwritten_dim >= 0) {
    return InvalidRow(index,
                      "dim " + std::to_string(overwritten_dim) +
                          " has destination stride 0: its items would overwrite each other.");
  }
  if (dst == 0 || src == 0) {
    return InvalidRow(index,
                      "a null address with " + std::to_string(total_bytes) + " bytes to copy.");
  }
  row->dst = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(dst));
  row->src = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(src));
  Simplify(itemsize_bytes, row);
  return Status::Ok();
}

void AddTasks(const CopyRow& row, std::vector<CopyTask>* tasks) {
  if (row.num_runs == 1) {
    for (int64_t start = 0; start < row.run_bytes; start += kTaskBytes) {
      tasks->push_back({&row, 0, 1, start, start + std::min(kTaskBytes, row.run_bytes - start)});
    }
    return;
  }
  const int64_t runs_per_task = std::max<int64_t>(1, kTaskBytes / row.run_bytes);
  for (int64_t start = 0; start < row.num_runs; start += runs_per_task) {
    tasks->push_back(
        {&row, start, start + std::min(runs_per_task, row.num_runs - start), 0, row.run_bytes});
  }
}

// A fixed size lets the compiler turn the copy of one item into a load and a store.
template <int64_t kRunBytes>
void CopyLine(uint8_t* dst, const uint8_t* src, int64_t count, const Dim& dim) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(dst + i * dim.dst_stride_bytes, src + i * dim.src_stride_bytes, kRunBytes);
  }
}

void CopyLineOf(int64_t run_bytes, uint8_t* dst, const uint8_t* src, int64_t count,
                const Dim& dim) {
  switch (run_bytes) {
    case 1:
      return CopyLine<1>(dst, src, count, dim);
    case 2:
      return CopyLine<2>(dst, src, count, dim);
    case 4:
      return CopyLine<4>(dst, src, count, dim);
    case 8:
      return CopyLine<8>(dst, src, count, dim);
    case 16:
      return CopyLine<16>(dst, src, count, dim);
    default:
      for (int64_t i = 0; i < count; ++i) {
        StreamCopy(dst + i * dim.dst_stride_bytes, src + i * dim.src_stride_bytes,
                   static_cast<size_t>(run_bytes));
      }
  }
}

void RunTask(const CopyTask& task) {
  const CopyRow& row = *task.row;
  if (row.num_runs == 1) {
    StreamCopy(row.dst + task.first_byte, row.src + task.first_byte,
               static_cast<size_t>(task.last_byte - task.first_byte));
    return;
  }
  const Dim& line = row.dims[row.num_dims - 1];
  for (int64_t run = task.first_run; run < task.last_run;) {
    int64_t rest = run / line.size;
    const int64_t column = run % line.size;
    int64_t dst_offset = column * line.dst_stride_bytes;
    int64_t src_offset = column * line.src_stride_bytes;
    for (int i = row.num_dims - 2; i >= 0; --i) {
      const int64_t index = rest % row.dims[i].size;
      rest /= row.dims[i].size;
      dst_offset += index * row.dims[i].dst_stride_bytes;
      src_offset += index * row.dims[i].src_stride_bytes;
    }
    const int64_t count = std::min(line.size - column, task.last_run - run);
    CopyLineOf(row.run_bytes, row.dst + dst_offset, row.src + src_offset, count, line);
    run += count;
  }
}

struct Work {
  const std::vector<CopyTask>* tasks;
  std::atomic<size_t> next{0};
};

void* RunTasks(void* opaque) {
  Work& work = *static_cast<Work*>(opaque);
  for (size_t i = work.next++; i < work.tasks->size(); i = work.next++) RunTask((*work.tasks)[i]);
  return nullptr;
}

}  // namespace

Status CopyRows(std::span<const int64_t> table, int64_t num_threads, int64_t src_base) {
  if (num_threads < 1 || num_threads > kMaxCopyThreads) {
    return Status::Invalid("copy_rows: num_threads is " + std::to_string(num_threads) +
                           "; allowed are 1 to " + std::to_string(kMaxCopyThreads) + ".");
  }
  std::vector<CopyRow> rows;
  for (size_t index = 0; !table.empty(); ++index) {
    CopyRow row;
    bool is_empty = false;
    if (Status status = ParseRow(index, src_base, &table, &row, &is_empty); !status.ok()) {
      return status;
    }
    if (!is_empty) rows.push_back(row);
  }
  std::vector<CopyTask> tasks;
  for (const CopyRow& row : rows) AddTasks(row, &tasks);

  Work work{&tasks};
  std::array<pthread_t, kMaxCopyThreads> helpers;
  size_t num_helpers = 0;
  const size_t num_useful = std::min(static_cast<size_t>(num_threads), tasks.size());
  while (num_helpers + 1 < num_useful) {
    // pthread_create reports a failure that std::thread would throw; this thread then does the
    // rest.
    if (pthread_create(&helpers[num_helpers], nullptr, RunTasks, &work) != 0) break;
    ++num_helpers;
  }
  RunTasks(&work);
  for (size_t i = 0; i < num_helpers; ++i) pthread_join(helpers[i], nullptr);
  return Status::Ok();
}

}  // namespace shardckpt
