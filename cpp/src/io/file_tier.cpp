// The file tier: extents of a file by key, and the thread that moves bytes between them and memory.
//
// A buffer lies in as few ranges of the file as there are; ranges are multiples of a block, so that any file takes
// them. The thread alone uses the DirectFile. It cuts requests into pieces, so that one large buffer fills the queue
// and the next request's pieces follow without a gap.
#include "io/file_tier.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <system_error>
#include <utility>

#include "io/thread.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

constexpr uint64_t kBlock = 4096;
constexpr uint64_t kPiece = uint64_t{1} << 20;
// The file grows by so much at once: writes inside a file are cheaper than those that extend it.
constexpr uint64_t kGrowth = uint64_t{64} << 20;

constexpr uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

FileTier::Impl::Impl(std::unique_ptr<DirectFile> file, uint64_t limit)
    : owner_(getpid()), limit_(limit), file_(std::move(file)) {
  NG_CHECK(file_->alignment() <= kBlock, InvalidArgument, "a file tier's file has alignment ", file_->alignment(),
           ", expected at most ", kBlock);
  slots_.resize(static_cast<size_t>(file_->queue_depth()));
  for (size_t i = slots_.size(); i-- > 0;) free_slots_.push_back(i);
  try {
    thread_ = start_thread([this] { serve(); });
  } catch (const std::system_error& error) {
    throw SystemError(error.code().value(), concat("cannot start the file tier's thread: ", error.what()));
  }
}

FileTier::Impl::~Impl() {
  if (thread_.joinable()) stop();
  file_.reset();  // before the staging memory that it knows
}

bool FileTier::Impl::is_owner() const noexcept { return getpid() == owner_; }

void FileTier::Impl::check_owner() const {
  NG_CHECK(is_owner(), Error, "the file tier was made before fork(); the child cannot use it");
}

void FileTier::Impl::check_usable() const {
  NG_CHECK(!stopping_, InvalidArgument, "the file tier is closed");
  if (broken_) std::rethrow_exception(broken_);
}

void FileTier::Impl::put(uint64_t key, std::span<const std::byte> bytes, Done done) {
  check_owner();
  std::unique_lock lock(mutex_);
  check_usable();
  forget(key);
  auto entry = std::make_shared<Entry>();
  entry->size = bytes.size();
  entry->ranges = allocate(lock, round_up(bytes.size(), kBlock));
  forget(key);  // another thread's, put while this one waited for space
  entries_[key] = entry;
  submit(true, std::move(entry), {const_cast<std::byte*>(bytes.data()), bytes.size()}, std::move(done));
}

void FileTier::Impl::get(uint64_t key, std::span<std::byte> out, Done done) {
  check_owner();
  const std::lock_guard lock(mutex_);
  check_usable();
  const auto found = entries_.find(key);
  NG_CHECK(found != entries_.end(), InvalidArgument, "the file tier has no buffer under key ", key);
  NG_CHECK(out.size() == found->second->size, InvalidArgument, "the buffer under key ", key, " has ",
           found->second->size, " bytes, asked for were ", out.size());
  submit(false, found->second, out, std::move(done));
}

void FileTier::Impl::submit(bool is_put, std::shared_ptr<Entry> entry, std::span<std::byte> memory, Done done) {
  auto request = std::make_shared<Request>();
  request->is_put = is_put;
  request->done = std::move(done);
  for (const Range& range : entry->ranges) {
    for (uint64_t at = 0; at < range.length && !memory.empty(); at += kPiece) {
      const size_t length = std::min<uint64_t>({kPiece, range.length - at, memory.size()});
      request->pieces.push_back({range.offset + at, memory.first(length)});
      memory = memory.subspan(length);
    }
  }
  ++entry->users;
  request->entry = std::move(entry);
  queue_.push_back(std::move(request));
  wake_.notify_one();
}

void FileTier::Impl::drop(uint64_t key) {
  check_owner();
  const std::lock_guard lock(mutex_);
  check_usable();
  forget(key);
}

void FileTier::Impl::forget(uint64_t key) {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return;
  const std::shared_ptr<Entry> entry = found->second;
  entries_.erase(found);
  entry->dropped = true;
  if (entry->users > 0) {
    dropped_in_use_ += round_up(entry->size, kBlock);
  } else {
    release(*entry);
  }
}

