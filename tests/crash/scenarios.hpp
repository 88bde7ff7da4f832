// Saves on a file system in memory, with every operation failed, torn, dropped or the last before a crash, and the one
// invariant that all of them must keep:
//
//   every name without `.tmp-` loads bit for bit, what was reported as committed is there, and damage is an error.
//
// A disk that says it has written what it has not can lose a checkpoint that it was told to keep; then the error must
// be CheckpointCorrupt, and the checkpoint before must load.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../cpp/checkpoint/states.hpp"
#include "../cpp/io/fault_file_system.hpp"
#include "narrowgauge/checkpoint.hpp"

namespace ng::crash {

inline constexpr const char* kDirectory = "/run";  // in a file system that has nothing else

struct Tally {
  uint64_t faults = 0;
  std::vector<std::string> violations;
};

// What a scenario does after step 1 was committed, and what may be there then.
struct Scenario {
  const char* name;
  int64_t step;    // that it saves, from seed 2
  bool overwrite;  // of step 1
  int64_t keep;    // 0: all
  bool large;      // a state of more than one write and one chunk
};

inline constexpr Scenario kScenarios[] = {
    {"a second step", 2, false, 0, false},
    {"a second step of several writes", 2, false, 0, true},
    {"the same step again", 1, true, 0, false},
    {"a second step, keeping one", 2, false, 1, false},
};

inline const std::vector<StateTensor>& state_of(uint64_t seed, bool large) {
  static std::map<std::pair<uint64_t, bool>, std::vector<StateTensor>> states;
  auto& state = states[{seed, large}];
  if (state.empty()) state = make_state(seed, large ? size_t{160} << 10 : size_t{8192});
  return state;
}

// One run of a scenario on a fresh file system.
class Run {
 public:
  explicit Run(const Scenario& scenario) : scenario_(scenario), files_(std::make_shared<FaultFileSystem>()) {
    save(1, 1, false, 0);
    files_->settle();
    before_ = files_->operations();
  }

  FaultFileSystem& files() { return *files_; }
  size_t before() const { return before_; }

