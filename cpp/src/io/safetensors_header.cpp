// Parsing and making the JSON header. One table of dtypes serves both directions.
#include "io/safetensors_header.hpp"

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <utility>

#include "io/json.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

constexpr const char* kMetadataKey = "__metadata__";

struct FileDType {
  std::string_view name;
  uint64_t bits;
};
constexpr std::array<FileDType, 20> kFileDTypes{{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},   {"I8", 8},    {"F8_E5M2", 8},
    {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16}, {"BF16", 16}, {"I32", 32},
    {"U32", 32},    {"F32", 32},    {"F64", 64},    {"I64", 64},    {"U64", 64}, {"C64", 64},
}};

std::string dtype_names() {
  std::string out;
  for (const FileDType& dtype : kFileDTypes) out.append(out.empty() ? "" : ", ").append(dtype.name);
  return out;
}

std::string shape_str(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i == 8 && shape.size() > 9) return out + concat(", ... ", shape.size(), " axes]");
    out += concat(i == 0 ? "" : ", ", shape[i]);
  }
  return out + "]";
}

struct Entry {
  FileTensor tensor;
  uint64_t begin = 0;
  uint64_t end = 0;
};

std::vector<int64_t> read_lengths(JsonReader& json) {
  std::vector<int64_t> out;
  json.array([&] {
    const JsonNumber number = json.number();
    if (!number.integer || *number.integer < 0) {
      json.fail(concat("expected an integer in [0, 2^63), found ", printable(number.text)));
    }
    out.push_back(*number.integer);
  });
  return out;
}

Entry read_entry(JsonReader& json, const std::string& name) {
  std::optional<std::string> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<int64_t>> offsets;
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      dtype = json.string();
    } else if (key == "shape") {
      shape = read_lengths(json);
    } else if (key == "data_offsets") {
      offsets = read_lengths(json);
    } else {
      json.skip();  // as the format's own reader does
    }
  });
  if (!dtype || !shape || !offsets) {
    json.fail(concat("tensor ", printable(name), " has no ", !dtype ? "dtype" : !shape ? "shape" : "data_offsets"));
  }
  if (offsets->size() != 2 || (*offsets)[0] > (*offsets)[1]) {
    json.fail(concat("tensor ", printable(name), " has data_offsets ", shape_str(*offsets), "; expected [begin, end]"));
  }
  const auto begin = static_cast<uint64_t>((*offsets)[0]);
  const auto end = static_cast<uint64_t>((*offsets)[1]);
  const std::string mismatch = size_mismatch(*dtype, *shape, end - begin);
  if (!mismatch.empty()) json.fail(concat("tensor ", printable(name), " ", mismatch));
  return {{name, std::move(*dtype), std::move(*shape), {}}, begin, end};
}

}  // namespace

uint64_t file_dtype_bits(std::string_view name) noexcept {
  const auto* found =
      std::find_if(kFileDTypes.begin(), kFileDTypes.end(), [&](const auto& t) { return t.name == name; });
  return found == kFileDTypes.end() ? 0 : found->bits;
}

std::string size_mismatch(const std::string& dtype, const std::vector<int64_t>& shape, uint64_t bytes) {
  const uint64_t width = file_dtype_bits(dtype);
  if (width == 0) return concat("has unknown dtype ", printable(dtype), "; the dtypes are ", dtype_names());
  // Axes of length 0 do not excuse the others: strides are products of them too.
  uint64_t bits = width;
  bool empty = false;
  for (const int64_t length : shape) {
    if (length < 0) return concat("has a negative axis in shape ", shape_str(shape));
    empty |= length == 0;
    if (length > 0 && __builtin_mul_overflow(bits, static_cast<uint64_t>(length), &bits)) {
      return concat("has a size that overflows 64 bits: shape ", shape_str(shape), " of ", dtype);
    }
  }
  if (empty) bits = 0;
  if (bits % 8 != 0) return concat("has ", bits, " bits, not whole bytes: shape ", shape_str(shape), " of ", dtype);
  if (bits / 8 != bytes) {
    return concat("has ", bytes, " bytes, but shape ", shape_str(shape), " of ", dtype, " takes ", bits / 8);
  }
  return {};
}

