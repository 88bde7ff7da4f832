#include "io/fault_file_system.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "io/file.hpp"
#include "narrowgauge/error.hpp"

namespace ng {

constexpr int kNone = -1;
constexpr int kRoot = 0;

// A change of one name: which inode it had and has.
struct Link {
  int directory;
  std::string name;
  int before;
  int after;
};

struct Operation {
  enum Kind : uint8_t { write, resize, sync, names, sync_names } kind;
  std::string text;
  int inode = kNone;             // write, resize, sync: a file; sync_names: a directory
  uint64_t offset = 0;           // write
  std::string bytes = {};        // write: what gets there
  uint64_t length = 0;           // resize
  bool only_longer = false;      // resize: preallocate
  std::vector<Link> links = {};  // names: all of them or none
  bool effective = true;         // failed and dropped ones are not
};

struct FaultLog {
  std::string root;
  size_t settled = 0;             // operations before are on the disk
  std::vector<bool> directories;  // of each inode: whether it is a directory
  std::vector<Operation> operations;
};

namespace {

struct Tree {
  std::map<int, std::string> files;
  std::map<int, std::map<std::string, int>> directories;
};

void write_into(std::string& file, uint64_t offset, std::string_view bytes) {
  if (bytes.empty()) return;
  if (file.size() < offset + bytes.size()) file.resize(offset + bytes.size());
  std::memcpy(file.data() + offset, bytes.data(), bytes.size());
}

size_t block_of(const Operation& write) { return write.bytes.size() > 4096 ? 4096 : 512; }

std::string normal(const std::string& path) {
  std::string text = std::filesystem::path(path).lexically_normal().string();
  while (text.size() > 1 && text.back() == '/') text.pop_back();
  return text;
}

bool is_below(const std::string& directory, const std::string& path) {
  return normal(path).starts_with(normal(directory) + "/");
}

// The names between the root and `path`.
std::vector<std::string> parts_of(const std::string& root, const std::string& path) {
  const std::string whole = normal(path);
  if (whole != root && !(whole.starts_with(root) && (root == "/" || whole[root.size()] == '/'))) {
    throw std::logic_error(concat(path, " is not below the root ", root));
  }
  std::vector<std::string> parts;
  for (const auto& part : std::filesystem::path(whole.substr(root.size())).relative_path()) parts.push_back(part);
  return parts;
}

int find(const Tree& tree, const std::vector<std::string>& parts) {
  int inode = kRoot;
  for (const std::string& part : parts) {
    const auto directory = tree.directories.find(inode);
    if (directory == tree.directories.end()) return kNone;
    const auto entry = directory->second.find(part);
    if (entry == directory->second.end()) return kNone;
    inode = entry->second;
  }
  return inode;
}

// --- states -------------------------------------------------------------------------------------------------

void apply(Tree& tree, const Operation& operation, Fate fate) {
  if (fate.kind == Fate::absent) return;
  switch (operation.kind) {
    case Operation::write: {
      std::string& file = tree.files[operation.inode];
      const std::string& bytes = operation.bytes;
      if (fate.kind == Fate::whole) {
        write_into(file, operation.offset, bytes);
      } else if (fate.kind == Fate::prefix) {
        write_into(file, operation.offset, std::string_view(bytes).substr(0, fate.value));
      } else {
        if (file.size() < operation.offset + bytes.size()) file.resize(operation.offset + bytes.size());
        if (fate.kind == Fate::length) break;
        std::minstd_rand random(static_cast<unsigned>(fate.value));
        for (size_t at = 0; at < bytes.size(); at += block_of(operation)) {
          if (random() % 2 == 0) {
            write_into(file, operation.offset + at, std::string_view(bytes).substr(at, block_of(operation)));
          }
        }
      }
      break;
    }
    case Operation::resize: {
      std::string& file = tree.files[operation.inode];
      if (!operation.only_longer || file.size() < operation.length) file.resize(operation.length);
      break;
    }
    case Operation::names:
      for (const Link& link : operation.links) {
        auto& names = tree.directories[link.directory];
        if (link.after == kNone) {
          names.erase(link.name);
        } else {
          names[link.name] = link.after;
        }
      }
      break;
    case Operation::sync:
    case Operation::sync_names: break;
  }
}

Tree tree_of(const FaultLog& log, size_t operations, const std::vector<Fate>& fates) {
  Tree tree;
  for (size_t i = 0; i < log.directories.size(); ++i) {
    if (log.directories[i]) {
      tree.directories[static_cast<int>(i)];
    } else {
      tree.files[static_cast<int>(i)];
    }
  }
  for (size_t i = 0; i < operations; ++i) {
    if (log.operations[i].effective) apply(tree, log.operations[i], fates[i]);
  }
  return tree;
}

// What can be reached from the root, as text that is equal only for equal trees.
void print(const Tree& tree, int inode, std::string& out) {
  const auto directory = tree.directories.find(inode);
  if (directory == tree.directories.end()) {
    const std::string& file = tree.files.at(inode);
    out += concat("f", file.size(), ":") + file;
    return;
  }
  out += concat("d", directory->second.size(), ":");
  for (const auto& [name, child] : directory->second) {
    out += concat(name.size(), ":", name);
    print(tree, child, out);
  }
}

// Two hashes and the length stand for the text, which may be long.
std::string digest(const Tree& tree) {
  std::string text = "salt";
  print(tree, kRoot, text);
  const std::hash<std::string_view> hash;
  return concat(hash(text), ":", hash(std::string_view(text).substr(4)), ":", text.size());
}

void write_tree(const Tree& tree, int inode, const std::filesystem::path& path) {
  for (const auto& [name, child] : tree.directories.at(inode)) {
    if (tree.directories.contains(child)) {
      std::filesystem::create_directory(path / name);
      write_tree(tree, child, path / name);
    } else {
      std::ofstream(path / name, std::ios::binary) << tree.files.at(child);
    }
  }
}

bool changes_disk(const Operation& operation) {
  return operation.effective && operation.kind != Operation::sync && operation.kind != Operation::sync_names;
}

// Which of the first `operations` operations are on the disk for certain.
std::vector<bool> durable(const FaultLog& log, size_t operations) {
  std::vector<bool> safe(operations);
  std::set<int> synced;                          // inodes
  std::set<std::pair<int, std::string>> needed;  // names of later operations that are on the disk
  for (size_t i = operations; i-- > 0;) {
    const Operation& operation = log.operations[i];
    if (!operation.effective) continue;
    if (operation.kind == Operation::sync || operation.kind == Operation::sync_names) {
      synced.insert(operation.inode);
    } else if (operation.kind == Operation::names) {
      safe[i] = i < log.settled || std::any_of(
                                       operation.links.begin(), operation.links.end(),
                                       [&](const Link& link) {
                                         return synced.contains(link.directory) ||
                                                needed.contains({link.directory, link.name});
                                       });
      if (!safe[i]) continue;
      for (const Link& link : operation.links) needed.insert({link.directory, link.name});
    } else {
      safe[i] = i < log.settled || synced.contains(operation.inode);
    }
  }
  return safe;
}

}  // namespace

std::string CrashState::describe() const {
  std::string text = concat("after ", operations_, " operations; lost:");
  for (size_t i = 0; i < operations_; ++i) {
    const Fate fate = fates_[i];
    const Operation& operation = log_->operations[i];
    if (fate.kind == Fate::whole || !changes_disk(operation)) continue;
    text += concat(" #", i, " ", operation.text);
    if (fate.kind == Fate::length) text += " all but the length";
    if (fate.kind == Fate::prefix) text += concat(" after ", fate.value, " bytes");
    if (fate.kind == Fate::blocks) text += " some blocks";
    text += ";";
  }
  return text;
}

void CrashState::write_to(const std::filesystem::path& directory) const {
  for (const auto& entry : std::filesystem::directory_iterator(directory)) std::filesystem::remove_all(entry);
  write_tree(tree_of(*log_, operations_, fates_), kRoot, directory);
}

bool CrashState::exists(const std::string& path) const {
  return find(tree_of(*log_, operations_, fates_), parts_of(log_->root, path)) != kNone;
}

std::string CrashState::read(const std::string& path) const {
  const Tree tree = tree_of(*log_, operations_, fates_);
  return tree.files.at(find(tree, parts_of(log_->root, path)));
}

// --- the file system -----------------------------------------------------------------------------------------

struct FaultFileSystem::Disk {
  struct Fault {
    enum Kind : uint8_t { fail, tear, drop, crash } kind;
    size_t value = 0;
  };

