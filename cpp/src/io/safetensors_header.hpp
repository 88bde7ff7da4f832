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

// Sorts by falling element size, then as given: in this order all tensors are aligned to their elements.
void sort_for_file(std::vector<FileTensor>& tensors);

// The file's first bytes for tensors in file order: the length and the JSON header, padded to a multiple of
// `alignment`. Throws InvalidArgument for what the parser would refuse.
std::string make_safetensors_header(std::span<const FileTensor> tensors,
                                    const std::map<std::string, std::string>& metadata, uint64_t alignment = 64);

// Bits of one element of safetensors' dtype `name`; 0 if the format has no such dtype.
uint64_t file_dtype_bits(std::string_view name) noexcept;

// Why dtype and shape do not describe `bytes` bytes; empty if they do.
std::string size_mismatch(const std::string& dtype, const std::vector<int64_t>& shape, uint64_t bytes);

}  // namespace ng
