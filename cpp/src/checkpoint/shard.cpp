// Layout, snapshot and the write loop.
#include "checkpoint/shard.hpp"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <utility>

#include "checkpoint/manifest.hpp"
#include "checkpoint/region.hpp"
#include "io/crc32c.hpp"
#include "io/json.hpp"
#include "io/safetensors_header.hpp"
#include "narrowgauge/executor.hpp"

namespace ng {
namespace {

constexpr uint64_t kTransfer = uint64_t{4} << 20;     // one request: long enough for any disk, four chunks
constexpr uint64_t kMinInPlace = uint64_t{64} << 10;  // below this a copy costs less than a request of its own
constexpr int kQueueDepth = 4;                        // requests in flight; as many are made ready meanwhile
constexpr uint64_t kInPlace = ~uint64_t{0};           // tag of a transfer that uses no staging buffer

constexpr uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

void check_part(const CheckpointPart& part) {
  const uint64_t bits = file_dtype_bits(part.dtype);
  NG_CHECK(bits != 0 && bits % 8 == 0, InvalidArgument, "tensor ", printable(part.name), " has dtype ",
           printable(part.dtype), ", expected one of safetensors' with whole bytes");
  int64_t extent = static_cast<int64_t>(bits / 8);
  for (const int64_t length : part.shape) {
    NG_CHECK(length >= 0 && (length == 0 || !__builtin_mul_overflow(extent, length, &extent)), InvalidArgument,
             "tensor ", printable(part.name), " has a negative axis or a size that overflows 63 bits");
  }
  const std::string mismatch = region_mismatch(part.region, part.shape);
  NG_CHECK(mismatch.empty(), InvalidArgument, "tensor ", printable(part.name), ": the region ", mismatch);
  const uint64_t expected = static_cast<uint64_t>(part.region.numel()) * (bits / 8);
  NG_CHECK(part.bytes.size() == expected, InvalidArgument, "tensor ", printable(part.name), ": region ",
           region_str(part.region), " has ", part.bytes.size(), " bytes of memory, expected ", expected);
}

// The shape that a part has in its file, and what its name says of it there: nothing for a whole tensor, the place
// where a fragment begins otherwise.
FileTensor file_tensor(const CheckpointPart& part) {
  FileTensor out{part.name, part.dtype, {}, part.bytes};
  const Region& region = part.region;
  if (region == Region::whole(part.shape)) {
    out.shape = part.shape;
    return out;
  }
  std::string start;
  for (const auto& [low, high] : region.bounds) {
    start += concat(start.empty() ? "@" : ",", low);
    out.shape.push_back(high - low);
  }
  out.name += start;
  return out;
}

}  // namespace

void ShardMemory::clear() {
  copies.drain();
  image = Staging();
  ring = Staging();
  pool.reset();
}

void ShardMemory::pin() {
  if (pinned) return;
  clear();
  pool = std::make_shared<PinnedPool>();
  pinned = true;
}

void Staging::reserve(const std::shared_ptr<Pool>& pool, uint64_t bytes) {
  if (bytes <= static_cast<uint64_t>(block_->bytes()) && block_->data != nullptr) return;
  block_ = Tensor();  // first, so that the two are never there together
  pool->trim();
  const int64_t shape[] = {static_cast<int64_t>(round_up(bytes, uint64_t{2} << 20))};
  block_ = Tensor::empty(pool, shape, DType::u8);
}

void Shard::lay_out(std::span<const CheckpointPart> parts, int64_t step) {
  memory_.copies.drain();  // of a save that has failed
  step_ = step;
  borrowed_bytes_ = 0;
  if (fits(parts)) {
    for (size_t i = 0; i < parts.size(); ++i) {
      parts_[i].bytes = parts[i].bytes;
      parts_[i].borrowed = parts[i].borrowed;
      parts_[i].in_place = parts[i].in_place;
      parts_[i].device = parts[i].device;
      parts_[i].stream = parts[i].stream;
    }
  } else {
    parts_.assign(parts.begin(), parts.end());
    lay_out_anew();
  }
  for (Segment& segment : segments_) {
    const bool header = segment.part == nullptr;
    segment.data = header ? reinterpret_cast<const std::byte*>(header_.data()) : segment.part->bytes.data();
    segment.borrowed = !header && segment.part->borrowed;
    segment.copied = false;
    segment.in_place = segment.borrowed && segment.part->in_place && segment.device().is_cpu();
    std::fill(segment.checksums.begin(), segment.checksums.end(), 0);
  }
}

// Whether the layout serves `parts`: all is as in parts_ but for where they are.
bool Shard::fits(std::span<const CheckpointPart> parts) const noexcept {
  return !segments_.empty() && std::equal(parts.begin(), parts.end(), parts_.begin(), parts_.end(),
                                          [](const CheckpointPart& a, const CheckpointPart& b) {
                                            return a.name == b.name && a.dtype == b.dtype && a.shape == b.shape &&
                                                   a.region == b.region && a.bytes.size() == b.bytes.size();
                                          });
}

// Makes header_ and segments_ for parts_.
void Shard::lay_out_anew() {
  segments_.clear();
  std::vector<std::pair<FileTensor, const CheckpointPart*>> tensors;
  std::set<std::string> names;
  for (const CheckpointPart& part : parts_) {
    check_part(part);
    tensors.emplace_back(file_tensor(part), &part);
    // A tensor may be called as another's fragment would be; the manifest goes by place, so any other name will do.
    while (!names.insert(tensors.back().first.name).second) tensors.back().first.name += '\'';
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    const auto rank = [](const FileTensor& tensor) {
      const bool whole_blocks = tensor.bytes.size() % kBlock == 0;
      return std::pair(!whole_blocks, whole_blocks ? 0 : -static_cast<int64_t>(file_dtype_bits(tensor.dtype)));
    };
    return rank(a.first) < rank(b.first);
  });
  std::vector<FileTensor> ordered;
  ordered.reserve(tensors.size());
  for (auto& [tensor, part] : tensors) ordered.push_back(std::move(tensor));
  header_ = make_safetensors_header(ordered, {{"format", "pt"}}, kBlock);