  std::mutex mutex;
  FaultLog log;
  Tree now;
  std::map<size_t, Fault> faults;
  size_t alignment = 512;
  bool crashed = false;

  void check_alive() const {
    if (crashed) throw Crash();
  }

  // Logs and, unless a fault is due, does the operation. Returns the errno with which it fails, or 0.
  int run(Operation operation) {
    check_alive();
    const auto fault = faults.find(log.operations.size());
    int error = 0;
    if (fault != faults.end()) {
      const bool is_sync = operation.kind == Operation::sync || operation.kind == Operation::sync_names;
      switch (fault->second.kind) {
        case Fault::crash: crashed = true; throw Crash();
        case Fault::fail:
          error = static_cast<int>(fault->second.value);
          operation.effective = false;
          break;
        case Fault::tear:
          if (operation.kind != Operation::write) throw std::logic_error("cannot tear: " + operation.text);
          operation.bytes.resize(std::min(operation.bytes.size(), fault->second.value));
          break;
        case Fault::drop:
          if (operation.kind != Operation::write && !is_sync) throw std::logic_error("cannot drop: " + operation.text);
          operation.effective = false;
          break;
      }
    }
    if (operation.effective) apply(now, operation, Fate{});
    log.operations.push_back(std::move(operation));
    return error;
  }

