// States on a GPU: what is saved is what a stream had written when save() was called, whatever it is given after.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "checkpoint/states.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/checkpoint.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/stream.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng {
namespace {

class CudaCheckpoint : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (!why_no_cuda().empty()) GTEST_SKIP() << why_no_cuda();
    pool_ = std::make_shared<DevicePool>(0);
    pinned_ = std::make_shared<PinnedPool>();
    stream_ = Stream::create(0);
  }

  // Places for a state on the GPU, every second one.
  std::vector<CheckpointPart> place(const std::vector<StateTensor>& state, bool borrowed) {
    std::vector<CheckpointPart> parts = parts_of(state);
    for (size_t i = 0; i < parts.size(); i += 2) {
      const int64_t size[] = {static_cast<int64_t>(parts[i].bytes.size())};
      memory_.push_back(Tensor::empty(pool_, size, DType::u8));
      parts[i].bytes = {static_cast<const std::byte*>(memory_.back()->data), parts[i].bytes.size()};
      parts[i].device = {0};
      parts[i].stream = stream_.handle();
      parts[i].borrowed = borrowed;
    }
    return parts;
  }

  // Gives the stream copies of a state to its places; they end some time later.
  void write(const std::vector<StateTensor>& state) {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const std::vector<std::byte>& bytes = state[2 * i].bytes;
      const int64_t size[] = {static_cast<int64_t>(bytes.size())};
      staged_.push_back(Tensor::empty(pinned_, size, DType::u8));
      if (!bytes.empty()) std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(staged_.back()->data));
      copy(memory_[i]->data, staged_.back()->data, bytes.size(), stream_);
    }
  }

  std::shared_ptr<DevicePool> pool_;
  std::shared_ptr<PinnedPool> pinned_;
  Stream stream_{0, nullptr};
  std::vector<Tensor> memory_, staged_;
};

// The largest tensor fills the staging buffers more than once.
TEST_P(CudaCheckpoint, HoldsWhatTheStreamHadWritten) {
  const bool borrowed = GetParam();
  const TemporaryDirectory directory;
  Checkpointer checkpointer(directory.path());
  const std::vector<StateTensor> sizes = make_state(0, size_t{21} << 20);
  const std::vector<CheckpointPart> parts = place(sizes, borrowed);
  for (int64_t step = 1; step <= 3; ++step) {
    // The host's tensors change too, so that all of a state is from one seed.
    const std::vector<StateTensor> state = make_state(static_cast<uint64_t>(step), size_t{21} << 20);
    std::vector<CheckpointPart> given = parts;
    for (size_t i = 1; i < given.size(); i += 2) given[i].bytes = state[i].bytes;
    write(state);
    checkpointer.save(step, given);
    if (borrowed) {
      ASSERT_TRUE(checkpointer.wait_released_for(60));
    }
    write(make_state(99, size_t{21} << 20));
    checkpointer.wait();
    const Checkpoint checkpoint(directory / checkpoint_name(step));
    checkpoint.verify();
    const std::vector<StateTensor> loaded = load_like(checkpoint, state);
    for (size_t i = 0; i < state.size(); ++i) EXPECT_EQ(loaded[i].bytes == state[i].bytes, true) << state[i].name;
  }
  checkpointer.close();
  stream_.synchronize();
}

TEST_P(CudaCheckpoint, ClosesWithoutWaitingForTheStreamsOwner) {
  const TemporaryDirectory directory;
  const std::vector<StateTensor> state = make_state(5);
  const std::vector<CheckpointPart> parts = place(state, GetParam());
  write(state);
  {
    Checkpointer checkpointer(directory.path());
    checkpointer.save(1, parts);
  }
  EXPECT_EQ(load_like(Checkpoint(directory / checkpoint_name(1)), state)[0].bytes == state[0].bytes, true);
}

// Copies wait for another stream's work here; meanwhile the stream of the state may not write to it.
TEST_P(CudaCheckpoint, HoldsAStreamBackUntilItsStateIsCopied) {
  if (GetParam()) GTEST_SKIP() << "borrowed memory is the caller's to hold back";
  const TemporaryDirectory directory;
  const std::vector<StateTensor> state = make_state(1), other = make_state(2);
  std::vector<CheckpointPart> parts = place(state, false);
  write(state);
  stream_.synchronize();
  const Stream slow = Stream::create(0);
  const Tensor more = Tensor::empty(pool_, std::array<int64_t, 1>{64}, DType::u8);
  copy(more->data, staged_.front()->data, 8, slow);
  parts.push_back({"more",
                   "U8",
                   {8},
                   Region::whole(std::array<int64_t, 1>{8}),
                   {static_cast<const std::byte*>(more->data), 8},
                   false,
                   true,
                   {0},
                   slow.handle()});
  std::promise<void> opened;
  auto gate = opened.get_future();
  {
    const cuda::ContextScope context(0);
    const auto wait = [](void* future) { static_cast<std::future<void>*>(future)->wait(); };
    ASSERT_EQ(context->cuLaunchHostFunc(cuda::handle_of(slow), wait, &gate), cuda::Result::success);
  }
  Checkpointer checkpointer(directory.path());
  checkpointer.save(1, parts);
  write(other);
  // Without an order the writes would be done by now.
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  opened.set_value();
  checkpointer.wait();
  const std::vector<StateTensor> loaded = load_like(Checkpoint(directory / checkpoint_name(1)), state);
  for (size_t i = 0; i < state.size(); ++i) EXPECT_EQ(loaded[i].bytes == state[i].bytes, true) << state[i].name;
  stream_.synchronize();
}

INSTANTIATE_TEST_SUITE_P(SnapshotAndDeferred, CudaCheckpoint, ::testing::Values(false, true));

}  // namespace
}  // namespace ng
