// Numbers and pointers in the texts of errors.
#include "narrowgauge/error.hpp"

#include <array>
#include <cstdio>

namespace ng::detail {

std::string text_of(double value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%g", value);
  return text.data();
}

std::string text_of_pointer(const void* value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%p", value);
  return text.data();
}

}  // namespace ng::detail
