// checkpoint: directories of safetensors shards and a manifest, written past the page cache in the background and
// committed by one rename.
//
//   run/step-00000100/  model-00000-of-00002.safetensors  model-00001-of-00002.safetensors  manifest.json
//
// Everything is written into step-00000100.tmp-<id>/: shards fsynced -> manifest written and fsynced -> directory
// fsynced -> renamed -> parent fsynced. A name without `.tmp-` is complete; there is no other state, and no pointer to
// keep. Tensors are named arrays of safetensors' dtypes; what else a training state holds is one text that the caller
// encodes. docs/checkpoint.md has the guarantee, the manifest's grammar and the failures that it was tested against.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/stream.hpp"

namespace ng {

class FileSystem;  // io/file_system.hpp

// A part of a row-major tensor: a box with [start, stop) for every axis, or a run of its flattened elements.
struct Region {
  bool flat = false;
  std::vector<std::array<int64_t, 2>> bounds;  // flat: exactly one

  static Region whole(std::span<const int64_t> shape);
  static Region run(int64_t start, int64_t stop) { return {true, {{start, stop}}}; }
  int64_t numel() const noexcept;
  friend bool operator==(const Region&, const Region&) = default;
};

// --- writing ------------------------------------------------------------------------------------------------

// A region of a tensor in this writer's memory: dense, row-major.
struct CheckpointPart {
  std::string name;
  std::string dtype;           // safetensors' name
  std::vector<int64_t> shape;  // of the whole tensor
  Region region;
  std::span<const std::byte> bytes;
  // false: copied before save() returns. true: read in the background where it is, until wait_released().
  bool borrowed = false;
  // Of borrowed memory: whether it is written without any copy where address and size are multiples of the disk's
  // block. That pays for huge pages, such as a HostPool's; from 4 KiB pages some disks write at half the rate.
  bool in_place = true;
  // On a GPU `bytes` is an address there. It is read after the work that `stream`, one of that GPU's, had been given
  // when save() was called, and what is not borrowed is copied in the background too: work that the stream is given
  // after save() waits for that copy, the host does not.
  Device device = {};
  CUstream_st* stream = nullptr;
};

struct CheckpointReport {
  int64_t step = -1;
  std::string path;             // the committed directory
  uint64_t bytes = 0;           // of this writer's shard
  uint64_t borrowed_bytes = 0;  // of those, written straight from the caller's memory
  double blocked_seconds = 0;   // that save() took
  double seconds = 0;           // from the call of save() to the commit
  double cpu_seconds = 0;       // of the writer thread
  std::string engine;           // as DirectFile::engine()
};

struct CheckpointOptions {
  // Committed steps that are kept: the newest `keep` (0: all) and the multiples of keep_every (0: none).
  int64_t keep = 0;
  int64_t keep_every = 0;

  // Several writers make one checkpoint. `exchange` gives every writer's message to every writer, in order of their
  // index; it is called on the background thread, the same number of times by each, and throws if one does not answer.
  int writer = 0;
  int writers = 1;
  std::function<std::vector<std::string>(const std::string& message)> exchange = {};

  // Called on the background thread, at most once for some MiB. Must not throw.
  std::function<void(uint64_t done, uint64_t total)> progress = {};

  // Where it writes; null: the operating system's.
  std::shared_ptr<FileSystem> file_system = {};
};

struct SaveOptions {
  bool overwrite = false;  // replace the step if it exists: the new one is committed before the old one goes
  std::string state = {};  // kept in the manifest as it is: UTF-8, meant to be JSON. Writer 0's counts.
  // Called on the background thread once no borrowed memory is read any more; a text is the reason not to commit, such
  // as a tensor that has changed meanwhile.
  std::function<std::string()> check = {};
};

// Saves into one directory, which it locks: a second one on it, in any process, is a CheckpointError. Leftovers of
// writers that died are removed when it is opened. One thread at a time. After fork the child cannot use it.
class Checkpointer {
 public:
  // Makes the directory if it is absent. Throws SystemError, CheckpointError.
  explicit Checkpointer(const std::string& directory, CheckpointOptions options = {});
  ~Checkpointer();  // waits; what fails then is lost: call close() before
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  // Starts a save and returns once `parts` may be written to, but for the borrowed ones. Waits for the save before, and
  // throws what that one failed with. Throws InvalidArgument for parts that are not what they claim, CheckpointError if
  // the step exists. Nothing is started then.
  void save(int64_t step, std::span<const CheckpointPart> parts, SaveOptions options = {});

