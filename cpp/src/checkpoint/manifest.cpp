// Text to manifest and back, and the rules.
#include "checkpoint/manifest.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "checkpoint/region.hpp"
#include "io/crc32c.hpp"
#include "io/json.hpp"
#include "io/safetensors_header.hpp"

namespace ng {
namespace {

constexpr int64_t kVersion = 1;
constexpr std::string_view kChecksumMember = ",\"crc32c\":\"";
constexpr std::string_view kEnd = "\"}\n";
constexpr size_t kDigits = 8;

void append_hex(std::string& out, uint32_t value) {
  for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[value >> shift & 15];
}

// Lower-case digits only: one text for one value.
std::optional<uint32_t> parse_hex(std::string_view digits) {
  uint32_t value = 0;
  for (const char c : digits) {
    const bool decimal = c >= '0' && c <= '9';
    if (!decimal && !(c >= 'a' && c <= 'f')) return std::nullopt;
    value = value << 4 | static_cast<uint32_t>(decimal ? c - '0' : c - 'a' + 10);
  }
  return value;
}

void append_lengths(std::string& out, std::span<const int64_t> values) {
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) {
    if (i != 0) out += ',';
    out += std::to_string(values[i]);
  }
  out += ']';
}

void append_region(std::string& out, const StoredRegion& stored) {
  out += concat("{\"file\":", stored.file, ",\"offset\":", stored.offset, ",\"bytes\":", stored.bytes);
  if (stored.region.flat) {
    out += ",\"flat\":";
    append_lengths(out, stored.region.bounds[0]);
  } else {
    out += ",\"box\":[";
    for (size_t axis = 0; axis < stored.region.bounds.size(); ++axis) {
      if (axis != 0) out += ',';
      append_lengths(out, stored.region.bounds[axis]);
    }
    out += ']';
  }
  out += ",\"crc32c\":\"";
  for (const uint32_t checksum : stored.checksums) append_hex(out, checksum);
  out += "\"}";
}

// --- parsing ------------------------------------------------------------------------------------------------

int64_t read_count(JsonReader& json) {
  const JsonNumber number = json.number();
  if (!number.integer || *number.integer < 0) {
    json.fail(concat("expected an integer in [0, 2^63), found ", printable(number.text)));
  }
  return *number.integer;
}

uint64_t read_size(JsonReader& json) { return static_cast<uint64_t>(read_count(json)); }

std::vector<int64_t> read_counts(JsonReader& json) {
  std::vector<int64_t> out;
  json.array([&] { out.push_back(read_count(json)); });
  return out;
}

std::array<int64_t, 2> read_bounds(JsonReader& json) {
  const std::vector<int64_t> pair = read_counts(json);
  if (pair.size() != 2) json.fail(concat("expected [start, stop], found ", pair.size(), " numbers"));
  return {pair[0], pair[1]};
}

std::vector<uint32_t> read_checksums(JsonReader& json) {
  const std::string text = json.string();
  std::vector<uint32_t> out;
  out.reserve(text.size() / kDigits);
  for (size_t at = 0; at < text.size(); at += kDigits) {
    const auto value = parse_hex(std::string_view(text).substr(at, kDigits));
    if (!value || at + kDigits > text.size()) {
      json.fail("expected eight hexadecimal digits a chunk, found " + printable(text));
    }
    out.push_back(*value);
  }
  return out;
}

// Reads an object whose members are all known and all there.
class Members {
 public:
  Members(JsonReader& json, const char* what) : json_(json), what_(what) {}

  template <typename F>
  void read(std::initializer_list<std::string_view> required, const F& member) {
    std::set<std::string, std::less<>> seen;
    json_.object([&](const std::string& key) {
      if (!member(key)) json_.fail(concat(what_, " has an unknown member ", printable(key)));
      seen.insert(key);
    });
    for (const std::string_view key : required) {
      if (!seen.contains(key)) json_.fail(concat(what_, " has no member '", key, "'"));
    }
  }

