// Small states whose every byte follows from a seed, and ways to save and compare them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "narrowgauge/checkpoint.hpp"

namespace ng {

struct StateTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};

// Tensors of many sizes around a block and a chunk, some of them empty, filled from `seed`.
inline std::vector<StateTensor> make_state(uint64_t seed, size_t largest = size_t{3} << 20) {
  std::vector<StateTensor> state{
      {"scalar", "F64", {}, std::vector<std::byte>(8)},
      {"empty", "F32", {0, 5}, {}},
      {"odd", "U8", {7}, std::vector<std::byte>(7)},
      {"block", "BF16", {2048}, std::vector<std::byte>(4096)},
      {"almost", "F32", {3, 341}, std::vector<std::byte>(3 * 341 * 4)},
      {"large", "F32", {static_cast<int64_t>(largest / 16), 4}, std::vector<std::byte>(largest)},
      {"ragged \"name\" \xc3\xa9",
       "BF16",
       {static_cast<int64_t>(largest / 4 + 3)},
       std::vector<std::byte>((largest / 4 + 3) * 2)},
  };
  uint64_t word = seed * 0x9e3779b97f4a7c15u + 1;
  for (StateTensor& tensor : state) {
    for (std::byte& byte : tensor.bytes) {
      word = word * 6364136223846793005u + 1442695040888963407u;
      byte = static_cast<std::byte>(word >> 56);
    }
  }
  return state;
}

inline std::vector<CheckpointPart> parts_of(const std::vector<StateTensor>& state, bool borrowed = false) {
  std::vector<CheckpointPart> parts;
  for (const StateTensor& tensor : state) {
    parts.push_back({tensor.name, tensor.dtype, tensor.shape, Region::whole(tensor.shape), tensor.bytes, borrowed});
  }
  return parts;
}

// What the checkpoint holds, in the form of `like`.
inline std::vector<StateTensor> load_like(const Checkpoint& checkpoint, const std::vector<StateTensor>& like,
                                          Verify verify = Verify::chunks) {
  std::vector<StateTensor> out;
  std::vector<ReadRequest> requests;
  for (const StateTensor& tensor : like) {
    out.push_back({tensor.name, tensor.dtype, tensor.shape, std::vector<std::byte>(tensor.bytes.size())});
    requests.push_back({tensor.name, Region::whole(tensor.shape), out.back().bytes});
  }
  checkpoint.read(requests, verify);
  return out;
}

inline bool same(const std::vector<StateTensor>& a, const std::vector<StateTensor>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].bytes != b[i].bytes) return false;
  }
  return true;
}

}  // namespace ng