  // Saves; returns whether the commit was reported.
  bool go() {
    try {
      save(scenario_.step, 2, scenario_.overwrite, scenario_.keep);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  // The operations after which the commit is durable: the sync of the root that follows the rename or exchange.
  size_t commit_at() const {
    bool renamed = false;
    for (size_t i = before_; i < files_->operations(); ++i) {
      const std::string what = files_->describe(i);
      const bool into_place = what.starts_with("exchange") || what.starts_with("rename");
      if (renamed && what.starts_with("sync_directory")) return i + 1;
      renamed |= into_place;
    }
    return files_->operations() + 1;
  }

 private:
  void save(int64_t step, uint64_t seed, bool overwrite, int64_t keep) {
    Checkpointer checkpointer(kDirectory, {.keep = keep, .file_system = files_});
    const auto& state = state_of(seed, scenario_.large);
    checkpointer.save(step, parts_of(state), {.overwrite = overwrite});
    checkpointer.close();
  }

  Scenario scenario_;
  std::shared_ptr<FaultFileSystem> files_;
  size_t before_ = 0;
};

enum class Loaded : uint8_t { absent, first, second, damaged, wrong };

// What a step holds: the state of seed 1 or 2, an error, or neither.
inline Loaded load(const std::filesystem::path& directory, int64_t step, bool large) {
  const std::filesystem::path path = directory / checkpoint_name(step);
  if (!std::filesystem::exists(path)) return Loaded::absent;
  try {
    const Checkpoint checkpoint(path.string());
    checkpoint.verify();
    for (const uint64_t seed : {1, 2}) {
      const auto& expected = state_of(seed, large);
      if (same(load_like(checkpoint, expected), expected)) return seed == 1 ? Loaded::first : Loaded::second;
    }
    return Loaded::wrong;
  } catch (const CheckpointCorrupt&) {
    return Loaded::damaged;
  }
}

// Checks one state of the disk. `committed`: the save was reported, or its commit had reached the disk. `honest`: the
// disk kept what it said it had written.
inline std::string judge(const Scenario& scenario, const std::filesystem::path& directory, bool committed,
                         bool honest) {
  const Loaded one = load(directory, 1, scenario.large);
  const Loaded two = scenario.step == 1 ? Loaded::absent : load(directory, scenario.step, scenario.large);
  if (one == Loaded::wrong || two == Loaded::wrong) return "wrong data loads without an error";
  const Loaded newest = scenario.step == 1 ? one : two;
  if (honest) {
    if (one == Loaded::damaged || two == Loaded::damaged) return "a committed name is damaged";
    if (committed && newest != Loaded::second) return "the committed step is lost";
    if (!committed && newest == Loaded::absent && one != Loaded::first) return "the step before is lost";
    if (scenario.keep == 0 && one == Loaded::absent) return "the step before is lost";
    if (one == Loaded::absent && two != Loaded::second) return "the step before went before the new one was there";
    return {};
  }
  // The one before was settled: nothing that happens to the new one may touch it, unless it was asked to go.
  if (scenario.step != 1 && scenario.keep == 0 && one != Loaded::first) return "the step before is lost";
  return {};
}

// A new Checkpointer cleans up and goes on, whatever it finds.
inline std::string resume(const Scenario& scenario, const std::filesystem::path& directory) {
  const auto& state = state_of(3, scenario.large);
  {
    Checkpointer checkpointer(directory.string());
    checkpointer.save(3, parts_of(state));
    checkpointer.close();
  }
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().string().find(".tmp-") != std::string::npos) return "a leftover stays: " + entry.path().string();
  }
  const Checkpoint checkpoint((directory / checkpoint_name(3)).string());
  return same(load_like(checkpoint, state), state) ? "" : "the next save does not load";
}

// Runs all faults of a scenario in `root`, which is emptied for each. `limit` bounds the crash states of a run.
inline void run(const Scenario& scenario, const std::filesystem::path& root, size_t limit, uint64_t seed,
                Tally& tally) {
  const std::filesystem::path directory = root.string() + kDirectory;
  const auto check = [&](const CrashState& state, bool committed, bool honest, const std::string& what) {
    ++tally.faults;
    std::string problem;
    try {
      state.write_to(root);
      problem = judge(scenario, directory, committed, honest);
      if (problem.empty() && tally.faults % 16 == 0) problem = resume(scenario, directory);
    } catch (const std::exception& error) {
      problem = error.what();
    }
    if (!problem.empty()) {
      tally.violations.push_back(std::string(scenario.name) + ": " + problem + "; " + what + "; " + state.describe());
    }
  };
  // Crashes of a save without faults.
  Run plain(scenario);
  const bool reported = plain.go();
  if (!reported) tally.violations.push_back(std::string(scenario.name) + ": a save without faults fails");
  const size_t commit_at = plain.commit_at();
  for (const CrashState& state : plain.files().crash_states(limit, seed)) {
    check(state, state.operations() >= commit_at, true, "crash");
  }
  const size_t operations = plain.files().operations();

  // Every operation failed, torn and dropped; each also followed by a crash.
  struct Fault {
    const char* name;
    bool honest;
    std::function<void(FaultFileSystem&, size_t)> inject;
  };
  const Fault faults[] = {
      {"EIO", true, [](FaultFileSystem& files, size_t n) { files.fail(n, EIO); }},
      {"ENOSPC", true, [](FaultFileSystem& files, size_t n) { files.fail(n, ENOSPC); }},
      {"torn at 512", false, [](FaultFileSystem& files, size_t n) { files.tear(n, 512); }},
      {"torn at 4096", false, [](FaultFileSystem& files, size_t n) { files.tear(n, 4096); }},
      {"dropped", false, [](FaultFileSystem& files, size_t n) { files.drop(n); }},
      {"crash", true, [](FaultFileSystem& files, size_t n) { files.crash(n); }},
  };
  for (const Fault& fault : faults) {
    for (size_t n = plain.before(); n < operations; ++n) {
      const std::string operation = plain.files().describe(n);
      const bool writes = operation.starts_with("write");
      if (!fault.honest && !writes && !(operation.starts_with("sync") && std::string(fault.name) == "dropped"))
        continue;
      Run run(scenario);
      fault.inject(run.files(), n);
      const bool committed = run.go();
      const std::string what = std::string(fault.name) + " at " + operation;
      check(run.files().state(), committed, fault.honest, what);
      for (const CrashState& state : run.files().crash_states(limit / 64 + 2, seed + n)) {
        const bool durable = committed && state.operations() == run.files().operations();
        check(state, durable, fault.honest, what + ", then a crash");
      }
    }
  }
}

}  // namespace ng::crash