std::vector<FileTier::Impl::Range> FileTier::Impl::allocate(std::unique_lock<std::mutex>& lock, uint64_t bytes) {
  // What was dropped comes back when its last transfer is over.
  freed_.wait(lock, [&] { return bytes <= limit_ - in_use_ || dropped_in_use_ == 0; });
  check_usable();
  NG_CHECK(bytes <= limit_ - in_use_, OutOfMemory, "the file tier cannot take ", bytes, " bytes: ", in_use_, " of ",
           limit_, " are in use");
  std::vector<Range> ranges;
  in_use_ += bytes;
  const auto take = [&](std::map<uint64_t, uint64_t>::iterator from, uint64_t length) {
    const auto [offset, available] = *from;
    free_.erase(from);
    if (available > length) free_[offset + length] = available - length;
    ranges.push_back({offset, length});
    bytes -= length;
  };
  if (bytes == 0) return ranges;
  // In one range if there is one; else, rather than let the file grow, in several.
  const auto fits = std::find_if(free_.begin(), free_.end(), [&](const auto& each) { return each.second >= bytes; });
  if (fits != free_.end()) {
    take(fits, bytes);
    return ranges;
  }
  while (bytes > 0 && !free_.empty()) take(free_.begin(), std::min(bytes, free_.begin()->second));
  if (bytes > 0) ranges.push_back({std::exchange(end_, end_ + bytes), bytes});
  return ranges;
}

void FileTier::Impl::release(const Entry& entry) {
  for (Range range : entry.ranges) {
    in_use_ -= range.length;
    const auto after = free_.lower_bound(range.offset);
    if (after != free_.end() && after->first == range.offset + range.length) {
      range.length += after->second;
      free_.erase(after);
    }
    const auto next = free_.lower_bound(range.offset);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == range.offset) {
        before->second += range.length;
        continue;
      }
    }
    free_[range.offset] = range.length;
  }
}

std::optional<size_t> FileTier::Impl::size(uint64_t key) const {
  check_owner();
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(key);
  return found == entries_.end() ? std::nullopt : std::optional(found->second->size);
}

uint64_t FileTier::Impl::in_use() const {
  check_owner();
  const std::lock_guard lock(mutex_);
  return in_use_;
}

void FileTier::Impl::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void FileTier::Impl::close() {
  check_owner();
  {
    const std::lock_guard lock(mutex_);
    NG_CHECK(!stopping_, InvalidArgument, "the file tier is closed");
  }
  stop();
  if (file_) file_->close();
}

// --- the thread ---------------------------------------------------------------------------------------------

void FileTier::Impl::serve() noexcept {
  try {
    work();
  } catch (...) {
    fail_all(std::current_exception());
  }
}

void FileTier::Impl::work() {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      const bool busy = !waiting_.empty() || free_slots_.size() < slots_.size();
      if (!busy) wake_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (!busy && queue_.empty()) return;
      std::move(queue_.begin(), queue_.end(), std::back_inserter(waiting_));
      queue_.clear();
    }
    start_pieces();
    if (free_slots_.size() < slots_.size()) finish_one();
  }
}

void FileTier::Impl::start_pieces() {
  while (!waiting_.empty()) {
    const std::shared_ptr<Request> request = waiting_.front();
    const Entry& entry = *request->entry;
    if (!request->is_put && !entry.written && !entry.error) return;  // its put is under way
    if (!request->is_put && entry.error) request->error = entry.error;
    while (!request->error && request->started < request->pieces.size()) {
      if (free_slots_.empty()) return;
      start(request);
    }
    request->started = request->pieces.size();
    waiting_.pop_front();
    if (request->running == 0) complete(*request);
  }
}

// What a piece needs; false, and the request failed, if it is not to be had.
bool FileTier::Impl::prepare(Request& request, bool needs_staging) {
  try {
    if (request.is_put && request.started == 0) reserve(*request.entry);
    if (needs_staging && staging_.size() == 0) {
      staging_ = Buffer(slots_.size() * kPiece);
      file_->register_memory({staging_.data(), staging_.size()});
    }
    return true;
  } catch (...) {
    request.error = std::current_exception();
    return false;
  }
}

void FileTier::Impl::start(const std::shared_ptr<Request>& request) {
  const Piece piece = request->pieces[request->started];
  const size_t alignment = file_->alignment();
  const bool in_place = (reinterpret_cast<uintptr_t>(piece.memory.data()) | piece.memory.size()) % alignment == 0;
  if (!prepare(*request, !in_place)) return;
  const size_t tag = free_slots_.back();
  std::byte* staging = in_place ? nullptr : staging_.data() + tag * kPiece;
  std::span<std::byte> memory = piece.memory;
  if (!in_place) {
    memory = {staging, round_up(piece.memory.size(), alignment)};
    if (request->is_put) {
      std::memcpy(staging, piece.memory.data(), piece.memory.size());
      std::memset(staging + piece.memory.size(), 0, memory.size() - piece.memory.size());
    }
  }
  if (request->is_put) {
    file_->write(memory, piece.offset, tag);
  } else {
    file_->read(memory, piece.offset, tag);
  }
  free_slots_.pop_back();
  slots_[tag] = {request, piece, staging};
  ++request->started;
  ++request->running;
}

