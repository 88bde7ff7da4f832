// The fuzzers' checks over fixed, seeded mutations: every build runs some tens of thousands, in seconds. The libFuzzer
// programs in tests/fuzz go on from here.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "../../fuzz/mutate.hpp"
#include "../../fuzz/targets.hpp"

namespace ng {
namespace {

using namespace std::string_literals;

// A header, a NUL byte, the data: the input of fuzz::safetensors.
const std::vector<std::string>& corpus() {
  static const std::vector<std::string> inputs = {
      "{}"s,
      R"({"__metadata__":{"format":"pt","k":"\u20ac\ud83d\ude00"}})"s,
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})"s + "\0abcd"s,
      R"({"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},)"
      R"("c":{"dtype":"F4","shape":[2,3],"data_offsets":[10,13]},"z":{"dtype":"I64","shape":[0,9],"data_offsets":[13,13]}})"s +
          "\0"s + std::string(13, 'x'),
      R"({"x.codes":{"dtype":"U8","shape":[2,3],"data_offsets":[4,10]},"x.scales":{"dtype":"F16","shape":[2,1],)"
      R"("data_offsets":[0,4]},"__metadata__":{"narrowgauge":"1"},"q":{"extra":[1,{"y":null}],"dtype":"BOOL",)"
      R"("shape":[1],"data_offsets":[10,11]}}   )"s +
          "\0"s + std::string(11, 'y'),
  };
  return inputs;
}

constexpr std::string_view kWords[] = {
    "\"U8\"",
    "\"F64\"",
    "\"F6_E2M3\"",
    "\"dtype\":",
    "\"shape\":",
    "\"data_offsets\":",
    "\"__metadata__\":{",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "0",
    "1",
    "-1",
    "9223372036854775807",
    "18446744073709551616",
    "4294967296",
    "1e9",
    "0.5",
    "\\u0061",
    "\\ud83d",
    "null",
    "true",
    " ",
    "\n",
    "\xff",
    "\xc3\xa9",
    "\xed\xa0\x80",
};

TEST(Fuzz, TheCorpusItselfIsRead) {
  for (const std::string& input : corpus()) EXPECT_TRUE(fuzz::safetensors(input)) << input;
}

TEST(Fuzz, MutatedHeadersAreRefusedOrKeepThePromises) {
  std::mt19937_64 random(20260101);  // NOLINT(bugprone-random-generator-seed): the same inputs every time
  size_t read = 0;
  constexpr size_t kInputs = 40'000;
  for (size_t i = 0; i < kInputs; ++i) {
    // Every fourth text builds on a mutation of a mutation.
    std::string text = fuzz::mutate(corpus()[random() % corpus().size()], corpus(), kWords, random);
    if (i % 4 == 0) text = fuzz::mutate(std::move(text), corpus(), kWords, random);
    read += fuzz::safetensors(text);
    fuzz::json(std::string_view(text).substr(0, text.find('\0')));
  }
  // Both outcomes must be common, or the mutations test nothing.
  EXPECT_GT(read, kInputs / 100);
  EXPECT_LT(read, kInputs / 2);
}

}  // namespace
}  // namespace ng
