// One writer's file: a plain safetensors file whose bytes go from memory to disk with as few copies as they need.
//
//   | header, padded to a block | parts of whole blocks, as given | the rest, by falling element size | end, not padded
//
// So a part whose address and size are multiples of a block is written from where it is; everything else passes through
// a ring of staging buffers or lies in an image of the file that snapshot() has made. Checksums are taken in the pass
// that copies, or in one that reads what is written in place. What lies on a GPU is fetched, by its copy engine, into
// the image or into one staging buffer while the one before is written; both are pinned memory then.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/device_copies.hpp"
#include "io/file_system.hpp"
#include "narrowgauge/checkpoint.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {

inline constexpr uint64_t kBlock = 4096;               // what data begins on; every known disk's block divides it
inline constexpr uint64_t kChunk = uint64_t{1} << 20;  // bytes under one checksum

// A block of a pool that grows when more is asked for, its contents then lost.
class Staging {
 public:
  void reserve(const std::shared_ptr<Pool>& pool, uint64_t bytes);
  std::byte* data() const noexcept { return static_cast<std::byte*>(block_->data); }
  std::span<std::byte> bytes() const noexcept { return {data(), static_cast<size_t>(block_->bytes())}; }

 private:
  Tensor block_;
};

// Memory that a Checkpointer keeps from one save to the next, faulted in before it is first used.
struct ShardMemory {
  std::shared_ptr<Pool> pool = std::make_shared<HostPool>();
  bool pinned = false;
  Staging image;        // copies of what is not borrowed
  Staging ring;         // staging buffers
  DeviceCopies copies;  // last: they end before the memory goes

  // For shards with parts on a GPU.
  void pin();
  // Gives it back.
  void clear();
};

// What is made once serves one save after the other.
class Shard {
 public:
  // Borrows `memory`.
  explicit Shard(ShardMemory& memory) : memory_(memory) {}
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  // Lays parts out, whose memory is borrowed until write() has returned; the layout before serves parts that only lie
  // elsewhere. Throws InvalidArgument for a part that is not what it claims; there is no layout then.
  void lay_out(std::span<const CheckpointPart> parts, int64_t step);

  // Copies all that is not borrowed into the image and takes its checksums, on all threads. After it only borrowed
  // memory is read, and that of GPUs before the work that their streams are given next.
  void snapshot();

  // Creates `directory/name` and writes all bytes; the length is set, the file synced and closed. `released` is called
  // once, when no borrowed memory is read any more and before the file is durable; it may throw to give up. Throws
  // SystemError.
  void write(FileSystem& files, const std::string& directory, const std::string& name,
             const std::function<void()>& released, const std::function<void(uint64_t, uint64_t)>& progress);

  // What the manifest says of this file. pre: write() has returned.
  Manifest report() const;

  uint64_t bytes() const noexcept { return file_bytes_; }
  uint64_t borrowed_bytes() const noexcept { return borrowed_bytes_; }  // written without a copy
  const std::string& engine() const noexcept { return engine_; }

 private:
  // A run of the file that lies in one piece of memory: the header, or a part.
  struct Segment {
    const CheckpointPart* part;  // of parts_; null: the header
    uint64_t offset;             // in the file
    uint64_t bytes;
    const std::byte* data;
    bool borrowed;
    bool copied;                      // into the image, with its checksums
    bool in_place;                    // written from where it is, where it can be
    std::vector<uint32_t> checksums;  // of the chunks; one for the whole header

    Device device() const noexcept { return part != nullptr ? part->device : Device{}; }
  };

  // A part of a segment on its way from a GPU to a staging buffer.
  struct Fetch {
    Segment* segment;
    uint64_t at;
    std::span<const std::byte> to;
  };

  bool fits(std::span<const CheckpointPart> parts) const noexcept;
  void lay_out_anew();
  uint64_t chunk_of(const Segment& segment) const noexcept { return segment.part != nullptr ? kChunk : file_bytes_; }
  void order_copies();
  void pass(Segment& segment, uint64_t at, uint64_t length, std::byte* copy_to);
  void take_checksums(Segment& segment, uint64_t at, std::span<const std::byte> bytes, std::byte* copy_to) const;
  uint64_t in_place(size_t index, uint64_t position, uint64_t block) const noexcept;
  uint64_t stage(size_t index, uint64_t position, uint64_t block, std::byte* out, std::vector<Fetch>& fetches);

  ShardMemory& memory_;
  std::vector<CheckpointPart> parts_;
  int64_t step_ = 0;
  std::string header_;
  std::string name_;
  std::vector<Segment> segments_;  // in the file's order; empty ones too. Of parts_ and header_, or none
  uint64_t file_bytes_ = 0;
  uint64_t borrowed_bytes_ = 0;
  std::string engine_;
  std::vector<Event> image_fetched_;  // when the image is whole
};

// Writes `text` as a new durable file.
void write_durable(FileSystem& files, const std::string& path, std::string_view text);

}  // namespace ng
