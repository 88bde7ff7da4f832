// io: safetensors files, read as if hostile and written so that a failure loses nothing.
//
// Format: 8-byte little-endian header length, JSON header, tensor bytes (github.com/huggingface/safetensors).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ng {

// One tensor of a file. `dtype` is safetensors' own name: F32, BF16, U8, F8_E4M3, ...
struct FileTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // inside the mapping, or the caller's memory when writing
};

// A memory-mapped safetensors file. Every length and offset is checked before use: header size, strict JSON (no
// duplicate keys), known dtypes, shape times width equal to the byte range without overflow, ranges that tile the
// data area without holes or overlaps. Move-only; const functions are thread-safe.
class SafetensorsFile {
 public:
  // Throws SystemError if it cannot be opened, FileCorrupt if it is not a valid safetensors file.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  const std::vector<FileTensor>& tensors() const noexcept;  // in file order; views live as long as *this
  const FileTensor* find(std::string_view name) const noexcept;
  const std::map<std::string, std::string>& metadata() const noexcept;
  const std::string& path() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes `path` atomically: a temporary file in the same directory, fsync, rename, fsync of the directory. On any
// failure `path` is as it was and the temporary file is gone. Tensors are laid out by falling element size (then as
// given), so that all are aligned; the header is padded with spaces to 64 bytes. Throws SystemError, InvalidArgument.
void write_safetensors(const std::string& path, std::span<const FileTensor> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace ng