  // Whether a save runs.
  bool busy() const;
  // Waits at most `seconds` for the end of the save; whether it has ended. Throws what it failed with, once: after that
  // no save is pending and the checkpoints before are as they were.
  bool wait_for(double seconds);
  void wait();
  // Waits until borrowed memory may change (at most `seconds`); whether it may. Throws if the save has failed.
  bool wait_released_for(double seconds);

  // Of the last save that was committed; step is -1 before the first.
  CheckpointReport last() const;

  // Waits and gives up the lock. Throws as wait() does; the Checkpointer is closed all the same.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// --- reading ------------------------------------------------------------------------------------------------

// Where a region of a tensor lies. Checksums are CRC32C of consecutive chunks of the manifest's chunk_bytes.
struct StoredRegion {
  Region region;
  uint32_t file = 0;    // index into Manifest::files
  uint64_t offset = 0;  // from the file's beginning
  uint64_t bytes = 0;
  std::vector<uint32_t> checksums;
};

struct StoredTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<StoredRegion> regions;  // disjoint; together the whole tensor
};

struct StoredFile {
  std::string name;  // within the checkpoint's directory
  uint64_t bytes = 0;
  uint64_t header_bytes = 0;  // length prefix and JSON
  uint32_t header_checksum = 0;
};

struct Manifest {
  int64_t step = 0;
  uint64_t chunk_bytes = 0;
  std::vector<StoredFile> files;
  std::vector<StoredTensor> tensors;
  std::string state;
};

enum class Verify : uint8_t {
  chunks,  // whole chunks are read and their checksums compared
  off,     // exactly the bytes asked for
};

// A region of a tensor that is wanted, and the dense row-major memory for it.
struct ReadRequest {
  std::string name;
  Region region;
  std::span<std::byte> out;
};

struct ReadStatistics {
  uint64_t bytes = 0;         // asked for by the requests
  uint64_t bytes_read = 0;    // from files: with Verify::chunks at most two chunks more for each contiguous run
  uint64_t bytes_direct = 0;  // of those, past the page cache
};

// A committed checkpoint, open for reading. The manifest is checked in full when it is opened (names that stay inside
// the directory, lengths, regions that tile their tensors and do not overlap in their files), and so are the files'
// sizes and headers. Const functions are thread-safe.
class Checkpoint {
 public:
  // `path`: the directory of one step. Throws SystemError, CheckpointCorrupt.
  explicit Checkpoint(const std::string& path);
  ~Checkpoint();
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;

  const std::string& path() const noexcept;
  const Manifest& manifest() const noexcept;
  const StoredTensor* find(std::string_view name) const noexcept;

  // Fills every request, reading files in long runs on all threads; files that are mostly in the page cache are read
  // through it, others past it. Throws CheckpointCorrupt naming file, tensor and chunk, CheckpointError for a tensor
  // that is not there, InvalidArgument for a region or memory that does not fit it. After an error the memory of the
  // requests is undefined.
  ReadStatistics read(std::span<const ReadRequest> requests, Verify verify = Verify::chunks) const;

  // The bytes of a tensor that is stored in one piece, mapped and not verified; empty where it is in several. They live
  // as long as *this.
  std::span<const std::byte> map(std::string_view name) const;

  // Reads everything and compares every checksum. progress(done, total) in bytes, from any thread, may be empty.
  void verify(const std::function<void(uint64_t done, uint64_t total)>& progress = {}) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The committed steps in a directory, rising. Throws SystemError.
std::vector<int64_t> checkpoint_steps(const std::string& directory);
// "step-00000100".
std::string checkpoint_name(int64_t step);
// Removes committed steps as CheckpointOptions says, keeping at least the newest; returns those removed. Takes the
// directory's lock. `dry_run` only tells.
std::vector<int64_t> prune_checkpoints(const std::string& directory, int64_t keep, int64_t keep_every, bool dry_run);

}  // namespace ng
