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
//
// The file must not be changed in place while it is open (a truncation makes reading the views fatal, as with any
// mapping); replacing it, as write_safetensors does, leaves the views as they are.
class SafetensorsFile {
 public:
  // Throws SystemError if it cannot be opened, FileCorrupt if it is not a valid safetensors file.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  // In file order. Views live as long as *this; in files that others wrote they need not be aligned.
  const std::vector<FileTensor>& tensors() const noexcept;
  const FileTensor* find(std::string_view name) const noexcept;
  const std::map<std::string, std::string>& metadata() const noexcept;
  const std::string& path() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes `path` atomically: a temporary file in the same directory, fsync, rename, fsync of the directory. On any
// failure `path` is as it was and the temporary file is gone; only the last fsync can fail after the replacement, and
// its error says so. A symbolic link stays and the file that it leads to is replaced; a replaced file's mode is kept.
//
// Tensors are laid out by falling element size (then as given), so that all are aligned; the data begins on a multiple
// of 64 bytes. Bytes must not change during the call. Thread-safe. Throws SystemError (the operating system refuses)
// or InvalidArgument (a tensor that could not be read back: unknown dtype, bytes that its shape does not take, a name
// twice or not UTF-8; or `path` is neither absent nor a regular file).
void write_safetensors(const std::string& path, std::span<const FileTensor> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace ng
