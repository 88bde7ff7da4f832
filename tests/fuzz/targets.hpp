// What a fuzzer checks of one input, shared by the libFuzzer programs here and the fixed mutations in tests/cpp/io.
//
// An input is either refused with FileCorrupt or read; whatever is read must keep what the readers promise. A broken
// promise aborts, so that every driver notices.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/manifest.hpp"
#include "checkpoint/region.hpp"
#include "io/json.hpp"
#include "io/safetensors_header.hpp"
#include "narrowgauge/error.hpp"

#define NG_FUZZ_CHECK(condition)                                                   \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

namespace ng::fuzz {

// Returns whether the text was read.
inline bool json(std::string_view text) {
  try {
    JsonReader reader(text, "fuzz");
    reader.skip();
    reader.end();
  } catch (const FileCorrupt&) {
    return false;
  }
  NG_FUZZ_CHECK(is_utf8(text));
  return true;
}

// The input is the JSON header, a NUL byte and the data; returns whether it was read.
inline bool safetensors(std::string_view input) {
  const size_t split = std::min(input.find('\0'), input.size());
  const std::string_view text = input.substr(0, split);
  const auto data = std::as_bytes(std::span(input.substr(std::min(split + 1, input.size()))));
  SafetensorsHeader header;
  try {
    header = parse_safetensors_header(text, data, "fuzz");
  } catch (const FileCorrupt&) {
    return false;
  }
  NG_FUZZ_CHECK(json(text));

  std::set<std::string> names;
  const std::byte* next = data.data();
  for (const FileTensor& tensor : header.tensors) {
    NG_FUZZ_CHECK(names.insert(tensor.name).second);
    NG_FUZZ_CHECK(tensor.bytes.data() == next);
    next += tensor.bytes.size();
    for (const int64_t length : tensor.shape) NG_FUZZ_CHECK(length >= 0);
  }
  NG_FUZZ_CHECK(next == data.data() + data.size());

  // What was read can be written, and what is written reads back the same.
  std::vector<FileTensor> tensors = header.tensors;
  sort_for_file(tensors);
  const std::string made = make_safetensors_header(tensors, header.metadata);
  NG_FUZZ_CHECK(made.size() % 64 == 0);
  std::string packed;
  for (const FileTensor& tensor : tensors) {
    packed.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  }
  const SafetensorsHeader again =
      parse_safetensors_header(std::string_view(made).substr(8), std::as_bytes(std::span(packed)), "fuzz");
  NG_FUZZ_CHECK(again.metadata == header.metadata);
  NG_FUZZ_CHECK(again.tensors.size() == tensors.size());
  for (const FileTensor& tensor : again.tensors) {
    bool found = false;
    for (const FileTensor& other : tensors) {
      found |= tensor.name == other.name && tensor.dtype == other.dtype && tensor.shape == other.shape &&
               std::equal(tensor.bytes.begin(), tensor.bytes.end(), other.bytes.begin(), other.bytes.end());
    }
    NG_FUZZ_CHECK(found);
  }
  return true;
}

// The input is a manifest without its last member; returns whether it was read and keeps the rules.
inline bool manifest(std::string_view input) {
  const std::string text = seal_manifest(std::string(input));
  Manifest read;
  try {
    read = parse_manifest(text, "fuzz");
    check_manifest(read, "fuzz");
  } catch (const CheckpointCorrupt&) {
    return false;
  }
  // What the reader relies on, without the checker's own arithmetic: every place is inside its file.
  for (const StoredFile& file : read.files) NG_FUZZ_CHECK(file.name.find('/') == std::string::npos);
  for (const StoredTensor& tensor : read.tensors) {
    for (const StoredRegion& stored : tensor.regions) {
      const StoredFile& file = read.files.at(stored.file);
      NG_FUZZ_CHECK(stored.offset <= file.bytes && stored.bytes <= file.bytes - stored.offset);
      NG_FUZZ_CHECK(stored.checksums.size() * read.chunk_bytes >= stored.bytes);
      uint64_t elements = 0;
      for (const SharedRun& run : shared_runs(stored.region, Region::whole(tensor.shape), tensor.shape)) {
        elements += static_cast<uint64_t>(run.length);
      }
      NG_FUZZ_CHECK(elements == static_cast<uint64_t>(stored.region.numel()));
    }
  }
  const Manifest again = parse_manifest(manifest_text(read), "fuzz");
  NG_FUZZ_CHECK(manifest_text(again) == manifest_text(read));
  return true;
}

}  // namespace ng::fuzz