 private:
  JsonReader& json_;
  const char* what_;
};

StoredFile read_file(JsonReader& json) {
  StoredFile out;
  Members(json, "a file").read({"name", "bytes", "header_bytes", "header_crc32c"}, [&](const std::string& key) {
    if (key == "name") {
      out.name = json.string();
    } else if (key == "bytes") {
      out.bytes = read_size(json);
    } else if (key == "header_bytes") {
      out.header_bytes = read_size(json);
    } else if (key == "header_crc32c") {
      const std::vector<uint32_t> checksums = read_checksums(json);
      if (checksums.size() != 1) json.fail(concat("expected one checksum, found ", checksums.size()));
      out.header_checksum = checksums[0];
    } else {
      return false;
    }
    return true;
  });
  return out;
}

StoredRegion read_region(JsonReader& json) {
  StoredRegion out;
  int kinds = 0;
  Members(json, "a region").read({"file", "offset", "bytes", "crc32c"}, [&](const std::string& key) {
    if (key == "file") {
      const int64_t file = read_count(json);
      if (file > INT32_MAX) json.fail(concat("file ", file, " is no index"));
      out.file = static_cast<uint32_t>(file);
    } else if (key == "offset") {
      out.offset = read_size(json);
    } else if (key == "bytes") {
      out.bytes = read_size(json);
    } else if (key == "crc32c") {
      out.checksums = read_checksums(json);
    } else if (key == "flat") {
      out.region = {true, {read_bounds(json)}};
      ++kinds;
    } else if (key == "box") {
      out.region.flat = false;
      json.array([&] { out.region.bounds.push_back(read_bounds(json)); });
      ++kinds;
    } else {
      return false;
    }
    return true;
  });
  if (kinds != 1) json.fail("a region has one of 'box' and 'flat'");
  return out;
}

StoredTensor read_tensor(JsonReader& json) {
  StoredTensor out;
  Members(json, "a tensor").read({"name", "dtype", "shape", "regions"}, [&](const std::string& key) {
    if (key == "name") {
      out.name = json.string();
    } else if (key == "dtype") {
      out.dtype = json.string();
    } else if (key == "shape") {
      out.shape = read_counts(json);
    } else if (key == "regions") {
      json.array([&] { out.regions.push_back(read_region(json)); });
    } else {
      return false;
    }
    return true;
  });
  return out;
}

Manifest read_manifest(JsonReader& json) {
  Manifest out;
  Members(json, "the manifest")
      .read({"narrowgauge_checkpoint", "step", "chunk_bytes", "files", "tensors", "state", "crc32c"},
            [&](const std::string& key) {
              if (key == "narrowgauge_checkpoint") {
                const int64_t version = read_count(json);
                if (version != kVersion) {
                  json.fail(concat("version ", version, ", this narrowgauge reads version ", kVersion));
                }
              } else if (key == "step") {
                out.step = read_count(json);
              } else if (key == "chunk_bytes") {
                out.chunk_bytes = read_size(json);
              } else if (key == "files") {
                json.array([&] { out.files.push_back(read_file(json)); });
              } else if (key == "tensors") {
                json.array([&] { out.tensors.push_back(read_tensor(json)); });
              } else if (key == "state") {
                out.state = json.string();
              } else if (key == "crc32c") {
                json.string();
              } else {
                return false;
              }
              return true;
            });
  json.end();
  return out;
}

// --- rules --------------------------------------------------------------------------------------------------

bool is_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name[0] != '.' && name != kManifestName &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' || c == '_' ||
                  c == '-';
         });
}