  std::vector<Segment> segments;
  segments.push_back({nullptr, 0, header_.size(), nullptr, false, false, false, {0}});
  file_bytes_ = header_.size();
  for (const auto& [tensor, part] : tensors) {
    const uint64_t bytes = part->bytes.size();
    segments.push_back(
        {part, file_bytes_, bytes, nullptr, false, false, false, std::vector<uint32_t>(chunk_count(bytes, kChunk), 0)});
    file_bytes_ += bytes;
  }
  segments_ = std::move(segments);
}

// Lets copies from GPUs come after the work that their callers' streams have been given; what is borrowed does not hold
// the streams up.
void Shard::order_copies() {
  const auto follow = [&](bool borrowed) {
    for (const CheckpointPart& part : parts_) {
      if (part.device.is_cpu() || part.borrowed != borrowed || part.bytes.empty()) continue;
      memory_.pin();
      memory_.copies.follow(part.device.gpu, part.stream);
    }
  };
  follow(true);
  memory_.copies.forget();
  follow(false);
}

void Shard::snapshot() {
  struct Piece {
    std::byte* to;
    std::span<const std::byte> from;
    uint32_t* checksum;
  };
  // Every copy has the alignment in the image that it has in the file, so that it is written from there.
  std::vector<uint64_t> places;
  uint64_t size = 0;
  uint64_t end_in_file = 0;
  for (const Segment& segment : segments_) {
    if (segment.borrowed) continue;
    if (segment.offset != end_in_file) size = round_up(size, kBlock) + segment.offset % kBlock;
    places.push_back(size);
    size += segment.bytes;
    end_in_file = segment.offset + segment.bytes;
  }
  order_copies();
  memory_.image.reserve(memory_.pool, size);
  std::vector<Piece> pieces;
  size_t next = 0;
  for (Segment& segment : segments_) {
    if (segment.borrowed) continue;
    std::byte* to = memory_.image.data() + places[next++];
    if (!segment.device().is_cpu()) {
      memory_.copies.copy(to, segment.data, segment.bytes, segment.device().gpu);
      segment.data = to;
      segment.in_place = true;
      continue;
    }
    const uint64_t chunk = chunk_of(segment);
    for (uint64_t at = 0; at < segment.bytes; at += chunk) {
      const uint64_t bytes = std::min(chunk, segment.bytes - at);
      pieces.push_back({to + at, {segment.data + at, bytes}, &segment.checksums[at / chunk]});
    }
    segment.data = to;
    segment.copied = true;
    segment.in_place = true;
  }
  image_fetched_ = memory_.copies.mark();
  memory_.copies.lead();
  // Shares of at least a chunk: what is small is copied faster than a thread wakes up.
  const auto grain = static_cast<int64_t>(pieces.size() * kChunk / std::max(size, uint64_t{1}) + 1);
  default_executor().parallel_for(static_cast<int64_t>(pieces.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      *piece.checksum = crc32c_copy(0, piece.from, piece.to);
    }
  });
}