SafetensorsHeader parse_safetensors_header(std::string_view json_text, std::span<const std::byte> data,
                                           const std::string& path) {
  NG_CHECK(json_text.starts_with('{'), FileCorrupt, path, ": the header does not begin with '{'");
  SafetensorsHeader out;
  std::vector<Entry> entries;
  JsonReader json(json_text, path);
  json.object([&](const std::string& key) {
    if (key == kMetadataKey) {
      json.object([&](const std::string& name) { out.metadata[name] = json.string(); });
    } else {
      entries.push_back(read_entry(json, key));
    }
  });
  json.end();

  // Stable, and by end too: of tensors that begin at one place, the empty ones come first, as written.
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t position = 0;
  out.tensors.reserve(entries.size());
  for (Entry& entry : entries) {
    NG_CHECK(entry.begin == position, FileCorrupt, path, ": tensor ", printable(entry.tensor.name),
             " begins at data byte ", entry.begin, "; expected ", position, ", the end of the one before");
    NG_CHECK(entry.end <= data.size(), FileCorrupt, path, ": tensor ", printable(entry.tensor.name),
             " ends at data byte ", entry.end, ", but the file has ", data.size(),
             " data bytes: it is truncated or altered");
    entry.tensor.bytes = data.subspan(entry.begin, entry.end - entry.begin);
    position = entry.end;
    out.tensors.push_back(std::move(entry.tensor));
  }
  NG_CHECK(position == data.size(), FileCorrupt, path, ": the tensors take ", position,
           " data bytes, but the file has ", data.size());
  return out;
}

void sort_for_file(std::vector<FileTensor>& tensors) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const FileTensor& a, const FileTensor& b) {
    return file_dtype_bits(a.dtype) > file_dtype_bits(b.dtype);
  });
}

std::string make_safetensors_header(std::span<const FileTensor> tensors,
                                    const std::map<std::string, std::string>& metadata, uint64_t alignment) {
  std::set<std::string_view> names;
  for (const FileTensor& tensor : tensors) {
    NG_CHECK(is_utf8(tensor.name), InvalidArgument, "tensor name ", printable(tensor.name), " is not UTF-8");
    NG_CHECK(tensor.name != kMetadataKey, InvalidArgument, "tensor name ", kMetadataKey, " is taken by the format");
    NG_CHECK(names.insert(tensor.name).second, InvalidArgument, "two tensors are named ", printable(tensor.name));
    const std::string mismatch = size_mismatch(tensor.dtype, tensor.shape, tensor.bytes.size());
    NG_CHECK(mismatch.empty(), InvalidArgument, "tensor ", printable(tensor.name), " ", mismatch);
  }

  std::string json = "{";
  const auto key = [&](std::string_view name) {
    if (json.back() != '{') json += ',';
    json += json_quote(name) + ":";
  };
  if (!metadata.empty()) {
    key(kMetadataKey);
    json += '{';
    for (const auto& [name, value] : metadata) {
      NG_CHECK(is_utf8(name) && is_utf8(value), InvalidArgument, "metadata ", printable(name), ": ", printable(value),
               " is not UTF-8");
      key(name);
      json += json_quote(value);
    }
    json += '}';
  }
  uint64_t position = 0;
  for (const FileTensor& tensor : tensors) {
    key(tensor.name);
    json += "{\"dtype\":\"" + tensor.dtype + "\",\"shape\":[";
    for (size_t i = 0; i < tensor.shape.size(); ++i)
      json.append(i == 0 ? "" : ",").append(std::to_string(tensor.shape[i]));
    json.append("],\"data_offsets\":[").append(std::to_string(position)).append(",");
    json.append(std::to_string(position + tensor.bytes.size())).append("]}");
    position += tensor.bytes.size();
  }
  json += '}';

  std::string out(sizeof(uint64_t), '\0');
  const size_t total = (out.size() + json.size() + alignment - 1) / alignment * alignment;
  json.resize(total - out.size(), ' ');
  NG_CHECK(json.size() <= kMaxHeaderBytes, InvalidArgument, "the header takes ", json.size(),
           " bytes; safetensors allows ", kMaxHeaderBytes);
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<char>(json.size() >> 8 * i & 0xff);
  return out + json;
}

}  // namespace ng
