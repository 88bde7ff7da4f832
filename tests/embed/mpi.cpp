// Collectives over MPI from a program of its own: mpirun -n 4 mpi.
#include <narrowgauge/transport_mpi.hpp>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <narrowgauge/collective.hpp>
#include <string>
#include <vector>

namespace {

float value(int rank, size_t i) { return std::sin(static_cast<float>(i) * 0.37f + static_cast<float>(rank)); }

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  MPI_Abort(MPI_COMM_WORLD, 1);
}

void run(int node_size) {
  ng::Communicator communicator(std::make_shared<ng::MpiTransport>(MPI_COMM_WORLD), node_size);
  const int rank = communicator.rank(), size = communicator.size();
  const ng::Wire narrow{.format = ng::Format::parse("int8:g64:bf16")};
  const ng::CollectiveOptions options{.wire = narrow, .inside = narrow, .chunk_bytes = 4096, .exact_below = 0};
  constexpr int64_t kPart = 5000;
  std::vector<float> input(static_cast<size_t>(kPart * size)), part(kPart), sum(input.size()), all(input.size());
  for (size_t i = 0; i < input.size(); ++i) input[i] = value(rank, i);
  const auto view = [](std::vector<float>& data) {
    return ng::TensorView(data.data(), ng::DType::f32, {static_cast<int64_t>(data.size())});
  };
  communicator.reduce_scatter(view(input), view(part), ng::Reduction::mean, options).wait();
  communicator.all_reduce(view(input), view(sum), ng::Reduction::sum, options).wait();
  communicator.all_gather(view(part), view(all), options).wait();
  for (size_t i = 0; i < input.size(); ++i) {
    float exact = 0;
    for (int peer = 0; peer < size; ++peer) exact += value(peer, i);
    expect(std::abs(sum[i] - exact) < 0.02f * static_cast<float>(size), "all_reduce");
    expect(std::abs(all[i] - exact / static_cast<float>(size)) < 0.02f, "reduce_scatter and all_gather");
  }
  if (rank == 0) {
    std::printf("%d ranks over %s, nodes of %d\n", size, communicator.transport().name().c_str(),
                communicator.node_size());
  }
}

// Ranks that come only when rank 0 has given them up: it does so in time, and what it has given up still completes.
void late() {
  const bool waits = ng::MpiTransport(MPI_COMM_WORLD).rank() == 0;
  ng::MpiTransport transport(MPI_COMM_WORLD, std::chrono::milliseconds(waits ? 100 : 60000));
  const auto pool = std::make_shared<ng::HostPool>();
  const ng::SharedBytes mine(pool, 1000), all(pool, mine.size() * static_cast<size_t>(transport.size()));
  int go = 0;
  if (!waits) MPI_Recv(&go, 1, MPI_INT, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  bool timed_out = false;
  try {
    transport.all_gather(mine, all, "step 7")->wait();
  } catch (const ng::Timeout& error) {
    timed_out = std::string(error.what()) == "step 7 on rank 0: not complete within 100 ms";
  }
  expect(timed_out == waits, "ranks that are late");
  for (int peer = 1; waits && peer < transport.size(); ++peer) MPI_Send(&go, 1, MPI_INT, peer, 0, MPI_COMM_WORLD);
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  run(0);
  run(2);
  late();
  MPI_Finalize();
}
