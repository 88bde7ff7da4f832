// Order of streams: events, the legacy stream, adversarial delay.
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

TEST_F(SimulatedGpu, EventsOrderStreams) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  upload(x, std::vector<float>(1000, 1.f));
  upload(y, std::vector<float>(1000, 0.f));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  const StreamHandle streams[2] = {stream(), stream()};
  const EventHandle done = event();
  NG_OK(cuda->cuEventQuery(done));
  for (int i = 0; i < 10; ++i) {
    NG_OK(cuda->cuStreamWaitEvent(streams[i % 2], done, 0));
    NG_OK(axpy(kernel, 1.f, x, y, 1000, streams[i % 2]));
    NG_OK(cuda->cuEventRecord(done, streams[i % 2]));
  }
  NG_OK(cuda->cuEventSynchronize(done));
  NG_OK(cuda->cuEventQuery(done));
  EXPECT_EQ(download(y, 1000), std::vector<float>(1000, 10.f));
  NG_OK(cuda->cuEventDestroy_v2(done));
  EXPECT_EQ(cuda->cuEventQuery(done), Result::invalid_handle);
  for (const StreamHandle handle : streams) NG_OK(cuda->cuStreamDestroy_v2(handle));
  EXPECT_EQ(cuda->cuStreamSynchronize(streams[0]), Result::invalid_handle);
}

TEST_F(SimulatedGpu, AdversarialDelayShowsAMissingWait) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 0, 64, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  int* const host = pinned<int>(2);
  const StreamHandle writer = stream(), reader = stream();
  host[0] = 42;
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device, &host[0], 4, writer));
  const EventHandle written = event();
  NG_OK(cuda->cuEventRecord(written, writer));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[1], device, 4, reader));  // does not wait for it
  NG_OK(cuda->cuStreamSynchronize(reader));
  EXPECT_EQ(host[1], 0);
  NG_OK(cuda->cuStreamWaitEvent(reader, written, 0));
  host[0] = 43;  // pinned memory is read when the copy runs
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[1], device, 4, reader));
  NG_OK(cuda->cuStreamSynchronize(reader));
  EXPECT_EQ(host[1], 43);

  // Pageable memory has been read when the call returns.
  int pageable = 44;
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device, &pageable, 4, writer));
  pageable = 45;
  NG_OK(cuda->cuStreamSynchronize(writer));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&pageable, device, 4, reader));
  EXPECT_EQ(pageable, 44);
}

TEST_F(SimulatedGpu, AdversarialDelayEndsForQueriesAndHostFunctions) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const StreamHandle queue = stream();
  std::atomic<int> calls{0};
  const auto count = [](void* argument) { ++*static_cast<std::atomic<int>*>(argument); };
  NG_OK(cuda->cuLaunchHostFunc(queue, count, &calls));
  while (calls.load() == 0) std::this_thread::yield();
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 1, kGranule, queue));
  EXPECT_EQ(cuda->cuStreamQuery(queue), Result::not_ready);
  while (cuda->cuStreamQuery(queue) == Result::not_ready) std::this_thread::yield();
  NG_OK(cuda->cuStreamQuery(queue));
}

TEST_F(SimulatedGpu, AdversarialDelayShowsMemoryFreedTooEarly) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  int* const host = pinned<int>(1);
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(device, host, 4, nullptr));
  NG_OK(cuda->cuMemFreeHost(host));
  EXPECT_EQ(cuda->cuStreamSynchronize(nullptr), Result::illegal_address);
  EXPECT_NE(report().find("freed before its turn"), std::string::npos) << report();
}

TEST_F(SimulatedGpu, LegacyStreamOrdersBlockingStreamsOnly) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 0, 4, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  const StreamHandle blocking = stream(0), free = stream();
  unsigned char* const host = pinned<unsigned char>(3);
  NG_OK(cuda->cuMemsetD8Async(device, 1, 1, nullptr));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[0], device, 1, free));
  NG_OK(cuda->cuStreamSynchronize(free));
  EXPECT_EQ(host[0], 0);
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[1], device, 1, blocking));
  NG_OK(cuda->cuStreamSynchronize(blocking));
  EXPECT_EQ(host[1], 1);
  NG_OK(cuda->cuMemsetD8Async(device, 2, 1, blocking));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(&host[2], device, 1, nullptr));
  NG_OK(cuda->cuStreamSynchronize(nullptr));
  EXPECT_EQ(host[2], 2);
}

TEST_F(SimulatedGpu, StreamsHaveIdsOfTheirOwn) {
  start();
  std::vector<unsigned long long> ids;
  for (int i = 0; i < 20; ++i) {
    const StreamHandle made = stream();
    unsigned long long id = 0;
    NG_OK(cuda->cuStreamGetId(made, &id));
    unsigned long long again = 0;
    NG_OK(cuda->cuStreamGetId(made, &again));
    EXPECT_EQ(id, again);
    ids.push_back(id);
    NG_OK(cuda->cuStreamDestroy_v2(made));  // its handle may come again
  }
  ids.emplace_back();
  NG_OK(cuda->cuStreamGetId(nullptr, &ids.back()));
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end());
}

}  // namespace
}  // namespace ng::cuda
