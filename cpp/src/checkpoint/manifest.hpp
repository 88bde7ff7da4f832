// The manifest: its text, and the rules that every checkpoint keeps. Also the report that one writer gives of its
// shard, which is a manifest with that shard alone.
//
//   {"narrowgauge_checkpoint":1,"step":100,"chunk_bytes":1048576,
//    "files":[{"name":..,"bytes":..,"header_bytes":..,"header_crc32c":"9ae0daaf"}],
//    "tensors":[{"name":..,"dtype":"BF16","shape":[..],
//                "regions":[{"file":0,"offset":4096,"bytes":..,"box":[[0,8],[0,4]] or "flat":[0,32],"crc32c":".."}]}],
//    "state":"..","crc32c":"e3069283"}
//
// crc32c of a region: eight hexadecimal digits for each chunk. The last member is the checksum of all bytes before it.
#pragma once

#include <string>
#include <string_view>

#include "narrowgauge/checkpoint.hpp"

namespace ng {

inline constexpr const char* kManifestName = "manifest.json";
inline constexpr uint64_t kMaxManifestBytes = uint64_t{1} << 31;

std::string manifest_text(const Manifest& manifest);

// The text with its last member: the checksum of what is before it. pre: `body` is a JSON object without its '}'.
std::string seal_manifest(std::string body);

// Parses and checks the grammar and the text's own checksum. Throws CheckpointCorrupt that names `source`.
Manifest parse_manifest(std::string_view text, const std::string& source);

// Checks the rules: names of files stay inside the directory; every byte of a file is header or one region's; the
// regions of a tensor are disjoint and together the whole; checksums for every chunk. Throws CheckpointCorrupt that
// names `source`.
void check_manifest(const Manifest& manifest, const std::string& source);

// Adds another writer's files and regions. Throws CheckpointError if both describe a tensor differently.
void merge_manifest(Manifest& manifest, Manifest&& part);

// Chunks of a region of `bytes` bytes.
inline uint64_t chunk_count(uint64_t bytes, uint64_t chunk_bytes) { return (bytes + chunk_bytes - 1) / chunk_bytes; }

}  // namespace ng
