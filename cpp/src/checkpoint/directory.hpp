// A directory of checkpoints: names of steps, the lock of its one saver, and removal that no crash can leave half done
// under a committed name.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/file.hpp"
#include "io/file_system.hpp"

namespace ng {

// The step of a committed name, "step-" and at least eight digits; nothing for any other name.
std::optional<int64_t> parse_step(std::string_view name) noexcept;

// "<name>.tmp-<id>", an id that nobody else has.
std::string temporary_name(std::string_view name);

// Committed steps, rising.
std::vector<int64_t> list_steps(FileSystem& files, const std::string& directory);

// Makes a directory and its missing parents, durably.
void make_directories(FileSystem& files, const std::string& path);

// Removes a directory of files.
void remove_directory(FileSystem& files, const std::string& path);

// Removes what writers left that died before they committed. pre: the lock is held.
void remove_leftovers(FileSystem& files, const std::string& directory);

// The steps that `keep` and `keep_every` let go, rising; never the newest.
std::vector<int64_t> steps_to_remove(const std::vector<int64_t>& steps, int64_t keep, int64_t keep_every);

// Removes a committed step: it loses its name before it loses a byte.
void remove_step(FileSystem& files, const std::string& directory, int64_t step);

// An exclusive flock on directory/.lock, held until destruction or the end of the process. A forked child gives its
// copy up at once, so that it never outlives its parent's.
class DirectoryLock {
 public:
  // Throws CheckpointError if another holds it, SystemError if the file cannot be opened.
  explicit DirectoryLock(const std::string& directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  FileDescriptor file_;
};

}  // namespace ng
