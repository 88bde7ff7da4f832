// NcclTransport: collectives on GPUs, over NCCL, which is loaded when it is first asked for: libnccl.so.2 of 2.18 or
// later, that of torch if the process has it.
//
//   ng::Communicator communicator(ng::NcclTransport::create(id, rank, size, device));
//   communicator.all_reduce(input, out, ng::Reduction::mean, {.wire = wire, .stream = stream}).wait();
//
// What it sends and receives is memory of one GPU. NCCL works on a stream of its own, which waits for the caller's
// where a transfer starts and which the caller's waits for at Transfer::wait(): while bytes travel, the caller's stream
// goes on. Nothing here waits for the GPU.
//
// A transfer that is not complete within the timeout, and an error that NCCL finds in the background, are noticed by a
// thread that looks at what is in flight. It aborts the communicator if that is ours, so that the GPU comes to an end;
// the error, which names rank and operation, is thrown by every later call, and once by a synchronize() of a Stream of
// the device: what has been received until then is undefined.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "narrowgauge/transport.hpp"

namespace ng {

// Why NCCL cannot be used, in a sentence for users; empty if it can. Whether there is a GPU is why_no_cuda()'s matter.
std::string why_no_nccl();

// Of NCCL 2.27.3: 22703. Throws TransportError with why_no_nccl().
int nccl_version();

// What the ranks of a communicator must share; one of them makes it. It is good for one communicator.
using NcclId = std::array<std::byte, 128>;
NcclId nccl_unique_id();

class NcclTransport final : public Transport {
 public:
  // A communicator of our own, of ranks that all call this with the same id, each on a GPU of its own. Returns when all
  // have come. Throws Timeout, TransportError, InvalidArgument, CudaError.
  static std::shared_ptr<NcclTransport> create(const NcclId& id, int rank, int size, int device,
                                               std::chrono::milliseconds timeout = std::chrono::minutes(5));
  // An ncclComm_t of the caller's, on the stream in which NCCL is to work, of the communicator's GPU. Both must outlive
  // the transport and its transfers, and nobody else use the communicator while it has any. It is never aborted here:
  // a GPU that waits for a rank which does not come goes on waiting until the caller does.
  static std::shared_ptr<NcclTransport> adopt(void* communicator, const Stream& stream,
                                              std::chrono::milliseconds timeout = std::chrono::minutes(5));
  // Waits for transfers in flight, up to their timeouts.
  ~NcclTransport() override;

  int rank() const override;
  int size() const override;
  std::string name() const override { return "NCCL"; }
  Device device() const override;
  // Transports of one communicator are used by one thread at a time.
  std::shared_ptr<Transport> on(const Stream& stream) override;
  void synchronize() override;

  std::unique_ptr<Transfer> all_gather(const SharedBytes& sent, const SharedBytes& received,
                                       std::string_view operation) override;
  std::unique_ptr<Transfer> all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                       const SharedBytes& received, std::span<const int64_t> received_bytes,
                                       std::string_view operation) override;
  // A communicator of our own, also of one that was adopted.
  std::shared_ptr<Transport> split(int color) override;

  class Clique;
  NcclTransport(std::shared_ptr<Clique> clique, const Stream& stream);

 private:
  std::shared_ptr<Clique> clique_;
  Stream stream_;
};

}  // namespace ng