  int new_inode(bool directory) {
    log.directories.push_back(directory);
    const int inode = static_cast<int>(log.directories.size()) - 1;
    if (directory) {
      now.directories[inode];
    } else {
      now.files[inode];
    }
    return inode;
  }

  struct Place {
    int directory;
    std::string name;
    int inode;
  };

  // Where a name is or would be.
  Place place(const char* action, const std::string& path) const {
    std::vector<std::string> parts = parts_of(log.root, path);
    if (parts.empty()) throw_system_error(EBUSY, action, path);
    const std::string name = parts.back();
    parts.pop_back();
    const int directory = find(now, parts);
    if (directory == kNone) throw_system_error(ENOENT, action, path);
    const auto names = now.directories.find(directory);
    if (names == now.directories.end()) throw_system_error(ENOTDIR, action, path);
    const auto entry = names->second.find(name);
    return {directory, name, entry == names->second.end() ? kNone : entry->second};
  }
};

class FaultFile final : public DirectFile {
 public:
  FaultFile(std::shared_ptr<FaultFileSystem::Disk> disk, std::string path, int inode)
      : disk_(std::move(disk)), path_(std::move(path)), inode_(inode), random_(static_cast<unsigned>(inode)) {}

  size_t alignment() const noexcept override { return disk_->alignment; }
  int queue_depth() const noexcept override { return 8; }
  void register_memory(std::span<std::byte>) override {}

