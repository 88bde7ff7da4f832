// Narrow collectives in C++ over MPI, without torch: built by tests/embed, run by mpirun -n 4 collectives_mpi.
#include <cstdio>
#include <memory>
#include <narrowgauge/collective.hpp>
#include <narrowgauge/transport_mpi.hpp>
#include <vector>

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int status = 0;
  {
    ng::Communicator communicator(std::make_shared<ng::MpiTransport>(MPI_COMM_WORLD));
    const int size = communicator.size();
    std::vector<float> gradients(static_cast<size_t>(1000 * size), static_cast<float>(communicator.rank() + 1));
    std::vector<float> mine(1000);

    // Tensors below 1 MiB would travel as they are.
    const ng::CollectiveOptions options{.wire = {.format = ng::Format::parse("int8:g64:bf16")}, .exact_below = 0};
    communicator
        .reduce_scatter({gradients.data(), ng::DType::f32, {1000 * size}}, {mine.data(), ng::DType::f32, {1000}},
                        ng::Reduction::mean, options)
        .wait();

    const float error = mine[0] / (0.5f * static_cast<float>(size + 1)) - 1;
    status = error < -0.01f || error > 0.01f;
    if (communicator.rank() == 0) std::printf("%d ranks: mean %.3f\n", size, mine[0]);
  }
  MPI_Finalize();
  return status;
}