// The tensor's bytes. Throws CheckpointCorrupt.
uint64_t check_tensor(const Manifest& manifest, const StoredTensor& tensor, const std::string& source) {
  const std::string label = concat(source, ": tensor ", printable(tensor.name));
  const uint64_t bits = file_dtype_bits(tensor.dtype);
  NG_CHECK(bits != 0 && bits % 8 == 0, CheckpointCorrupt, label, " has dtype ", printable(tensor.dtype),
           ", expected one of whole bytes");
  const uint64_t width = bits / 8;
  NG_CHECK(tensor.shape.size() <= 64, CheckpointCorrupt, label, " has ", tensor.shape.size(), " axes, at most 64");
  int64_t numel = 1;
  int64_t extent = static_cast<int64_t>(width);  // without the axes of length 0: strides are products of them too
  for (const int64_t length : tensor.shape) {
    NG_CHECK(length == 0 || !__builtin_mul_overflow(extent, length, &extent), CheckpointCorrupt, label,
             " has a size that overflows 63 bits");
    numel = numel == 0 || length == 0 ? 0 : numel * length;
  }
  NG_CHECK(!tensor.regions.empty(), CheckpointCorrupt, label, " has no regions");

  int64_t stored_elements = 0;
  std::vector<const Region*> regions;
  for (const StoredRegion& stored : tensor.regions) {
    const std::string mismatch = region_mismatch(stored.region, tensor.shape);
    NG_CHECK(mismatch.empty(), CheckpointCorrupt, label, ": a region ", mismatch);
    const std::string place = concat(label, ": region ", region_str(stored.region));
    const auto bytes = static_cast<uint64_t>(stored.region.numel()) * width;
    NG_CHECK(stored.bytes == bytes, CheckpointCorrupt, place, " has ", stored.bytes, " bytes, expected ", bytes);
    NG_CHECK(stored.file < manifest.files.size(), CheckpointCorrupt, place, " is in file ", stored.file, " of ",
             manifest.files.size());
    const StoredFile& file = manifest.files[stored.file];
    NG_CHECK(
        stored.offset >= file.header_bytes && stored.offset <= file.bytes && stored.bytes <= file.bytes - stored.offset,
        CheckpointCorrupt, place, " is at bytes ", stored.offset, " + ", stored.bytes, " of ", file.name,
        ", whose data is at ", file.header_bytes, " to ", file.bytes);
    NG_CHECK(stored.checksums.size() == chunk_count(stored.bytes, manifest.chunk_bytes), CheckpointCorrupt, place,
             " has ", stored.checksums.size(), " checksums, expected ",
             chunk_count(stored.bytes, manifest.chunk_bytes));
    regions.push_back(&stored.region);
    NG_CHECK(!__builtin_add_overflow(stored_elements, stored.region.numel(), &stored_elements), CheckpointCorrupt,
             label, " has more elements in its regions than 63 bits count");
  }
  NG_CHECK(stored_elements == numel, CheckpointCorrupt, label, " has ", stored_elements,
           " elements in its regions, expected ", numel);
  NG_CHECK(regions.size() <= 16384, CheckpointCorrupt, label, " has ", regions.size(), " regions, at most 16384");
  NG_CHECK(regions_disjoint(regions, tensor.shape), CheckpointCorrupt, label, " has regions that overlap");
  return static_cast<uint64_t>(numel) * width;
}

}  // namespace

std::string manifest_text(const Manifest& manifest) {
  std::string out = concat("{\"narrowgauge_checkpoint\":", kVersion, ",\"step\":", manifest.step,
                           ",\"chunk_bytes\":", manifest.chunk_bytes, ",\"files\":[");
  for (size_t i = 0; i < manifest.files.size(); ++i) {
    const StoredFile& file = manifest.files[i];
    out += concat(i == 0 ? "\n" : ",\n", "{\"name\":", json_quote(file.name), ",\"bytes\":", file.bytes,
                  ",\"header_bytes\":", file.header_bytes, ",\"header_crc32c\":\"");
    append_hex(out, file.header_checksum);
    out += "\"}";
  }
  out += "],\"tensors\":[";
  for (size_t i = 0; i < manifest.tensors.size(); ++i) {
    const StoredTensor& tensor = manifest.tensors[i];
    out += concat(i == 0 ? "\n" : ",\n", "{\"name\":", json_quote(tensor.name), ",\"dtype\":", json_quote(tensor.dtype),
                  ",\"shape\":");
    append_lengths(out, tensor.shape);
    out += ",\"regions\":[";
    for (size_t j = 0; j < tensor.regions.size(); ++j) {
      if (j != 0) out += ',';
      append_region(out, tensor.regions[j]);
    }
    out += "]}";
  }
  out += "],\n\"state\":" + json_quote(manifest.state);
  return seal_manifest(std::move(out));
}

std::string seal_manifest(std::string body) {
  const uint32_t checksum = crc32c(0, std::as_bytes(std::span(body)));
  body += kChecksumMember;
  append_hex(body, checksum);
  body += kEnd;
  return body;
}

