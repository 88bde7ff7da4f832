// The header of a safetensors file: parsed and checked against the size of the data, or made for a list of tensors.
//
// Apart from the file, so that tests and fuzzers reach it in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "narrowgauge/io.hpp"

namespace ng {

// The format's own limit on the JSON header.
inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct SafetensorsHeader {
  std::vector<FileTensor> tensors;  // in file order; bytes inside `data`
  std::map<std::string, std::string> metadata;
};

// Checks everything that SafetensorsFile promises, without reading `data`. Throws FileCorrupt that names `path`.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::span<const std::byte> data,
                                           const std::string& path);

// Sorts the tensors into file order and returns the file's first bytes: the length and the padded JSON header.
// Throws InvalidArgument for what the parser would refuse.
std::string make_safetensors_header(std::vector<FileTensor>& tensors,
                                    const std::map<std::string, std::string>& metadata);

}  // namespace ng