// The one pass over [at, at + length) of a segment on its way to the disk: its checksums, unless snapshot() has taken
// them, and a copy, unless copy_to is null. pre: it is in host memory.
void Shard::pass(Segment& segment, uint64_t at, uint64_t length, std::byte* copy_to) {
  if (!segment.copied) return take_checksums(segment, at, {segment.data + at, length}, copy_to);
  if (copy_to != nullptr) std::memcpy(copy_to, segment.data + at, length);
}

// `bytes` are the segment's from `at` on; what comes before them in their chunk has been taken.
void Shard::take_checksums(Segment& segment, uint64_t at, std::span<const std::byte> bytes, std::byte* copy_to) const {
  const uint64_t chunk = chunk_of(segment);
  while (!bytes.empty()) {
    const uint64_t part = std::min<uint64_t>(bytes.size(), chunk - at % chunk);
    uint32_t& sum = segment.checksums[at / chunk];
    const auto piece = bytes.first(part);
    sum = copy_to != nullptr ? crc32c_copy(sum, piece, copy_to) : crc32c(sum, piece);
    if (copy_to != nullptr) copy_to += part;
    at += part;
    bytes = bytes.subspan(part);
  }
}

// How many bytes from `position` on, which is in segment `index`, are written from where they are; 0 if a copy is
// better. Neighbours in the file that are neighbours in memory, as in the image, go together.
uint64_t Shard::in_place(size_t index, uint64_t position, uint64_t block) const noexcept {
  const std::byte* data = segments_[index].data + (position - segments_[index].offset);
  if (reinterpret_cast<uintptr_t>(data) % block != 0) return 0;
  uint64_t length = 0;
  for (; index < segments_.size() && length < kTransfer; ++index) {
    const Segment& segment = segments_[index];
    if (segment.bytes == 0) continue;
    const uint64_t at = position + length - segment.offset;
    if (!segment.in_place || segment.data + at != data + length) break;
    length += segment.bytes - at;
  }
  length = std::min(length, kTransfer) / block * block;
  return length >= kMinInPlace ? length : 0;
}

// Fills a staging buffer with the file's bytes from `position`, which is in segment `index`, up to the next place where
// writing in place pays; pads the file's end to a block with zeros. Returns the length. What comes from a GPU is only
// on its way then, and noted in `fetches`.
uint64_t Shard::stage(size_t index, uint64_t position, uint64_t block, std::byte* out, std::vector<Fetch>& fetches) {
  uint64_t length = 0;
  while (length < kTransfer && index < segments_.size()) {
    Segment& segment = segments_[index];
    const uint64_t at = position + length - segment.offset;
    if (length > 0 && length % block == 0 && in_place(index, position + length, block) > 0) break;
    const uint64_t part = std::min(segment.bytes - at, kTransfer - length);
    if (segment.borrowed && !segment.device().is_cpu()) {
      memory_.copies.copy(out + length, segment.data + at, part, segment.device().gpu);
      fetches.push_back({&segment, at, {out + length, part}});
    } else {
      pass(segment, at, part, out + length);
    }
    length += part;
    if (at + part == segment.bytes) ++index;
  }
  const uint64_t padded = round_up(length, block);
  std::memset(out + length, 0, padded - length);
  return padded;
}

