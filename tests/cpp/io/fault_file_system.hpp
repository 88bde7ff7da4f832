// A file system in memory that fails on demand and knows every state in which a crash may leave the disk.
//
// Operations are numbered from 0 in the order in which they are called: create, write, truncate, preallocate, sync,
// make_directory, rename, exchange, remove, sync_directory. What a crash may leave behind, as POSIX promises it:
// - what a sync of the file (contents, length) or of the directory (names) has covered is there;
// - each other write is absent, whole, or torn at multiples of 512 bytes (4096 if it is longer than that); a write that
//   makes the file longer may also leave the length and zeros; of a file's unsynced operations any subset may be there;
// - each other creation, rename, exchange or removal is there or not, wholly; any subset, but operations on the same
//   name keep their order. A sync of a file does not cover its name, nor one of a directory the contents of its files.
//
// The model allows more than journalling file systems do; who survives it needs no particular one. Not modelled:
// media that lose what was synced, links, permissions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "io/file_system.hpp"

namespace ng {

// Thrown by the operation at which the machine goes down and by everything after it.
class Crash : public std::exception {
 public:
  const char* what() const noexcept override { return "the machine has crashed"; }
};

struct FaultLog;

// How much of an unsynced operation a crash leaves.
struct Fate {
  enum Kind : uint8_t { absent, length, prefix, blocks, whole } kind = whole;
  uint64_t value = 0;  // prefix: bytes; blocks: the seed of the choice
};

// One state of the disk after a crash.
class CrashState {
 public:
  // The crash came after so many operations; the latest moment, if this state may arise at several.
  size_t operations() const noexcept { return operations_; }
  // What did not reach the disk: "after 7 operations; lost: #3 sync /x; #5 write /x [0, 4096): first 512 bytes".
  std::string describe() const;
  // Empties `directory` and puts there what the root held.
  void write_to(const std::filesystem::path& directory) const;
  // The bytes of a file, for tests that need no directory; throws std::out_of_range if there is none.
  std::string read(const std::string& path) const;
  bool exists(const std::string& path) const;

 private:
  friend class FaultFileSystem;
  std::shared_ptr<const FaultLog> log_;
  size_t operations_ = 0;
  std::vector<Fate> fates_;  // of each operation
};

struct CrashStates {
  std::vector<CrashState> states;  // all different
  bool exhaustive = false;         // all that there are

  auto begin() const { return states.begin(); }
  auto end() const { return states.end(); }
};

class FaultFileSystem final : public FileSystem {
 public:
  // `root` exists, and all paths begin with it. Files ask for transfers aligned to `alignment`.
  explicit FaultFileSystem(const std::string& root = "/", size_t alignment = 512);
  ~FaultFileSystem() override;

  // The file checks what it is used for: alignment, and that memory stays as it is from write() to wait() (else
  // std::logic_error). Transfers complete in another order than they were started in.
  std::unique_ptr<DirectFile> create(const std::string& path) override;
  void make_directory(const std::string& path) override;
  void rename(const std::string& from, const std::string& to) override;
  void exchange(const std::string& a, const std::string& b) override;
  void remove(const std::string& path) override;
  void sync_directory(const std::string& path) override;
  std::vector<std::string> list(const std::string& path) override;

  // Faults of the operation with this number. A failed one does nothing (a failed write is reported by wait()). A torn
  // write and a dropped write or sync are reported as done.
  void fail(size_t operation, int errno_value);
  void tear(size_t operation, size_t bytes);
  void drop(size_t operation);
  void crash(size_t operation);

  size_t operations() const;
  std::string describe(size_t operation) const;

  // All that happened so far is on the disk; crash states are counted from here.
  void settle();
  // States after any number of operations since settle(). All of them, if before the removal of equal ones they are not
  // more than `limit`; else for each number of operations an equal share (two at least): nothing and everything there,
  // each operation alone missing and alone there, then random ones by `seed`.
  CrashStates crash_states(size_t limit, uint64_t seed = 1) const;
  // The disk as it is without a crash.
  CrashState state() const;

 private:
  struct Disk;
  std::shared_ptr<Disk> disk_;
  friend class FaultFile;
};

}  // namespace ng
