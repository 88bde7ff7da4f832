// ZeroedArray: a large array that is zero at first and of which only the pages that are written take memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <type_traits>

#include "narrowgauge/error.hpp"

namespace ng {

// T: what zero bytes are a value of.
template <typename T>
class ZeroedArray {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  explicit ZeroedArray(size_t size) : size_(size) {
    if (size == 0) return;
    void* mapping = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    NG_CHECK(mapping != MAP_FAILED, OutOfMemory, "cannot map ", bytes(), " bytes for the tables of a pool");
    madvise(mapping, bytes(), MADV_NOHUGEPAGE);  // what is written is sparse
    data_ = static_cast<T*>(mapping);
  }
  ~ZeroedArray() {
    if (data_ != nullptr) munmap(data_, bytes());
  }
  ZeroedArray(const ZeroedArray&) = delete;
  ZeroedArray& operator=(const ZeroedArray&) = delete;

  size_t size() const noexcept { return size_; }
  T& operator[](size_t index) noexcept { return data_[index]; }
  const T& operator[](size_t index) const noexcept { return data_[index]; }

 private:
  size_t bytes() const noexcept { return size_ * sizeof(T); }

  size_t size_;
  T* data_ = nullptr;
};

}  // namespace ng
