// Stream capture, and graphs.
#include <atomic>

#include "kernels.hpp"
#include "simulated_gpu.hpp"

namespace ng::cuda {
namespace {

TEST_F(SimulatedGpu, CapturesAndReplays) {
  start();
  const Function kernel = function(kAxpy, "axpy");
  const DevicePtr x = allocate(), y = allocate();
  float* const host = pinned<float>(100);
  std::atomic<int> calls{0};
  const StreamHandle main = stream(), side = stream();
  const EventHandle fork = event(), join = event();
  CaptureStatus status{};
  NG_OK(cuda->cuStreamBeginCapture_v2(main, CaptureMode::thread_local_));
  NG_OK(cuda->cuStreamIsCapturing(main, &status));
  EXPECT_EQ(status, CaptureStatus::active);
  NG_OK(cuda->cuMemcpyHtoDAsync_v2(x, host, 400, main));
  NG_OK(cuda->cuEventRecord(fork, main));
  NG_OK(cuda->cuStreamWaitEvent(side, fork, 0));
  NG_OK(cuda->cuMemsetD8Async(y, 0, 400, side));
  NG_OK(cuda->cuLaunchHostFunc(side, [](void* argument) { ++*static_cast<std::atomic<int>*>(argument); }, &calls));
  NG_OK(cuda->cuEventRecord(join, side));
  NG_OK(cuda->cuStreamWaitEvent(main, join, 0));
  NG_OK(axpy(kernel, 3.f, x, y, 100, main));
  NG_OK(cuda->cuMemcpyDtoHAsync_v2(host, y, 400, main));
  Graph graph = nullptr;
  NG_OK(cuda->cuStreamEndCapture(main, &graph));
  NG_OK(cuda->cuStreamIsCapturing(side, &status));
  EXPECT_EQ(status, CaptureStatus::none);
  GraphExec executable = nullptr;
  NG_OK(cuda->cuGraphInstantiateWithFlags(&executable, graph, 0));
  NG_OK(cuda->cuGraphDestroy(graph));
  EXPECT_EQ(calls.load(), 0) << "capturing runs nothing";
  for (int i = 0; i < 100; ++i) host[i] = static_cast<float>(i);
  NG_OK(cuda->cuGraphLaunch(executable, main));
  NG_OK(cuda->cuGraphLaunch(executable, side));
  NG_OK(cuda->cuGraphExecDestroy(executable));
  NG_OK(cuda->cuCtxSynchronize());
  for (int i = 0; i < 100; ++i) ASSERT_EQ(host[i], 9.f * static_cast<float>(i)) << i;
  EXPECT_EQ(calls.load(), 2);
}

TEST_F(SimulatedGpu, CaptureForbids) {
  start();
  const StreamHandle main = stream(0), side = stream();
  const EventHandle outside = event(), inside = event();
  const DevicePtr device = allocate();
  NG_OK(cuda->cuEventRecord(outside, side));
  Graph graph = nullptr;
  const auto begin = [&] { EXPECT_EQ(cuda->cuStreamBeginCapture_v2(main, CaptureMode::global), kOk); };
  const auto invalidated = [&] {
    EXPECT_EQ(cuda->cuMemsetD8Async(device, 0, 1, main), Result::stream_capture_invalidated);
    EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), Result::stream_capture_invalidated);
    EXPECT_EQ(graph, nullptr);
  };

  EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), static_cast<Result>(401));
  EXPECT_EQ(cuda->cuStreamBeginCapture_v2(nullptr, CaptureMode::global), Result::stream_capture_unsupported);
  begin();
  EXPECT_EQ(cuda->cuStreamBeginCapture_v2(main, CaptureMode::global), static_cast<Result>(401));
  EXPECT_EQ(cuda->cuStreamSynchronize(main), Result::stream_capture_unsupported);
  invalidated();
  begin();
  EXPECT_EQ(cuda->cuCtxSynchronize(), Result::stream_capture_unsupported);
  invalidated();
  begin();
  void* pointer = nullptr;
  EXPECT_EQ(cuda->cuMemHostAlloc(&pointer, 16, 0), Result::stream_capture_unsupported);
  invalidated();
  begin();
  EXPECT_EQ(cuda->cuMemsetD8Async(device, 0, 1, nullptr), static_cast<Result>(906));
  invalidated();
  begin();
  EXPECT_EQ(cuda->cuStreamWaitEvent(main, outside, 0), Result::stream_capture_isolation);
  invalidated();
  begin();
  NG_OK(cuda->cuEventRecord(inside, main));
  EXPECT_EQ(cuda->cuEventSynchronize(inside), Result::captured_event);
  invalidated();
  begin();
  int pageable = 0;
  EXPECT_EQ(cuda->cuMemcpyHtoDAsync_v2(device, &pageable, 4, main), Result::stream_capture_unsupported);
  invalidated();
  begin();
  NG_OK(cuda->cuEventRecord(inside, main));
  NG_OK(cuda->cuStreamWaitEvent(side, inside, 0));
  NG_OK(cuda->cuMemsetD8Async(device, 0, 1, side));
  EXPECT_EQ(cuda->cuStreamEndCapture(side, &graph), Result::stream_capture_unmatched);
  EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), Result::stream_capture_unjoined);
  NG_OK(cuda->cuMemsetD8Async(device, 0, 1, side));
  NG_OK(cuda->cuCtxSynchronize());
}

TEST_F(SimulatedGpu, AdversarialReplayShowsAMissingEdge) {
  start({{"SIMGPU_DELAY", "adversarial"}});
  const DevicePtr device = allocate();
  NG_OK(cuda->cuMemsetD8Async(device, 0, 1, nullptr));
  unsigned char* const host = pinned<unsigned char>(1);
  for (const bool edge : {false, true}) {
    const StreamHandle main = stream(), side = stream();
    const EventHandle fork = event(), join = event(), written = event();
    Graph graph = nullptr;
    GraphExec executable = nullptr;
    NG_OK(cuda->cuStreamSynchronize(nullptr));
    NG_OK(cuda->cuStreamBeginCapture_v2(main, CaptureMode::relaxed));
    NG_OK(cuda->cuEventRecord(fork, main));
    NG_OK(cuda->cuStreamWaitEvent(side, fork, 0));
    NG_OK(cuda->cuMemsetD8Async(device, 5, 1, main));
    NG_OK(cuda->cuEventRecord(written, main));
    if (edge) {
      NG_OK(cuda->cuStreamWaitEvent(side, written, 0));
    }
    NG_OK(cuda->cuMemcpyDtoHAsync_v2(host, device, 1, side));
    NG_OK(cuda->cuEventRecord(join, side));
    NG_OK(cuda->cuStreamWaitEvent(main, join, 0));
    NG_OK(cuda->cuStreamEndCapture(main, &graph));
    NG_OK(cuda->cuGraphInstantiateWithFlags(&executable, graph, 0));
    NG_OK(cuda->cuGraphLaunch(executable, main));
    NG_OK(cuda->cuStreamSynchronize(main));
    EXPECT_EQ(host[0], edge ? 5 : 0);
  }
}

TEST_F(SimulatedGpu, AThreadMayBeExemptFromOthersCaptures) {
  start();
  const StreamHandle main = stream(0), side = stream();
  const EventHandle outside = event();
  NG_OK(cuda->cuEventRecord(outside, side));
  NG_OK(cuda->cuStreamBeginCapture_v2(main, CaptureMode::global));
  auto mode = CaptureMode::relaxed;
  NG_OK(cuda->cuThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, CaptureMode::global);
  void* pointer = nullptr;
  NG_OK(cuda->cuMemHostAlloc(&pointer, 16, 0));
  NG_OK(cuda->cuMemFreeHost(pointer));
  const Result query = cuda->cuEventQuery(outside);
  EXPECT_TRUE(query == kOk || query == Result::not_ready);
  std::thread([&] {  // the mode is this thread's only
    NG_OK(cuda->cuCtxPushCurrent_v2(context));
    EXPECT_EQ(cuda->cuMemHostAlloc(&pointer, 16, 0), Result::stream_capture_unsupported);
  })
      .join();
  NG_OK(cuda->cuThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, CaptureMode::relaxed);
  Graph graph = nullptr;
  EXPECT_EQ(cuda->cuStreamEndCapture(main, &graph), Result::stream_capture_invalidated);
}

}  // namespace
}  // namespace ng::cuda