void Shard::write(FileSystem& files, const std::string& directory, const std::string& name,
                  const std::function<void()>& released, const std::function<void(uint64_t, uint64_t)>& progress) {
  name_ = name;
  const std::unique_ptr<DirectFile> file = files.create(directory + "/" + name);
  engine_ = file->engine();
  const uint64_t block = file->alignment();
  const auto depth = static_cast<size_t>(std::min(file->queue_depth(), kQueueDepth));
  // Twice what is in flight, so that the next are ready when a disk reports many as done at once.
  const uint64_t buffers = std::min<uint64_t>(2 * depth, file_bytes_ / kTransfer + 1);
  file->preallocate(round_up(file_bytes_, block));

  struct Transfer {
    std::span<const std::byte> data;
    uint64_t offset;
    uint64_t tag;  // of a staging buffer, or kInPlace
  };
  std::deque<Transfer> ready;
  std::vector<uint64_t> idle;  // staging buffers, by their tag
  bool ring_is_ready = false;
  idle.reserve(buffers);
  for (uint64_t tag = 0; tag < buffers; ++tag) idle.push_back(tag);
  const auto issue = [&] {
    while (!ready.empty() && static_cast<size_t>(file->in_flight()) < depth) {
      file->write(ready.front().data, ready.front().offset, ready.front().tag);
      ready.pop_front();
    }
  };
  const auto wait = [&] {
    const uint64_t tag = file->wait();
    if (tag != kInPlace) idle.push_back(tag);
    issue();
  };

  // A staging buffer that waits for its GPU, while the next one is filled.
  struct Fetching {
    std::vector<Fetch> fetches;
    std::vector<Event> fetched;
    Transfer transfer;
  };
  std::optional<Fetching> fetching;
  const auto finish_fetch = [&] {
    if (!fetching) return;
    for (const Event& event : fetching->fetched) event.synchronize();
    for (const Fetch& fetch : fetching->fetches) take_checksums(*fetch.segment, fetch.at, fetch.to, nullptr);
    ready.push_back(fetching->transfer);
    fetching.reset();
  };
  for (const Event& event : image_fetched_) event.synchronize();

  size_t index = 0;
  uint64_t position = 0;
  while (position < file_bytes_) {
    while (segments_[index].offset + segments_[index].bytes <= position) ++index;
    while (ready.size() >= depth) wait();
    if (const uint64_t length = in_place(index, position, block); length > 0) {
      ready.push_back({{segments_[index].data + (position - segments_[index].offset), length}, position, kInPlace});
      const uint64_t end = position + length;
      for (size_t i = index; position < end; ++i) {
        Segment& segment = segments_[i];
        const uint64_t at = position - segment.offset;
        const uint64_t part = std::min(segment.bytes - at, end - position);
        pass(segment, at, part, nullptr);
        if (segment.borrowed) borrowed_bytes_ += part;
        position += part;
      }
    } else {
      if (!ring_is_ready) {
        memory_.ring.reserve(memory_.pool, buffers * kTransfer);
        file->register_memory(memory_.ring.bytes());
        ring_is_ready = true;
      }
      if (idle.empty()) finish_fetch();
      issue();
      while (idle.empty()) wait();
      const uint64_t tag = idle.back();
      idle.pop_back();
      std::byte* buffer = memory_.ring.data() + tag * kTransfer;
      std::vector<Fetch> fetches;
      const uint64_t staged = stage(index, position, block, buffer, fetches);
      const Transfer transfer{{buffer, staged}, position, tag};
      finish_fetch();
      if (fetches.empty()) {
        ready.push_back(transfer);
      } else {
        fetching.emplace(std::move(fetches), memory_.copies.mark(), transfer);
      }
      position += staged;
    }
    issue();
    if (progress) progress(std::min(position, file_bytes_), file_bytes_);
  }
  finish_fetch();
  issue();
  while (file->in_flight() > 0) wait();
  released();
  file->truncate(file_bytes_);
  file->sync();
  file->close();
}

Manifest Shard::report() const {
  Manifest out;
  out.step = step_;
  out.chunk_bytes = kChunk;
  out.files.push_back({name_, file_bytes_, segments_[0].bytes, segments_[0].checksums[0]});
  std::map<std::string_view, size_t> known;
  for (const Segment& segment : segments_) {
    if (segment.part == nullptr) continue;
    const CheckpointPart& part = *segment.part;
    const auto [found, added] = known.emplace(part.name, out.tensors.size());
    if (added) out.tensors.push_back({part.name, part.dtype, part.shape, {}});
    out.tensors[found->second].regions.push_back({part.region, 0, segment.offset, segment.bytes, segment.checksums});
  }
  return out;
}

void write_durable(FileSystem& files, const std::string& path, std::string_view text) {
  Buffer buffer;  // before the file, whose destructor waits for what uses it
  const std::unique_ptr<DirectFile> file = files.create(path);
  const uint64_t padded = round_up(text.size(), std::max<uint64_t>(file->alignment(), kBlock));
  buffer = Buffer(padded + kBlock);
  const auto address = round_up(reinterpret_cast<uintptr_t>(buffer.data()), kBlock);
  auto* data = buffer.data() + (address - reinterpret_cast<uintptr_t>(buffer.data()));
  std::memcpy(data, text.data(), text.size());
  std::memset(data + text.size(), 0, padded - text.size());
  for (uint64_t at = 0; at < padded; at += kTransfer) {
    if (file->in_flight() >= file->queue_depth()) file->wait();
    file->write({data + at, std::min(kTransfer, padded - at)}, at, 0);
  }
  while (file->in_flight() > 0) file->wait();
  file->truncate(text.size());
  file->sync();
  file->close();
}

}  // namespace ng
