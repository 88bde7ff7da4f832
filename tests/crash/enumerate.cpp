// Enumerates what failing, torn, dropped and reordered operations and crashes can do to a save, and loads the result.
//
//   narrowgauge_crash [--limit STATES] [--seed N]     prints "faults: N, violations: M"; exits with 1 if M > 0
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "../cpp/io/temporary_directory.hpp"
#include "scenarios.hpp"

int main(int argc, char** argv) {
  size_t limit = 4000;
  uint64_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--limit") == 0) limit = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
  }
  // Contents only: a file system in memory is as good as any.
  const ng::TemporaryDirectory directory(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  ng::crash::Tally tally;
  for (const ng::crash::Scenario& scenario : ng::crash::kScenarios) {
    const uint64_t before = tally.faults;
    ng::crash::run(scenario, directory.path(), limit, seed, tally);
    std::printf("%s: %llu\n", scenario.name, static_cast<unsigned long long>(tally.faults - before));
    std::fflush(stdout);
  }
  for (size_t i = 0; i < tally.violations.size() && i < 20; ++i) {
    std::printf("violation: %s\n", tally.violations[i].c_str());
  }
  std::printf("faults: %llu, violations: %zu\n", static_cast<unsigned long long>(tally.faults),
              tally.violations.size());
  return tally.violations.empty() ? 0 : 1;
}
