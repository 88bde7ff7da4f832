// Reading: requests become runs of chunks, runs become reads of up to 4 MiB, and threads share the reads.
//
// A file that is mostly in the page cache is read through it, since that is a copy; any other past it with several
// reads in flight, which is as fast as the disk and leaves the cache to those who need it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "checkpoint/manifest.hpp"
#include "checkpoint/region.hpp"
#include "io/crc32c.hpp"
#include "io/file.hpp"
#include "io/json.hpp"
#include "io/safetensors_header.hpp"
#include "narrowgauge/checkpoint.hpp"
#include "narrowgauge/executor.hpp"
#include "narrowgauge/io.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

constexpr uint64_t kTransfer = uint64_t{4} << 20;
constexpr int kQueueDepth = 8;

struct Copy {
  uint64_t source;  // from the beginning of the item
  uint64_t bytes;
  std::byte* to;
};

// One read: consecutive chunks of a stored region, or without verification a run of its bytes.
struct Item {
  const StoredTensor* tensor;
  const StoredRegion* region;
  uint64_t start;  // in the region
  uint64_t bytes;
  std::vector<Copy> copies;

  uint64_t offset() const noexcept { return region->offset + start; }
  // Whether the item is copied in one piece, so that it can be read to where it goes.
  bool whole() const noexcept { return copies.size() == 1 && copies[0].bytes == bytes; }
};

// Adds a run of a stored region to the items. With `chunk` 0 exactly its bytes are read.
void append_run(std::vector<Item>& items, const StoredTensor& tensor, const StoredRegion& region, uint64_t chunk,
                uint64_t source, uint64_t bytes, std::byte* to) {
  while (bytes > 0) {
    const uint64_t begin = chunk == 0 ? source : source / chunk * chunk;
    const uint64_t end = chunk == 0 ? source + std::min(bytes, kTransfer) : std::min(begin + chunk, region.bytes);
    Item* last = items.empty() || items.back().region != &region ? nullptr : &items.back();
    const bool within = last != nullptr && begin >= last->start && end <= last->start + last->bytes;
    const bool behind = last != nullptr && begin == last->start + last->bytes &&
                        last->bytes + (end - begin) <= std::max(kTransfer, chunk);
    if (behind) {
      last->bytes += end - begin;
    } else if (!within) {
      items.push_back({&tensor, &region, begin, end - begin, {}});
      last = &items.back();
    }
    const uint64_t part = std::min(bytes, end - source);
    const uint64_t at = source - last->start;
    Copy* before = last->copies.empty() ? nullptr : &last->copies.back();
    if (before != nullptr && before->source + before->bytes == at && before->to + before->bytes == to) {
      before->bytes += part;
    } else {
      last->copies.push_back({at, part, to});
    }
    source += part;
    to += part;
    bytes -= part;
  }
}

// The share of a file's pages that are in the page cache, from a sample.
double cached_share(const FileDescriptor& file, uint64_t bytes, const std::string& path) {
  constexpr uint64_t kSamples = 256;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t pages = (bytes + page - 1) / page;
  if (pages == 0) return 1;
  const Mapping mapping(file, bytes, path);
  const uint64_t samples = std::min(kSamples, pages);
  uint64_t cached = 0;
  for (uint64_t i = 0; i < samples; ++i) {
    unsigned char resident = 0;
    const std::byte* address = mapping.bytes().data() + i * pages / samples * page;
    if (mincore(const_cast<std::byte*>(address), page, &resident) == 0) cached += resident & 1u;
  }
  return static_cast<double>(cached) / static_cast<double>(samples);
}

}  // namespace

struct Checkpoint::Impl {
  // A shard that was opened, and found to have the size and header that the manifest says.
  struct OpenFile {
    std::string path;
    FileDescriptor file;
    bool cached = false;  // mostly in the page cache
    Mapping mapping;      // made when it is asked for
  };

  std::string path;
  Manifest manifest;
  std::map<std::string_view, const StoredTensor*> by_name;
  std::mutex mutex;
  std::vector<std::optional<OpenFile>> files;