  void write(std::span<const std::byte> bytes, uint64_t offset, uint64_t tag) override {
    check_usable(bytes, offset);
    const std::string copy(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    const std::string text = concat("write ", path_, " [", offset, ", ", offset + bytes.size(), ")");
    const std::lock_guard lock(disk_->mutex);
    // The kernel hears nothing of an empty one.
    const int error =
        bytes.empty()
            ? 0
            : disk_->run({.kind = Operation::write, .text = text, .inode = inode_, .offset = offset, .bytes = copy});
    transfers_.push_back({tag, error, false, text, bytes, copy});
  }

  void read(std::span<std::byte> bytes, uint64_t offset, uint64_t tag) override {
    check_usable(bytes, offset);
    const std::lock_guard lock(disk_->mutex);
    disk_->check_alive();
    const std::string& file = disk_->now.files.at(inode_);
    const size_t last_block = (file.size() + alignment() - 1) / alignment() * alignment();
    const bool beyond_end = offset + bytes.size() > last_block || (offset >= file.size() && !bytes.empty());
    if (!beyond_end && !bytes.empty()) {
      const size_t there = std::min<size_t>(bytes.size(), file.size() - offset);
      std::memcpy(bytes.data(), file.data() + offset, there);
      std::memset(bytes.data() + there, 0, bytes.size() - there);
    }
    transfers_.push_back({tag, 0, beyond_end, concat("read ", path_, " at ", offset), {}, {}});
  }

  Completion wait_any() override {
    const std::lock_guard lock(disk_->mutex);
    disk_->check_alive();
    if (transfers_.empty()) throw std::logic_error("wait() on " + path_ + ": nothing is in flight");
    const size_t index = random_() % transfers_.size();
    const Transfer transfer = transfers_[index];
    transfers_.erase(transfers_.begin() + static_cast<std::ptrdiff_t>(index));
    return {transfer.tag, failure(transfer)};
  }

  int in_flight() const noexcept override { return static_cast<int>(transfers_.size()); }

  void preallocate(uint64_t bytes) override {
    resize(bytes, true, concat("preallocate ", path_, " to ", bytes), "reserve space for");
  }
  void truncate(uint64_t bytes) override {
    resize(bytes, false, concat("truncate ", path_, " to ", bytes), "set the length of");
  }

  void sync() override {
    const std::lock_guard lock(disk_->mutex);
    disk_->check_alive();
    throw_first_failure();
    if (sync_error_ == 0) sync_error_ = disk_->run({.kind = Operation::sync, .text = "sync " + path_, .inode = inode_});
    if (sync_error_ != 0) throw_system_error(sync_error_, "make durable", path_);
  }

  uint64_t size() const override {
    const std::lock_guard lock(disk_->mutex);
    disk_->check_alive();
    return disk_->now.files.at(inode_).size();
  }

  void close() override {
    const std::lock_guard lock(disk_->mutex);
    disk_->check_alive();
    closed_ = true;
    throw_first_failure();
  }

  std::string engine() const override { return "memory"; }

 private:
  struct Transfer {
    uint64_t tag;
    int error;
    bool beyond_end;
    std::string text;
    std::span<const std::byte> memory;
    std::string expected;
  };

  void check_usable(std::span<const std::byte> bytes, uint64_t offset) const {
    NG_CHECK(!closed_, InvalidArgument, path_, " is closed");
    NG_CHECK((reinterpret_cast<uintptr_t>(bytes.data()) | offset | bytes.size()) % alignment() == 0, InvalidArgument,
             path_, ": address ", static_cast<const void*>(bytes.data()), ", offset ", offset, ", length ",
             bytes.size(), "; expected multiples of ", alignment());
  }

  std::exception_ptr failure(const Transfer& transfer) const {
    if (!transfer.memory.empty() &&
        std::memcmp(transfer.memory.data(), transfer.expected.data(), transfer.expected.size()) != 0) {
      throw std::logic_error("memory changed before its transfer was over: " + transfer.text);
    }
    if (transfer.beyond_end) {
      return std::make_exception_ptr(FileCorrupt("cannot " + transfer.text + ": the file ends before"));
    }
    if (transfer.error == 0) return nullptr;
    return std::make_exception_ptr(SystemError(
        transfer.error, concat("cannot ", transfer.text, ": ", std::generic_category().message(transfer.error))));
  }

  // The others are left for wait().
  void throw_first_failure() {
    for (auto transfer = transfers_.begin(); transfer != transfers_.end(); ++transfer) {
      if (const std::exception_ptr error = failure(*transfer)) {
        transfers_.erase(transfer);
        std::rethrow_exception(error);
      }
    }
  }

  void resize(uint64_t bytes, bool only_longer, const std::string& text, const char* action) {
    const std::lock_guard lock(disk_->mutex);
    const int error = disk_->run(
        {.kind = Operation::resize, .text = text, .inode = inode_, .length = bytes, .only_longer = only_longer});
    if (error != 0) throw_system_error(error, action, path_);
  }

  std::shared_ptr<FaultFileSystem::Disk> disk_;
  std::string path_;
  int inode_;
  std::minstd_rand random_;
  std::vector<Transfer> transfers_;
  int sync_error_ = 0;
  bool closed_ = false;
};

FaultFileSystem::FaultFileSystem(const std::string& root, size_t alignment) : disk_(std::make_shared<Disk>()) {
  disk_->log.root = normal(root);
  disk_->alignment = alignment;
  disk_->new_inode(true);
}

FaultFileSystem::~FaultFileSystem() = default;

std::unique_ptr<DirectFile> FaultFileSystem::create(const std::string& path) {
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const Disk::Place at = disk_->place("create", path);
  if (at.inode != kNone) throw_system_error(EEXIST, "create", path);
  const int inode = disk_->new_inode(false);
  const int error = disk_->run(
      {.kind = Operation::names, .text = "create " + path, .links = {{at.directory, at.name, kNone, inode}}});
  if (error != 0) throw_system_error(error, "create", path);
  return std::make_unique<FaultFile>(disk_, path, inode);
}

void FaultFileSystem::make_directory(const std::string& path) {
  constexpr const char* kAction = "make the directory";
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const Disk::Place at = disk_->place(kAction, path);
  if (at.inode != kNone) throw_system_error(EEXIST, kAction, path);
  const int inode = disk_->new_inode(true);
  const int error = disk_->run(
      {.kind = Operation::names, .text = "make_directory " + path, .links = {{at.directory, at.name, kNone, inode}}});
  if (error != 0) throw_system_error(error, kAction, path);
}

void FaultFileSystem::rename(const std::string& from, const std::string& to) {
  const std::string what = from + " to " + to;
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const Disk::Place source = disk_->place("rename", from);
  const Disk::Place target = disk_->place("rename", to);
  if (source.inode == kNone) throw_system_error(ENOENT, "rename", what);
  if (target.inode != kNone) throw_system_error(EEXIST, "rename", what);
  if (is_below(from, to)) throw_system_error(EINVAL, "rename", what);
  const int error = disk_->run({.kind = Operation::names,
                                .text = "rename " + what,
                                .links = {{source.directory, source.name, source.inode, kNone},
                                          {target.directory, target.name, kNone, source.inode}}});
  if (error != 0) throw_system_error(error, "rename", what);
}

void FaultFileSystem::exchange(const std::string& a, const std::string& b) {
  const std::string what = a + " and " + b;
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const Disk::Place first = disk_->place("exchange", a);
  const Disk::Place second = disk_->place("exchange", b);
  if (first.inode == kNone || second.inode == kNone) throw_system_error(ENOENT, "exchange", what);
  if (is_below(a, b) || is_below(b, a)) throw_system_error(EINVAL, "exchange", what);
  const int error = disk_->run({.kind = Operation::names,
                                .text = "exchange " + what,
                                .links = {{first.directory, first.name, first.inode, second.inode},
                                          {second.directory, second.name, second.inode, first.inode}}});
  if (error != 0) throw_system_error(error, "exchange", what);
}

void FaultFileSystem::remove(const std::string& path) {
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const Disk::Place at = disk_->place("remove", path);
  if (at.inode == kNone) throw_system_error(ENOENT, "remove", path);
  const auto names = disk_->now.directories.find(at.inode);
  if (names != disk_->now.directories.end() && !names->second.empty()) throw_system_error(ENOTEMPTY, "remove", path);
  const int error = disk_->run(
      {.kind = Operation::names, .text = "remove " + path, .links = {{at.directory, at.name, at.inode, kNone}}});
  if (error != 0) throw_system_error(error, "remove", path);
}

void FaultFileSystem::sync_directory(const std::string& path) {
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const int inode = find(disk_->now, parts_of(disk_->log.root, path));
  if (inode == kNone) throw_system_error(ENOENT, "open the directory", path);
  if (!disk_->now.directories.contains(inode)) throw_system_error(ENOTDIR, "open the directory", path);
  const int error = disk_->run({.kind = Operation::sync_names, .text = "sync_directory " + path, .inode = inode});
  if (error != 0) throw_system_error(error, "make durable the directory", path);
}

std::vector<std::string> FaultFileSystem::list(const std::string& path) {
  const std::lock_guard lock(disk_->mutex);
  disk_->check_alive();
  const int inode = find(disk_->now, parts_of(disk_->log.root, path));
  if (inode == kNone) throw_system_error(ENOENT, "list", path);
  const auto names = disk_->now.directories.find(inode);
  if (names == disk_->now.directories.end()) throw_system_error(ENOTDIR, "list", path);
  std::vector<std::string> out;
  for (const auto& [name, child] : names->second) out.push_back(name);
  return out;
}

void FaultFileSystem::fail(size_t operation, int errno_value) {
  const std::lock_guard lock(disk_->mutex);
  disk_->faults[operation] = {Disk::Fault::fail, static_cast<size_t>(errno_value)};
}

void FaultFileSystem::tear(size_t operation, size_t bytes) {
  const std::lock_guard lock(disk_->mutex);
  disk_->faults[operation] = {Disk::Fault::tear, bytes};
}

void FaultFileSystem::drop(size_t operation) {
  const std::lock_guard lock(disk_->mutex);
  disk_->faults[operation] = {Disk::Fault::drop};
}

void FaultFileSystem::crash(size_t operation) {
  const std::lock_guard lock(disk_->mutex);
  disk_->faults[operation] = {Disk::Fault::crash};
}

size_t FaultFileSystem::operations() const {
  const std::lock_guard lock(disk_->mutex);
  return disk_->log.operations.size();
}

std::string FaultFileSystem::describe(size_t operation) const {
  const std::lock_guard lock(disk_->mutex);
  return disk_->log.operations.at(operation).text;
}

void FaultFileSystem::settle() {
  const std::lock_guard lock(disk_->mutex);
  disk_->log.settled = disk_->log.operations.size();
}

CrashState FaultFileSystem::state() const {
  const std::lock_guard lock(disk_->mutex);
  CrashState state;
  state.log_ = std::make_shared<const FaultLog>(disk_->log);
  state.operations_ = disk_->log.operations.size();
  state.fates_.resize(state.operations_);
  return state;
}

CrashStates FaultFileSystem::crash_states(size_t limit, uint64_t seed) const {
  const CrashState complete = state();
  const FaultLog& log = *complete.log_;
  const size_t total = complete.operations_;

  // What may become of each operation that is not safe, the whole of it last.
  const auto fates_of = [&](const Operation& operation) {
    std::vector<Fate> fates{{Fate::absent}};
    if (operation.kind == Operation::write) {
      fates.push_back({Fate::length});
      const size_t block = block_of(operation);
      const size_t blocks = (operation.bytes.size() + block - 1) / block;
      // All places where a short write may tear; of a long one the ends and the middle.
      for (size_t i = 1; i < blocks; ++i) {
        if (blocks <= 8 || i == 1 || i == blocks / 2 || i + 1 == blocks) fates.push_back({Fate::prefix, i * block});
      }
    }
    fates.push_back({Fate::whole});
    return fates;
  };

  struct Window {  // what is open after a number of operations
    std::vector<size_t> open;
    double states = 1;
  };
  std::vector<Window> windows;
  double all = 0;
  for (size_t n = log.settled; n <= total; ++n) {
    Window window;
    const std::vector<bool> safe = durable(log, n);
    for (size_t i = log.settled; i < n; ++i) {
      if (safe[i] || !changes_disk(log.operations[i])) continue;
      window.open.push_back(i);
      window.states *= static_cast<double>(fates_of(log.operations[i]).size());
    }
    all += window.states;
    windows.push_back(std::move(window));
  }

  CrashStates result;
  result.exhaustive = all <= static_cast<double>(limit);
  const size_t share = std::max<size_t>(1, limit / windows.size());
  std::unordered_map<std::string, size_t> seen;
  std::mt19937_64 random(seed);
  for (size_t w = 0; w < windows.size(); ++w) {
    const size_t n = log.settled + w;
    const std::vector<size_t>& open = windows[w].open;

    const auto add = [&](std::vector<Fate> fates) {
      // Of the operations on one name, none is there without those before it.
      std::set<std::pair<int, std::string>> lost;
      for (const size_t i : open) {
        if (log.operations[i].kind != Operation::names) continue;
        const std::vector<Link>& links = log.operations[i].links;
        const bool follows_lost = std::any_of(
            links.begin(), links.end(), [&](const Link& link) { return lost.contains({link.directory, link.name}); });
        if (!follows_lost && fates[i].kind != Fate::absent) continue;
        fates[i].kind = Fate::absent;
        for (const Link& link : links) lost.insert({link.directory, link.name});
      }
      const auto [at, is_new] = seen.try_emplace(digest(tree_of(log, n, fates)), result.states.size());
      if (is_new) result.states.push_back(complete);
      CrashState& state = result.states[at->second];
      state.operations_ = n;
      state.fates_ = std::move(fates);
    };

    std::vector<Fate> fates(n);
    if (windows[w].states <= static_cast<double>(result.exhaustive ? limit : share)) {
      // An odometer over the fates.
      std::vector<size_t> digits(open.size());
      while (true) {
        for (size_t i = 0; i < open.size(); ++i) fates[open[i]] = fates_of(log.operations[open[i]])[digits[i]];
        add(fates);
        size_t i = 0;
        while (i < open.size() && ++digits[i] == fates_of(log.operations[open[i]]).size()) digits[i++] = 0;
        if (i == open.size()) break;
      }
      continue;
    }
    const size_t enough = result.states.size() + share;
    const auto set_all = [&](Fate::Kind kind) {
      for (const size_t i : open) fates[i] = {kind};
    };
    for (const Fate::Kind others : {Fate::absent, Fate::whole}) {
      set_all(others);
      add(fates);
    }
    for (const size_t i : open) {
      for (const Fate::Kind others : {Fate::whole, Fate::absent}) {
        if (result.states.size() >= enough) break;
        set_all(others);
        fates[i].kind = others == Fate::whole ? Fate::absent : Fate::whole;
        add(fates);
      }
    }
    for (size_t attempts = 0; attempts < 2 * share && result.states.size() < enough; ++attempts) {
      for (const size_t i : open) {
        std::vector<Fate> choices = fates_of(log.operations[i]);
        // As often there as not, and torn in any pattern.
        if (log.operations[i].kind == Operation::write) choices.push_back({Fate::blocks, random()});
        const uint64_t dice = random() % 4;
        fates[i] = dice == 0 ? Fate{Fate::absent} : dice == 1 ? Fate{Fate::whole} : choices[random() % choices.size()];
      }
      add(fates);
    }
  }
  return result;
}

}  // namespace ng
