// The seam between what is written and where: directories and files as checkpoints use them.
//
// Two implementations: the operating system's (native_file_system), and a recording one in the tests that fails, tears
// or drops any operation and rebuilds every state in which a crash may leave the disk. So all that must survive a crash
// goes through here. Errors are SystemError with the path and errno. A FileSystem may be used from many threads, a
// DirectFile from one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrowgauge/io.hpp"

namespace ng {

class FileSystem {
 public:
  virtual ~FileSystem() = default;

  // A new, empty file for writing; EEXIST if the name is taken, even by a dangling link.
  virtual std::unique_ptr<DirectFile> create(const std::string& path) = 0;

  // A new directory; its parent must exist.
  virtual void make_directory(const std::string& path) = 0;
  // Gives `from` the name `to`, atomically. EEXIST if `to` exists.
  virtual void rename(const std::string& from, const std::string& to) = 0;
  // Swaps two names that both exist, atomically.
  virtual void exchange(const std::string& a, const std::string& b) = 0;
  // A file or an empty directory.
  virtual void remove(const std::string& path) = 0;
  // Makes the names in a directory durable: created, renamed and removed ones.
  virtual void sync_directory(const std::string& path) = 0;

  // Names in a directory, sorted, without "." and "..".
  virtual std::vector<std::string> list(const std::string& path) = 0;
};

// The operating system's. `engine` as in open_direct.
std::unique_ptr<FileSystem> native_file_system(IoEngine engine = IoEngine::automatic);

}  // namespace ng