  OpenFile& open_file(uint32_t index) {
    const std::lock_guard guard(mutex);
    std::optional<OpenFile>& slot = files[index];
    if (slot) return *slot;
    const StoredFile& stored = manifest.files[index];
    OpenFile out;
    out.path = path + "/" + stored.name;
    ReadableFile opened = open_file_of_checkpoint(out.path);
    NG_CHECK(opened.size == stored.bytes, CheckpointCorrupt, out.path, " has ", opened.size, " bytes, expected ",
             stored.bytes, ": it is truncated or altered");
    std::string header(stored.header_bytes, '\0');
    const size_t got = read_at(opened.file, std::as_writable_bytes(std::span(header)), 0, out.path);
    NG_CHECK(got == header.size() && crc32c(0, std::as_bytes(std::span(header))) == stored.header_checksum,
             CheckpointCorrupt, out.path, ": the checksum of its header does not match: it is damaged");
    out.cached = cached_share(opened.file, opened.size, out.path) > 0.5;
    out.file = std::move(opened.file);
    slot = std::move(out);
    return *slot;
  }

  static ReadableFile open_file_of_checkpoint(const std::string& file) {
    try {
      return open_readable(file, /*follow=*/false);
    } catch (const FileCorrupt& error) {
      throw CheckpointCorrupt(error.what());
    } catch (const SystemError& error) {
      const int reason = error.errno_value();
      NG_CHECK(reason != ENOENT && reason != ELOOP && reason != EISDIR, CheckpointCorrupt, error.what(),
               reason == ENOENT ? ": the checkpoint is not complete" : ", expected a regular file");
      throw;
    }
  }

  // Compares the checksums of the item's chunks. `data` is the whole item.
  void check(const Item& item, const std::byte* data) const {
    const uint64_t chunk = manifest.chunk_bytes;
    for (uint64_t at = 0; at < item.bytes; at += chunk) {
      const uint64_t index = (item.start + at) / chunk;
      const uint64_t bytes = std::min(chunk, item.bytes - at);
      const uint32_t expected = item.region->checksums[index];
      const uint32_t found = crc32c(0, {data + at, bytes});
      NG_CHECK(found == expected, CheckpointCorrupt, path, "/", manifest.files[item.region->file].name, ": tensor ",
               printable(item.tensor->name), ", chunk ", index, " (bytes ", item.offset() + at, " to ",
               item.offset() + at + bytes, " of the file) has checksum ", found, ", expected ", expected,
               ": it is damaged");
    }
  }

  void read_buffered(const Item& item, Buffer& scratch, bool verify, ReadStatistics& statistics) {
    const OpenFile& file = open_file(item.region->file);
    std::byte* data = item.whole() ? item.copies[0].to : scratch.data();
    const size_t got = read_at(file.file, {data, item.bytes}, item.offset(), file.path);
    NG_CHECK(got == item.bytes, CheckpointCorrupt, file.path, " ends at byte ", item.offset() + got,
             ": it became shorter while it was read");
    statistics.bytes_read += item.bytes;
    if (verify) check(item, data);
    if (item.whole()) return;
    for (const Copy& copy : item.copies) std::memcpy(copy.to, data + copy.source, copy.bytes);
  }

