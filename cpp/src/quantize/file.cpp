// A narrow matrix in a safetensors file: its canonical arrays as `<name>.codes`, `<name>.scales`, `<name>.zeros` and
// `<name>.global_scale`, its format and shape in the metadata entry "narrowgauge":
//
//   {"version": 1, "tensors": {"<name>": {"format": "fp6_e2m3:g128:fp16", "shape": [N, K]}}}
//
// The Python package reads and writes the same.
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "io/json.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"
#include "narrowgauge/quantize.hpp"

namespace ng {
namespace {

constexpr const char* kMetadataKey = "narrowgauge";
constexpr int64_t kVersion = 1;

struct Entry {
  std::string format;
  std::vector<int64_t> shape;
};

std::string scale_file_dtype(ScaleType type) {
  switch (type) {
    case ScaleType::fp32: return "F32";
    case ScaleType::fp16: return "F16";
    case ScaleType::bf16: return "BF16";
    case ScaleType::e8m0:
    case ScaleType::e4m3: break;  // safetensors' readers know neither
  }
  return "U8";
}

std::span<const std::byte> bytes_of(const void* data, int64_t bytes) {
  return {static_cast<const std::byte*>(data), static_cast<size_t>(bytes)};
}

// The arrays of the matrix as a file holds them; absent ones are left out.
std::vector<FileTensor> file_tensors(const CanonicalView& view, const std::string& name) {
  const CanonicalBytes bytes = canonical_bytes(view.format, view.rows, view.cols);
  const int64_t groups = view.format.groups(view.cols);
  std::vector<FileTensor> tensors = {
      {name + ".codes", "U8", {view.rows, view.format.row_bytes(view.cols)}, bytes_of(view.codes, bytes.codes)},
      {name + ".scales", scale_file_dtype(view.format.scale), {view.rows, groups}, bytes_of(view.scales, bytes.scales)},
  };
  if (view.format.element.has_zero_point()) {
    tensors.push_back({name + ".zeros", "U8", {view.rows, groups}, bytes_of(view.zeros, bytes.zeros)});
  }
  if (view.format.has_global_scale()) {
    tensors.push_back({name + ".global_scale", "F32", {1}, bytes_of(view.global_scale, bytes.global_scale)});
  }
  return tensors;
}

std::vector<int64_t> read_shape(JsonReader& json) {
  std::vector<int64_t> shape;
  json.array([&] {
    const JsonNumber length = json.number();
    if (!length.integer || *length.integer < 0) json.fail("the length " + std::string(length.text) + " of an axis");
    shape.push_back(*length.integer);
  });
  return shape;
}

std::map<std::string, Entry> read_entries(const SafetensorsFile& file) {
  const auto found = file.metadata().find(kMetadataKey);
  NG_CHECK(found != file.metadata().end(), InvalidArgument, file.path(),
           " was not written by narrowgauge: its metadata has no entry '", kMetadataKey, "'");
  JsonReader json(found->second, file.path() + ": metadata entry 'narrowgauge'");
  std::map<std::string, Entry> entries;
  int64_t version = 0;
  json.object([&](const std::string& key) {
    if (key == "version") {
      version = json.number().integer.value_or(0);
    } else if (key == "tensors") {
      json.object([&](const std::string& name) {
        Entry& entry = entries[name];
        json.object([&](const std::string& field) {
          if (field == "format") {
            entry.format = json.string();
          } else if (field == "shape") {
            entry.shape = read_shape(json);
          } else {
            json.skip();
          }
        });
      });
    } else {
      json.skip();
    }
  });
  json.end();
  NG_CHECK(version == kVersion, InvalidArgument, file.path(), " has version ", version, ", expected ", kVersion);
  return entries;
}

}  // namespace

void save(const QTensor& tensor, const std::string& path, const std::string& name) {
  NG_CHECK(is_utf8(name) && !name.empty(), InvalidArgument, "the name ", printable(name), " is empty or not UTF-8");
  CanonicalView view{tensor.format(), tensor.rows(), tensor.cols()};
  Buffer unpacked;
  if (tensor.packed()) {
    // Sections in this order are aligned: all but the codes end in whole scales, and Buffer begins at 64.
    const CanonicalBytes bytes = canonical_bytes(view.format, view.rows, view.cols);
    unpacked = Buffer(static_cast<size_t>(bytes.total()));
    std::byte* next = unpacked.data();
    const auto section = [&next](int64_t size) { return std::exchange(next, next + size); };
    if (bytes.global_scale != 0) view.global_scale = reinterpret_cast<float*>(section(bytes.global_scale));
    view.scales = section(bytes.scales);
    if (bytes.zeros != 0) view.zeros = reinterpret_cast<uint8_t*>(section(bytes.zeros));
    view.codes = reinterpret_cast<uint8_t*>(section(bytes.codes));
    unpack(tensor.packed_view(), view, default_executor());
  } else {
    view = tensor.canonical_view();
  }

  std::string shape;
  for (const int64_t length : tensor.shape()) {
    if (!shape.empty()) shape += ',';
    shape += std::to_string(length);
  }
  const std::string entry = concat("{\"version\":", kVersion, ",\"tensors\":{", json_quote(name), ":{\"format\":\"",
                                   tensor.format().str(), "\",\"shape\":[", shape, "]}}}");
  write_safetensors(path, file_tensors(view, name), {{"format", "pt"}, {kMetadataKey, entry}});
}

QTensor load(const std::string& path, const std::string& name) {
  const SafetensorsFile file(path);
  const std::map<std::string, Entry> entries = read_entries(file);
  NG_CHECK(!name.empty() || entries.size() == 1, InvalidArgument, path, " holds ", entries.size(),
           " narrow matrices: name one of them");
  const auto found = name.empty() ? entries.begin() : entries.find(name);
  NG_CHECK(found != entries.end(), InvalidArgument, path, " holds no narrow matrix ", printable(name));

  const auto& [full_name, entry] = *found;
  NG_CHECK(!entry.shape.empty(), FileCorrupt, path, ": ", printable(full_name), " has no shape");
  CanonicalView view{Format::parse(entry.format), 1, entry.shape.back()};
  for (size_t axis = 0; axis + 1 < entry.shape.size(); ++axis) {
    NG_CHECK(!__builtin_mul_overflow(view.rows, entry.shape[axis], &view.rows), FileCorrupt, path, ": ",
             printable(full_name), " has more rows than an int64 counts");
  }
  for (const FileTensor& expected : file_tensors(view, full_name)) {
    const FileTensor* tensor = file.find(expected.name);
    NG_CHECK(tensor != nullptr, FileCorrupt, path, ": ", printable(expected.name), " is missing");
    NG_CHECK(tensor->dtype == expected.dtype && tensor->shape == expected.shape, FileCorrupt, path, ": ",
             printable(expected.name), " has dtype ", tensor->dtype, " and ", tensor->bytes.size(), " bytes, expected ",
             expected.dtype, " and ", expected.bytes.size(), " for ", view.format.str());
    // A view has no const twin; copy_of only reads.
    void* data = const_cast<std::byte*>(tensor->bytes.data());
    if (expected.name == full_name + ".codes") view.codes = static_cast<uint8_t*>(data);
    if (expected.name == full_name + ".scales") view.scales = data;
    if (expected.name == full_name + ".zeros") view.zeros = static_cast<uint8_t*>(data);
    if (expected.name == full_name + ".global_scale") view.global_scale = static_cast<float*>(data);
  }
  return QTensor::copy_of(view, entry.shape);
}

}  // namespace ng
