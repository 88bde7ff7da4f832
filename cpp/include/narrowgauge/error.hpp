// Errors: what the library throws, and the one check macro that throws it.
//
// Every public function validates its arguments at the boundary and throws one of these types; kernels
// never throw. The Python bindings map each type to the built-in exception named beside it.
#pragma once

#include <concepts>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ng {

// Base of everything thrown on purpose. Python: narrowgauge.Error (a RuntimeError).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An argument has the wrong shape, dtype, value or name. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// Memory could not be had. Python: MemoryError.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// The operating system refused. Python: OSError with errno().
class SystemError : public Error {
 public:
  SystemError(int errno_value, const std::string& message) : Error(message), errno_(errno_value) {}
  int errno_value() const noexcept { return errno_; }

 private:
  int errno_;
};

// CUDA is not there, or the driver or a kernel failed. Python: narrowgauge.CudaError (a narrowgauge.Error).
class CudaError : public Error {
 public:
  using Error::Error;
};

// Ranks of a collective do not agree, or one of them has gone. Python: narrowgauge.TransportError (a
// narrowgauge.Error).
class TransportError : public Error {
 public:
  using Error::Error;
};

// Another rank did not come in time. Python: TimeoutError.
class Timeout : public TransportError {
 public:
  using TransportError::TransportError;
};

// A file is not what it claims to be: truncated, altered or hostile. Python: narrowgauge.FileCorrupt (a ValueError).
class FileCorrupt : public Error {
 public:
  using Error::Error;
};

// A checkpoint could not be saved, or was asked for something that it does not hold. Python:
// narrowgauge.CheckpointError (a narrowgauge.Error).
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// A checkpoint is damaged or hostile: the message names file, tensor and chunk. Python: narrowgauge.CheckpointCorrupt
// (a narrowgauge.FileCorrupt).
class CheckpointCorrupt : public FileCorrupt {
 public:
  using FileCorrupt::FileCorrupt;
};

namespace detail {

inline std::string_view text_of(std::string_view text) noexcept { return text; }
template <std::integral T>
std::string text_of(T value) {
  if constexpr (std::same_as<T, char>) {
    return {value};
  } else {
    return std::to_string(value);
  }
}
std::string text_of(double value);  // six digits
std::string text_of_pointer(const void* value);
template <std::same_as<void> T>  // and not of characters
std::string text_of(const T* value) {
  return text_of_pointer(value);
}

}  // namespace detail

// Joins its arguments as text: concat("x has ", 3, " columns"). Not by a stream, which takes a fifth of the time that
// the library takes to compile.
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::string out;
  ((out += detail::text_of(parts)), ...);
  return out;
}

}  // namespace ng

// Throws ng::Kind with the joined message unless the condition holds. The message names the value seen and
// the value expected; the place in the source follows in brackets.
#define NG_CHECK(condition, Kind, ...)                                                      \
  do {                                                                                      \
    if (!(condition)) [[unlikely]] {                                                        \
      throw ::ng::Kind(::ng::concat(__VA_ARGS__, " [", __FILE_NAME__, ":", __LINE__, "]")); \
    }                                                                                       \
  } while (false)