  // Reads the items past the page cache, in order, with several in flight; all are of one file. What ends inside the
  // file's last block goes through the cache.
  void read_direct(std::span<const Item> items, Buffer& scratch, const std::atomic<bool>& stop,
                   ReadStatistics& statistics, const std::function<void(uint64_t)>& done) {
    const OpenFile& open = open_file(items[0].region->file);
    const uint64_t size = manifest.files[items[0].region->file].bytes;
    // Its destructor waits for what is in flight, and `scratch` outlives it.
    const std::unique_ptr<DirectFile> file = open_direct(open.path, OpenMode::read);
    const uint64_t block = file->alignment();
    const uint64_t slot_bytes = kTransfer + 2 * std::max<uint64_t>(block, 4096);
    struct Pending {
      const Item* item;
      uint64_t begin;  // the first byte read
    };
    const auto depth = static_cast<size_t>(std::min({file->queue_depth(), kQueueDepth, 8}));
    if (scratch.size() < depth * slot_bytes) scratch = Buffer(depth * slot_bytes);
    std::vector<Pending> pending(depth);
    std::vector<uint64_t> idle;
    idle.reserve(depth);
    for (uint64_t slot = 0; slot < depth; ++slot) idle.push_back(slot);

    const auto finish = [&] {
      const uint64_t slot = file->wait();
      idle.push_back(slot);
      const auto& [item, begin] = pending[slot];
      const std::byte* data = scratch.data() + slot * slot_bytes + (item->offset() - begin);
      check(*item, data);
      for (const Copy& copy : item->copies) std::memcpy(copy.to, data + copy.source, copy.bytes);
      done(item->bytes);
    };
    for (const Item& item : items) {
      if (stop.load(std::memory_order_relaxed)) break;
      const uint64_t begin = item.offset() / block * block;
      const uint64_t end = (item.offset() + item.bytes + block - 1) / block * block;
      if (end > size || end - begin > slot_bytes) {
        Buffer tail(item.bytes);
        read_buffered(item, tail, true, statistics);
        done(item.bytes);
        continue;
      }
      while (idle.empty()) finish();
      const uint64_t slot = idle.back();
      idle.pop_back();
      pending[slot] = {&item, begin};
      file->read({scratch.data() + slot * slot_bytes, end - begin}, begin, slot);
      statistics.bytes_read += end - begin;
      statistics.bytes_direct += end - begin;
    }
    while (file->in_flight() > 0) finish();
  }

  // Reads all items on all threads. pre: those of one file are together.
  ReadStatistics run(const std::vector<Item>& items, bool verify, const std::function<void(uint64_t)>& done) {
    std::mutex result_mutex;
    ReadStatistics total;
    std::exception_ptr failure;
    std::atomic<bool> stop{false};
    const auto work = [&](int64_t begin, int64_t end) {
      ReadStatistics statistics;
      Buffer scratch;
      try {
        auto at = static_cast<size_t>(begin);
        while (at < static_cast<size_t>(end) && !stop.load(std::memory_order_relaxed)) {
          size_t next = at + 1;
          while (next < static_cast<size_t>(end) && items[next].region->file == items[at].region->file) ++next;
          const std::span<const Item> group(items.data() + at, next - at);
          if (verify && !open_file(group[0].region->file).cached) {
            read_direct(group, scratch, stop, statistics, done);
          } else {
            for (const Item& item : group) {
              if (stop.load(std::memory_order_relaxed)) break;
              if (!item.whole() && scratch.size() < item.bytes) scratch = Buffer(item.bytes);
              read_buffered(item, scratch, verify, statistics);
              done(item.bytes);
            }
          }
          at = next;
        }
      } catch (...) {
        stop.store(true, std::memory_order_relaxed);
        const std::lock_guard guard(result_mutex);
        if (!failure) failure = std::current_exception();
      }
      const std::lock_guard guard(result_mutex);
      total.bytes_read += statistics.bytes_read;
      total.bytes_direct += statistics.bytes_direct;
    };
    default_executor().parallel_for(static_cast<int64_t>(items.size()), 1, work);
    if (!failure) return total;
    try {
      std::rethrow_exception(failure);
    } catch (const CheckpointCorrupt&) {
      throw;
    } catch (const FileCorrupt& error) {
      throw CheckpointCorrupt(error.what());
    }
  }
};

Checkpoint::Checkpoint(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  const std::string source = path + "/" + kManifestName;
  const ReadableFile opened = Impl::open_file_of_checkpoint(source);
  NG_CHECK(opened.size <= kMaxManifestBytes, CheckpointCorrupt, source, " has ", opened.size, " bytes, at most ",
           kMaxManifestBytes, " are allowed");
  std::string text(opened.size, '\0');
  NG_CHECK(read_at(opened.file, std::as_writable_bytes(std::span(text)), 0, source) == text.size(), CheckpointCorrupt,
           source, " became shorter while it was read");
  impl_->manifest = parse_manifest(text, source);
  check_manifest(impl_->manifest, source);
  impl_->files.resize(impl_->manifest.files.size());
  for (const StoredTensor& tensor : impl_->manifest.tensors) impl_->by_name.emplace(tensor.name, &tensor);
}

