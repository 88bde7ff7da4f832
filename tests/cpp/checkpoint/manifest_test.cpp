// The manifest: its text round trips, hostile ones are refused with the reason, and mutations keep the promises.
#include "checkpoint/manifest.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "../../fuzz/mutate.hpp"
#include "../../fuzz/targets.hpp"

namespace ng {
namespace {

Region box(std::vector<std::array<int64_t, 2>> bounds) {
  Region out;
  out.bounds = std::move(bounds);
  return out;
}

// Two files; a tensor in two boxes, one in runs, a scalar and an empty one.
Manifest sound() {
  Manifest manifest{.step = 7, .chunk_bytes = 4096, .files = {}, .tensors = {}, .state = "[\"\\u00e9\"]"};
  manifest.files.push_back({"a.safetensors", 8192 + 32 + 64, 8192, 1});
  manifest.files.push_back({"b.safetensors", 4096 + 32 + 12288 + 8, 4096, 2});
  const auto tensor = [&](const char* name, const char* dtype, std::vector<int64_t> shape) {
    manifest.tensors.push_back({name, dtype, std::move(shape), {}});
  };
  const auto region = [&](Region bounds, uint32_t file, uint64_t offset, uint64_t bytes, std::vector<uint32_t> sums) {
    manifest.tensors.back().regions.push_back({std::move(bounds), file, offset, bytes, std::move(sums)});
  };
  tensor("boxes", "F32", {4, 4});
  region(box({{0, 2}, {0, 4}}), 0, 8192, 32, {3});
  region(box({{2, 4}, {0, 4}}), 1, 4096, 32, {4});
  tensor("runs", "BF16", {6176});
  region(Region::run(0, 32), 0, 8224, 64, {5});
  region(Region::run(32, 32), 0, 8192, 0, {});
  region(Region::run(32, 6176), 1, 4128, 12288, {6, 7, 8});
  tensor("scalar", "I64", {});
  region(box({}), 1, 16416, 8, {9});
  tensor("empty", "U8", {0, 3});
  region(box({{0, 0}, {0, 3}}), 1, 4096, 0, {});
  return manifest;
}

std::string refusal(const Manifest& manifest) {
  try {
    const Manifest read = parse_manifest(manifest_text(manifest), "m");
    check_manifest(read, "m");
  } catch (const CheckpointCorrupt& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ManifestTest, RoundTrips) {
  const Manifest manifest = sound();
  EXPECT_EQ(refusal(manifest), "accepted");
  const Manifest read = parse_manifest(manifest_text(manifest), "m");
  EXPECT_EQ(manifest_text(read), manifest_text(manifest));
  EXPECT_EQ(read.state, manifest.state);
  EXPECT_EQ(read.tensors[1].regions[2].checksums, (std::vector<uint32_t>{6, 7, 8}));
}

TEST(ManifestTest, HostileOnesAreRefused) {
  const std::vector<std::pair<std::function<void(Manifest&)>, const char*>> cases = {
      {[](Manifest& m) { m.files[0].name = "../a"; }, "no name"},
      {[](Manifest& m) { m.files[0].name = "/etc/passwd"; }, "no name"},
      {[](Manifest& m) { m.files[0].name = ".."; }, "no name"},
      {[](Manifest& m) { m.files[0].name = ""; }, "no name"},
      {[](Manifest& m) { m.files[0].name = "manifest.json"; }, "no name"},
      {[](Manifest& m) { m.files[0].name = std::string("a\0b", 3); }, "no name"},
      {[](Manifest& m) { m.files[1].name = m.files[0].name; }, "two files"},
      {[](Manifest& m) { m.files[0].bytes = uint64_t{1} << 62; }, "end at byte"},
      {[](Manifest& m) { m.files[0].header_bytes = 8193; }, "whose data is at"},
      {[](Manifest& m) { m.files.pop_back(); }, "is in file 1"},
      {[](Manifest& m) { m.chunk_bytes = 0; }, "chunk_bytes"},
      {[](Manifest& m) { m.chunk_bytes = 8192; }, "checksums"},
      {[](Manifest& m) { m.tensors[1].name = "boxes"; }, "two tensors"},
      {[](Manifest& m) { m.tensors[0].dtype = "F4"; }, "dtype"},
      {[](Manifest& m) { m.tensors[0].dtype = "F64"; }, "bytes"},
      {[](Manifest& m) { m.tensors[0].shape = {5, 4}; }, "elements"},
      {[](Manifest& m) { m.tensors[0].shape = {INT64_MAX, INT64_MAX}; }, "overflows"},
      {[](Manifest& m) { m.tensors[3].shape = {0, INT64_MAX, INT64_MAX}; }, "overflows"},
      {[](Manifest& m) { m.tensors[0].regions[1].region.bounds[0] = {1, 3}; }, "overlap"},
      {[](Manifest& m) { m.tensors[0].regions[1].region.bounds[0] = {2, 5}; }, "bounds"},
      {[](Manifest& m) { m.tensors[0].regions[1].region.bounds[0] = {4, 2}; }, "bounds"},
      {[](Manifest& m) { m.tensors[0].regions.pop_back(); }, "elements"},
      {[](Manifest& m) { m.tensors[0].regions.clear(); }, "no regions"},
      {[](Manifest& m) { m.tensors[0].regions[0].offset = 0; }, "whose data is at"},
      {[](Manifest& m) { m.tensors[0].regions[0].offset = UINT64_MAX >> 1; }, "whose data is at"},
      {[](Manifest& m) { m.tensors[0].regions[0].bytes = INT64_MAX; }, "bytes"},
      {[](Manifest& m) { m.tensors[0].regions[0].offset += 4; }, "begins at byte"},
      {[](Manifest& m) { m.tensors[1].regions[0].offset -= 32; }, "begins at byte"},
      {[](Manifest& m) { m.tensors[1].regions[2].checksums.pop_back(); }, "checksums"},
      {[](Manifest& m) { m.tensors.pop_back(), m.tensors.pop_back(); }, "end at byte"},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    Manifest manifest = sound();
    cases[i].first(manifest);
    const std::string message = refusal(manifest);
    EXPECT_NE(message.find(cases[i].second), std::string::npos) << i << ": " << message;
  }
}

TEST(ManifestTest, DamageIsSeenByItsOwnChecksum) {
  const std::string text = manifest_text(sound());
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    std::string damaged = text;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    EXPECT_THROW(parse_manifest(damaged, "m"), CheckpointCorrupt) << bit;
  }
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_THROW(parse_manifest(std::string_view(text).substr(0, size), "m"), CheckpointCorrupt) << size;
  }
  EXPECT_THROW(parse_manifest(text + " ", "m"), CheckpointCorrupt);
}

TEST(ManifestTest, MutationsAreRefusedOrKeepThePromises) {
  constexpr std::string_view kWords[] = {
      "{",         "}",          "[",
      "]",         ",",          ":",
      "\"",        "0",          "1",
      "-1",        "4294967296", "9223372036854775807",
      "\"flat\":", "\"box\":",   "\"crc32c\":\"00000000\"",
      "../",       "null",       "[0,1]",
      "\xff",      "\\ud83d",    "\"F64\"",
  };
  std::string text = manifest_text(sound());
  text.resize(text.size() - 22);  // without the last member
  const std::vector<std::string> corpus = {text};
  ASSERT_TRUE(fuzz::manifest(text));
  std::mt19937_64 random(20260102);  // NOLINT(bugprone-random-generator-seed): the same inputs every time
  size_t read = 0;
  constexpr size_t kInputs = 40'000;
  for (size_t i = 0; i < kInputs; ++i) read += fuzz::manifest(fuzz::mutate(text, corpus, kWords, random));
  EXPECT_GT(read, kInputs / 100);
  EXPECT_LT(read, kInputs / 2);
}

}  // namespace
}  // namespace ng