Manifest parse_manifest(std::string_view text, const std::string& source) {
  constexpr size_t kTail = kChecksumMember.size() + kDigits + kEnd.size();
  NG_CHECK(
      text.size() >= kTail && text.substr(text.size() - kTail).starts_with(kChecksumMember) && text.ends_with(kEnd),
      CheckpointCorrupt, source, ": the manifest does not end in its checksum: it is truncated or altered");
  const std::string_view body = text.substr(0, text.size() - kTail);
  const auto expected = parse_hex(text.substr(body.size() + kChecksumMember.size(), kDigits));
  const uint32_t found = crc32c(0, std::as_bytes(std::span(body)));
  NG_CHECK(expected == found, CheckpointCorrupt, source, ": the manifest's checksum does not match: it is damaged");
  try {
    JsonReader json(text, source);
    return read_manifest(json);
  } catch (const CheckpointCorrupt&) {
    throw;
  } catch (const FileCorrupt& error) {
    throw CheckpointCorrupt(error.what());
  }
}

void check_manifest(const Manifest& manifest, const std::string& source) {
  NG_CHECK(manifest.chunk_bytes >= 4096 && manifest.chunk_bytes <= uint64_t{1} << 30, CheckpointCorrupt, source,
           ": chunk_bytes is ", manifest.chunk_bytes, ", expected 4 KiB to 1 GiB");
  std::set<std::string_view> files;
  for (const StoredFile& file : manifest.files) {
    NG_CHECK(is_file_name(file.name), CheckpointCorrupt, source, ": ", printable(file.name),
             " is no name of a file in this directory");
    NG_CHECK(files.insert(file.name).second, CheckpointCorrupt, source, ": two files are named ", file.name);
    NG_CHECK(file.header_bytes <= file.bytes && file.header_bytes <= kMaxHeaderBytes + 8 && file.bytes <= INT64_MAX,
             CheckpointCorrupt, source, ": ", file.name, " has ", file.header_bytes, " header bytes of ", file.bytes);
  }
  std::set<std::string_view> names;
  // (file, offset, bytes), to see that they tile the files
  std::vector<std::tuple<uint32_t, uint64_t, uint64_t>> ranges;
  for (const StoredTensor& tensor : manifest.tensors) {
    NG_CHECK(names.insert(tensor.name).second, CheckpointCorrupt, source, ": two tensors are named ",
             printable(tensor.name));
    check_tensor(manifest, tensor, source);
    for (const StoredRegion& stored : tensor.regions) ranges.emplace_back(stored.file, stored.offset, stored.bytes);
  }
  std::sort(ranges.begin(), ranges.end());
  size_t next = 0;
  for (uint32_t index = 0; index < manifest.files.size(); ++index) {
    const StoredFile& file = manifest.files[index];
    uint64_t position = file.header_bytes;
    for (; next < ranges.size() && std::get<0>(ranges[next]) == index; ++next) {
      const auto& [unused, offset, bytes] = ranges[next];
      if (bytes == 0) continue;
      NG_CHECK(offset == position, CheckpointCorrupt, source, ": in ", file.name, " a region begins at byte ", offset,
               ", expected ", position, ", the end of the one before");
      position += bytes;
    }
    NG_CHECK(position == file.bytes, CheckpointCorrupt, source, ": the regions of ", file.name, " end at byte ",
             position, ", the file at ", file.bytes);
  }
}

void merge_manifest(Manifest& manifest, Manifest&& part) {
  const auto shift = static_cast<uint32_t>(manifest.files.size());
  for (StoredFile& file : part.files) manifest.files.push_back(std::move(file));
  std::map<std::string, size_t> known;
  for (size_t i = 0; i < manifest.tensors.size(); ++i) known.emplace(manifest.tensors[i].name, i);
  for (StoredTensor& tensor : part.tensors) {
    for (StoredRegion& stored : tensor.regions) stored.file += shift;
    const auto found = known.find(tensor.name);
    if (found == known.end()) {
      manifest.tensors.push_back(std::move(tensor));
      continue;
    }
    StoredTensor& other = manifest.tensors[found->second];
    NG_CHECK(other.dtype == tensor.dtype && other.shape == tensor.shape, CheckpointError, "tensor ",
             printable(tensor.name), " has another dtype or shape on writer ", shift, " than on those before it");
    for (StoredRegion& stored : tensor.regions) other.regions.push_back(std::move(stored));
  }
}

}  // namespace ng
