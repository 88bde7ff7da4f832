// Safetensors files: mapped for reading, written through AtomicFile.
//
// The header is read, not mapped, so that what was checked is what is used. The data is mapped privately and read-only;
// a process that truncates the file in place while it is mapped makes later reads of it fatal (SIGBUS), as with any
// mapping; replacing the file by rename, as write_safetensors does, is safe.
#include <array>
#include <map>

#include "io/file.hpp"
#include "io/safetensors_header.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/io.hpp"

namespace ng {

struct SafetensorsFile::Impl {
  std::string path;
  Mapping mapping;
  SafetensorsHeader header;
  std::map<std::string_view, const FileTensor*> by_name;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  const auto [file, size] = open_readable(path);
  std::array<std::byte, sizeof(uint64_t)> prefix;
  NG_CHECK(read_at(file, prefix, 0, path) == prefix.size(), FileCorrupt, path, ": the file has ", size,
           " bytes; a safetensors file begins with 8 that give the header's length");
  uint64_t length = 0;
  for (size_t i = 0; i < prefix.size(); ++i) length |= std::to_integer<uint64_t>(prefix[i]) << 8 * i;
  NG_CHECK(length <= kMaxHeaderBytes, FileCorrupt, path, ": the header's length is ", length, "; at most ",
           kMaxHeaderBytes, " is allowed: not a safetensors file?");
  NG_CHECK(size >= prefix.size() && length <= size - prefix.size(), FileCorrupt, path, ": the header's length is ",
           length, ", but the file has ", size, " bytes: it is truncated or altered");

  std::string json(length, '\0');
  NG_CHECK(read_at(file, std::as_writable_bytes(std::span(json)), prefix.size(), path) == length, FileCorrupt, path,
           ": the file became shorter while it was read");
  impl_->mapping = Mapping(file, size, path);
  impl_->header = parse_safetensors_header(json, impl_->mapping.bytes().subspan(prefix.size() + length), path);
  for (const FileTensor& tensor : impl_->header.tensors) impl_->by_name.emplace(tensor.name, &tensor);
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

const std::vector<FileTensor>& SafetensorsFile::tensors() const noexcept { return impl_->header.tensors; }

const FileTensor* SafetensorsFile::find(std::string_view name) const noexcept {
  const auto found = impl_->by_name.find(name);
  return found == impl_->by_name.end() ? nullptr : found->second;
}

const std::map<std::string, std::string>& SafetensorsFile::metadata() const noexcept { return impl_->header.metadata; }

const std::string& SafetensorsFile::path() const noexcept { return impl_->path; }

void write_safetensors(const std::string& path, std::span<const FileTensor> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<FileTensor> ordered(tensors.begin(), tensors.end());
  sort_for_file(ordered);
  const std::string header = make_safetensors_header(ordered, metadata);
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(header)));
  for (const FileTensor& tensor : ordered) file.write(tensor.bytes);
  file.commit();
}

}  // namespace ng
