// The io_uring engine: one ring for each file, with the file and the memory that is often used registered.
//
// The ring has no flags. IORING_SETUP_SINGLE_ISSUER and DEFER_TASKRUN would bind a file to the thread that first used
// it, and COOP_TASKRUN lets a thread wait a timer tick for what another, busy one started; for requests of megabytes
// none of them saves anything (0.012 CPU-s/GB with or without). What the kernel will not take at the moment (memory is
// short, a sandbox was closed meanwhile) is transferred by hand, so that every transfer comes to an end.
//
// Built without liburing, this file only says so.
#include "io/direct_file.hpp"

#ifdef NARROWGAUGE_LIBURING
#include <liburing.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

// Registered memory: at most so many pieces, none larger than the kernel allows.
constexpr unsigned kMaxRegions = 64;
constexpr size_t kMaxRegion = size_t{1} << 30;

class Ring {
 public:
  // Leaves the reason in `why` and the ring unusable if there is one.
  Ring(int entries, std::string& why) {
    io_uring_params params{};
    const int result = io_uring_queue_init_params(static_cast<unsigned>(entries), &ring_, &params);
    usable_ = result == 0;
    if (result < 0) {
      why = concat("the kernel refuses it: ", std::generic_category().message(-result));
    } else if ((params.features & IORING_FEAT_RW_CUR_POS) == 0) {
      why = "the kernel is older than Linux 5.6";
    }
  }
  ~Ring() {
    if (usable_) io_uring_queue_exit(&ring_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  io_uring* get() noexcept { return &ring_; }

 private:
  io_uring ring_{};
  bool usable_ = false;
};

class UringFile final : public EngineFile {
 public:
  UringFile(std::unique_ptr<Ring> ring, OpenedFile&& file, int queue_depth, Interference&& interference)
      : EngineFile("io_uring", std::move(file), queue_depth, std::move(interference)), ring_(std::move(ring)) {
    const int fd = descriptor();
    file_registered_ = io_uring_register_files(ring_->get(), &fd, 1) == 0;
  }

  ~UringFile() override {
    // A child of the process shares the ring and must not touch it.
    if (!is_owner()) {
      ::close(ring_.release()->get()->ring_fd);
      return;
    }
    drain();
    release();
  }

  void register_memory(std::span<std::byte> memory) override {
    EngineFile::register_memory(memory);
    if (!is_direct()) return;  // the copy through the page cache costs more
    while (!memory.empty()) {
      const std::span<std::byte> region = memory.first(std::min(memory.size(), kMaxRegion));
      memory = memory.subspan(region.size());
      if (const int error = register_region(region); error != 0) register_error_ = error;
    }
  }

  std::string engine() const override {
    if (register_error_ == 0) return EngineFile::engine();
    return concat(EngineFile::engine(), ", memory not registered: ", std::generic_category().message(register_error_));
  }

 private:
  void start(Transfer& transfer) override { request(transfer); }

  Transfer& reap() override {
    while (true) {
      if (!by_hand_.empty()) {
        Transfer& transfer = *by_hand_.front();
        by_hand_.pop_front();
        return transfer;
      }
      io_uring_cqe* completion = nullptr;
      if (io_uring_wait_cqe(ring_->get(), &completion) != 0) {
        // Interrupted; or it may not ask any more, and the kernel completes what it has all the same.
        constexpr useconds_t kPause = 100;
        usleep(kPause);
        continue;
      }
      auto* transfer = static_cast<Transfer*>(io_uring_cqe_get_data(completion));
      const int answer = completion->res;
      io_uring_cqe_seen(ring_->get(), completion);
      if (transfer == nullptr) continue;  // a request that was taken back
      if (advance(*transfer, answer)) return *transfer;
      request(*transfer);
    }
  }

  void release() noexcept override {
    io_uring_unregister_files(ring_->get());
    if (!regions_.empty()) io_uring_unregister_buffers(ring_->get());
    regions_.clear();
  }

  void request(Transfer& transfer) {
    io_uring_sqe* request = io_uring_get_sqe(ring_->get());
    if (request != nullptr) {
      prepare(*request, transfer);
      const int submitted = retry_submit();
      if (submitted >= 0 && io_uring_sq_ready(ring_->get()) == 0) return;
      io_uring_prep_nop(request);
      io_uring_sqe_set_data(request, nullptr);
    }
    transfer_now(transfer);
    by_hand_.push_back(&transfer);
  }

  int retry_submit() {
    int result = io_uring_submit(ring_->get());
    while (result == -EINTR) result = io_uring_submit(ring_->get());
    return result;
  }

  void prepare(io_uring_sqe& request, Transfer& transfer) const {
    std::byte* data = transfer.data + transfer.done;
    const uint64_t offset = transfer.offset + transfer.done;
    const size_t length = next_request(transfer);
    const auto bytes = static_cast<unsigned>(length);
    const int fd = file_registered_ ? 0 : descriptor();
    const int region = region_of(data, length);
    if (transfer.is_write) {
      if (region >= 0) {
        io_uring_prep_write_fixed(&request, fd, data, bytes, offset, region);
      } else {
        io_uring_prep_write(&request, fd, data, bytes, offset);
      }
    } else if (region >= 0) {
      io_uring_prep_read_fixed(&request, fd, data, bytes, offset, region);
    } else {
      io_uring_prep_read(&request, fd, data, bytes, offset);
    }
    if (file_registered_) io_uring_sqe_set_flags(&request, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data(&request, &transfer);
  }

  int region_of(const std::byte* data, size_t length) const noexcept {
    for (size_t i = 0; i < regions_.size(); ++i) {
      const std::span<std::byte> region = regions_[i];
      if (data >= region.data() && data + length <= region.data() + region.size()) return static_cast<int>(i);
    }
    return -1;
  }

  // Returns 0 or errno.
  int register_region(std::span<std::byte> memory) {
    if (regions_.empty()) {
      // A table with free places, since memory comes in pieces.
      if (const int result = io_uring_register_buffers_sparse(ring_->get(), kMaxRegions); result != 0) return -result;
    }
    if (regions_.size() == kMaxRegions) return ENOSPC;
    const iovec vector{memory.data(), memory.size()};
    const __u64 tag = 0;
    const int result =
        io_uring_register_buffers_update_tag(ring_->get(), static_cast<unsigned>(regions_.size()), &vector, &tag, 1);
    if (result < 0) return -result;
    regions_.push_back(memory);
    return 0;
  }

  std::unique_ptr<Ring> ring_;
  bool file_registered_ = false;
  std::vector<std::span<std::byte>> regions_;  // as numbered in the kernel's table
  int register_error_ = 0;
  std::deque<Transfer*> by_hand_;  // over, without the ring
};

}  // namespace

std::unique_ptr<DirectFile> open_uring(OpenedFile& file, int queue_depth, Interference& interference,
                                       std::string& why) {
  auto ring = std::make_unique<Ring>(queue_depth, why);
  if (!why.empty()) return nullptr;
  return std::make_unique<UringFile>(std::move(ring), std::move(file), queue_depth, std::move(interference));
}

std::string probe_uring() {
  std::string why;
  const Ring ring(1, why);
  return why;
}

}  // namespace ng

#else

namespace ng {

std::unique_ptr<DirectFile> open_uring(OpenedFile& /*file*/, int /*queue_depth*/, Interference& /*interference*/,
                                       std::string& why) {
  why = probe_uring();
  return nullptr;
}

std::string probe_uring() { return "narrowgauge was built without liburing"; }

}  // namespace ng

#endif
