// A strict JSON reader (RFC 8259) for hostile input, and the quoting that a writer needs.
//
// It is a pull reader: the caller asks for the value that it expects and nothing is built in between, so memory
// stays within what the caller keeps. Text must be UTF-8 without a byte order mark; a key may occur once per object;
// \u escapes must pair; trailing commas, comments and NaN are refused. Not a document model, not a formatter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>

namespace ng {

enum class JsonType : uint8_t { object, array, string, number, boolean, null };

struct JsonNumber {
  std::string_view text;           // as written
  std::optional<int64_t> integer;  // if written without fraction and exponent, and in range
  double real = 0;                 // the nearest double
};

// The text in double quotes for a message: control and non-UTF-8 bytes as \xNN, cut after 64 bytes.
std::string printable(std::string_view text);

// Reads one document from `text`, which must outlive it. Each call reads the next value, which must be of that type.
// Every error is a FileCorrupt with `source` (such as the file's path) and the byte offset. Not thread-safe.
class JsonReader {
 public:
  JsonReader(std::string_view text, std::string source, int max_depth = 64)
      : text_(text), source_(std::move(source)), max_depth_(max_depth) {}

  // The type of the next value, told by its first byte.
  JsonType peek();

  // Calls member(key) for each member in order; it must read exactly the member's value.
  template <typename F>
  void object(const F& member) {
    const size_t begin = open('{', "an object");
    std::set<std::string> keys;  // ordered, so that no choice of keys makes it quadratic
    for (bool first = true; more('}', first); first = false) {
      const auto [key, added] = keys.insert(string());
      if (!added) fail("key " + printable(*key) + " occurs twice");
      expect(':', "':'");
      member(*key);
    }
    close(begin);
  }

  // Calls element() for each element in order; it must read exactly that value.
  template <typename F>
  void array(const F& element) {
    const size_t begin = open('[', "an array");
    for (bool first = true; more(']', first); first = false) element();
    close(begin);
  }

  std::string string();
  JsonNumber number();
  bool boolean();
  void null();
  void skip();  // any value, checked all the same

  // Checks that only white space is left.
  void end();

  // Refuses the value that was read last: throws FileCorrupt with its offset.
  [[noreturn]] void fail(const std::string& message) const { fail_at(last_, message); }

 private:
  void skip_space() noexcept;
  bool next_is(char c) const noexcept { return position_ < text_.size() && text_[position_] == c; }
  void expect(char c, const char* what);
  size_t open(char bracket, const char* what);
  void close(size_t begin) noexcept;
  bool more(char bracket, bool first);
  bool take(std::string_view word) noexcept;
  void escape(std::string& out);
  uint32_t hex4();
  [[noreturn]] void fail_expected(const char* what) const;
  [[noreturn]] void fail_at(size_t position, const std::string& message) const;

  std::string_view text_;
  std::string source_;
  size_t position_ = 0;
  size_t last_ = 0;  // where the value that was read last begins
  int depth_ = 0;
  int max_depth_;
};

// The length of the UTF-8 sequence at the beginning of `text` (RFC 3629: shortest form, no surrogates, at most
// U+10FFFF), or 0 if there is none.
size_t utf8_length(std::string_view text) noexcept;

// The text as a JSON string, quotes included. pre: is_utf8(text).
std::string json_quote(std::string_view text);
bool is_utf8(std::string_view text) noexcept;

}  // namespace ng