Checkpoint::~Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;

const std::string& Checkpoint::path() const noexcept { return impl_->path; }

const Manifest& Checkpoint::manifest() const noexcept { return impl_->manifest; }

const StoredTensor* Checkpoint::find(std::string_view name) const noexcept {
  const auto found = impl_->by_name.find(name);
  return found == impl_->by_name.end() ? nullptr : found->second;
}

ReadStatistics Checkpoint::read(std::span<const ReadRequest> requests, Verify verify) const {
  ReadStatistics statistics;
  std::vector<Item> items;
  const uint64_t chunk = verify == Verify::chunks ? impl_->manifest.chunk_bytes : 0;
  for (const ReadRequest& request : requests) {
    const StoredTensor* tensor = find(request.name);
    NG_CHECK(tensor != nullptr, CheckpointError, impl_->path, " holds no tensor ", printable(request.name));
    const std::string label = concat("tensor ", printable(request.name));
    const std::string mismatch = region_mismatch(request.region, tensor->shape);
    NG_CHECK(mismatch.empty(), InvalidArgument, label, ": the region ", mismatch);
    const uint64_t width = file_dtype_bits(tensor->dtype) / 8;
    const uint64_t expected = static_cast<uint64_t>(request.region.numel()) * width;
    NG_CHECK(request.out.size() == expected, InvalidArgument, label, ": region ", region_str(request.region), " takes ",
             expected, " bytes, the memory for it has ", request.out.size());
    statistics.bytes += expected;
    for (const StoredRegion& stored : tensor->regions) {
      for (const SharedRun& run : shared_runs(stored.region, request.region, tensor->shape)) {
        append_run(items, *tensor, stored, chunk, static_cast<uint64_t>(run.source) * width,
                   static_cast<uint64_t>(run.length) * width,
                   request.out.data() + static_cast<uint64_t>(run.target) * width);
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::pair(a.region->file, a.offset()) < std::pair(b.region->file, b.offset());
  });
  const ReadStatistics done = impl_->run(items, verify == Verify::chunks, [](uint64_t) {});
  statistics.bytes_read = done.bytes_read;
  statistics.bytes_direct = done.bytes_direct;
  return statistics;
}

std::span<const std::byte> Checkpoint::map(std::string_view name) const {
  const StoredTensor* tensor = find(name);
  NG_CHECK(tensor != nullptr, CheckpointError, impl_->path, " holds no tensor ", printable(name));
  if (tensor->regions.size() != 1 || tensor->regions[0].bytes == 0) return {};
  const StoredRegion& stored = tensor->regions[0];
  Impl::OpenFile& file = impl_->open_file(stored.file);
  const std::lock_guard guard(impl_->mutex);
  if (file.mapping.bytes().empty()) {
    file.mapping = Mapping(file.file, impl_->manifest.files[stored.file].bytes, file.path);
  }
  return file.mapping.bytes().subspan(stored.offset, stored.bytes);
}

void Checkpoint::verify(const std::function<void(uint64_t, uint64_t)>& progress) const {
  const Manifest& manifest = impl_->manifest;
  std::vector<Item> items;
  uint64_t total = 0;
  for (uint32_t index = 0; index < manifest.files.size(); ++index) impl_->open_file(index);
  for (const StoredTensor& tensor : manifest.tensors) {
    for (const StoredRegion& stored : tensor.regions) {
      const uint64_t step = std::max(kTransfer / manifest.chunk_bytes, uint64_t{1}) * manifest.chunk_bytes;
      for (uint64_t at = 0; at < stored.bytes; at += step) {
        items.push_back({&tensor, &stored, at, std::min(step, stored.bytes - at), {}});
      }
      total += stored.bytes;
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::pair(a.region->file, a.offset()) < std::pair(b.region->file, b.offset());
  });
  std::atomic<uint64_t> sum{0};
  impl_->run(items, true, [&](uint64_t bytes) {
    const uint64_t now = sum.fetch_add(bytes) + bytes;
    if (progress) progress(now, total);
  });
}

}  // namespace ng