// Disk space for the whole of a buffer, before its first byte is written.
void FileTier::Impl::reserve(const Entry& entry) {
  uint64_t end = 0;
  for (const Range& range : entry.ranges) end = std::max(end, range.offset + range.length);
  if (end <= reserved_) return;
  const uint64_t generous = std::min(limit_, std::max(end, reserved_ + kGrowth));
  try {
    file_->preallocate(generous);
    reserved_ = generous;
  } catch (const SystemError&) {
    if (generous == end) throw;
    file_->preallocate(end);
    reserved_ = end;
  }
}

void FileTier::Impl::finish_one() {
  Completion over = file_->wait_any();
  const Slot slot = std::exchange(slots_[over.tag], {});
  free_slots_.push_back(over.tag);
  Request& request = *slot.request;
  if (over.error) {
    if (!request.error) request.error = std::move(over.error);
  } else if (!request.is_put && slot.staging != nullptr) {
    std::memcpy(slot.piece.memory.data(), slot.staging, slot.piece.memory.size());
  }
  if (--request.running == 0 && request.started == request.pieces.size()) complete(request);
}

void FileTier::Impl::complete(Request& request) {
  std::exception_ptr error = std::move(request.error);
  {
    const std::lock_guard lock(mutex_);
    Entry& entry = *request.entry;
    if (request.is_put) {
      entry.written = !error;
      entry.error = error;
    }
    if (--entry.users == 0 && entry.dropped) {
      dropped_in_use_ -= round_up(entry.size, kBlock);
      release(entry);
    }
  }
  freed_.notify_all();
  request.done(std::move(error));
}

void FileTier::Impl::fail_all(const std::exception_ptr& error) {
  file_.reset();  // waits for what is in flight, before its memory goes
  {
    const std::lock_guard lock(mutex_);
    broken_ = error;
    std::move(queue_.begin(), queue_.end(), std::back_inserter(waiting_));
    queue_.clear();
  }
  for (Slot& slot : slots_) {
    if (slot.request && --slot.request->running == 0 && slot.request->started == slot.request->pieces.size()) {
      slot.request->error = error;
      complete(*slot.request);
    }
    slot = {};
  }
  for (const std::shared_ptr<Request>& request : waiting_) {
    request->error = error;
    complete(*request);
  }
  waiting_.clear();
}

// --- the public face ----------------------------------------------------------------------------------------

namespace {

std::unique_ptr<DirectFile> open_scratch(const std::string& path, const DirectFileOptions& options) {
  auto file = open_direct(path, OpenMode::create, options);
  unlink(path.c_str());
  return file;
}

// A future, and what makes it ready.
std::pair<std::future<void>, std::function<void(std::exception_ptr)>> make_future() {
  auto promise = std::make_shared<std::promise<void>>();
  std::future<void> future = promise->get_future();
  return {std::move(future), [promise = std::move(promise)](std::exception_ptr error) {
            if (error) {
              promise->set_exception(std::move(error));
            } else {
              promise->set_value();
            }
          }};
}

}  // namespace

FileTier::FileTier(const std::string& path, uint64_t limit, const DirectFileOptions& options)
    : FileTier(open_scratch(path, options), limit) {}

FileTier::FileTier(std::unique_ptr<DirectFile> file, uint64_t limit)
    : impl_(std::make_unique<Impl>(std::move(file), limit)) {}

FileTier::~FileTier() {
  // In a child the thread and the locks are the parent's.
  if (!impl_->is_owner()) {
    [[maybe_unused]] const Impl* abandoned = impl_.release();
  }
}

std::future<void> FileTier::put_async(uint64_t key, std::span<const std::byte> bytes) {
  auto [future, done] = make_future();
  impl_->put(key, bytes, std::move(done));
  return std::move(future);
}

std::future<void> FileTier::get_async(uint64_t key, std::span<std::byte> out) {
  auto [future, done] = make_future();
  impl_->get(key, out, std::move(done));
  return std::move(future);
}

void FileTier::drop(uint64_t key) { impl_->drop(key); }
std::optional<size_t> FileTier::size(uint64_t key) const { return impl_->size(key); }
uint64_t FileTier::in_use() const { return impl_->in_use(); }
void FileTier::close() { impl_->close(); }

}  // namespace ng
