// The strict JSON reader: recursive descent over a string view, every index checked against its end.
#include "io/json.hpp"

#include <algorithm>
#include <charconv>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

constexpr size_t kQuotedBytes = 64;
constexpr const char* kHexDigits = "0123456789abcdef";

bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }
bool is_control(char c) noexcept { return static_cast<unsigned char>(c) < 0x20; }

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&out](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6);
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

}  // namespace

size_t utf8_length(std::string_view text) noexcept {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto continues = [&](size_t i) { return (byte(i) & 0xc0u) == 0x80u; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return text.empty() ? 0 : 1;
  if (lead < 0xc2) return 0;  // a continuation, or a longer form of an ASCII character
  if (lead < 0xe0) return continues(1) ? 2 : 0;
  if (lead < 0xf0) {
    const bool shortest = lead != 0xe0 || byte(1) >= 0xa0;
    const bool surrogate = lead == 0xed && byte(1) >= 0xa0;
    return continues(1) && continues(2) && shortest && !surrogate ? 3 : 0;
  }
  if (lead > 0xf4) return 0;
  const bool shortest = lead != 0xf0 || byte(1) >= 0x90;
  const bool in_range = lead != 0xf4 || byte(1) < 0x90;
  return continues(1) && continues(2) && continues(3) && shortest && in_range ? 4 : 0;
}

bool is_utf8(std::string_view text) noexcept {
  while (!text.empty()) {
    const size_t length = utf8_length(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

std::string json_quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (is_control(c)) {
      out += "\\u00";
      out += kHexDigits[static_cast<unsigned char>(c) >> 4];
      out += kHexDigits[static_cast<unsigned char>(c) & 15];
    } else {
      out += c;
    }
  }
  return out += '"';
}

std::string printable(std::string_view text) {
  std::string out = "\"";
  size_t position = 0;
  while (position < std::min(text.size(), kQuotedBytes)) {
    const size_t length = utf8_length(text.substr(position));
    if (length == 0 || is_control(text[position])) {
      const auto byte = static_cast<unsigned char>(text[position++]);
      out += "\\x";
      out += kHexDigits[byte >> 4];
      out += kHexDigits[byte & 15];
    } else {
      out += text.substr(position, length);
      position += length;
    }
  }
  return out += position < text.size() ? "...\"" : "\"";
}

JsonType JsonReader::peek() {
  skip_space();
  if (position_ < text_.size()) {
    switch (text_[position_]) {
      case '{': return JsonType::object;
      case '[': return JsonType::array;
      case '"': return JsonType::string;
      case 't':
      case 'f': return JsonType::boolean;
      case 'n': return JsonType::null;
      default:
        if (next_is('-') || is_digit(text_[position_])) return JsonType::number;
    }
  }
  fail_expected("a value");
}

std::string JsonReader::string() {
  skip_space();
  const size_t begin = position_;
  expect('"', "a string");
  std::string out;
  while (!next_is('"')) {
    if (position_ == text_.size()) fail_at(begin, "the string has no closing quote");
    if (is_control(text_[position_])) fail_expected("a string without control characters");
    if (next_is('\\')) {
      escape(out);
      continue;
    }
    const size_t length = utf8_length(text_.substr(position_));
    if (length == 0) fail_at(position_, "the string is not UTF-8");
    out += text_.substr(position_, length);
    position_ += length;
  }
  ++position_;
  last_ = begin;
  return out;
}

void JsonReader::escape(std::string& out) {
  const size_t begin = position_;
  constexpr std::string_view kLetters = "\"\\/bfnrtu";
  constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
  const size_t letter = position_ + 1 < text_.size() ? kLetters.find(text_[position_ + 1]) : std::string_view::npos;
  if (letter == std::string_view::npos)
    fail_at(begin, "unknown escape; the escapes are \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX");
  position_ += 2;
  if (letter < kValues.size()) {
    out += kValues[letter];
    return;
  }
  uint32_t code = hex4();
  if (code >= 0xd800 && code < 0xe000) {
    const bool high = code < 0xdc00 && text_.substr(position_, 2) == "\\u";
    if (high) position_ += 2;
    const uint32_t low = high ? hex4() : 0;
    if (low < 0xdc00 || low >= 0xe000) fail_at(begin, "the escape is half of a surrogate pair");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  append_utf8(out, code);
}

uint32_t JsonReader::hex4() {
  const std::string_view digits = text_.substr(position_, 4);
  uint32_t code = 0;
  const char* const first = digits.data();
  const char* const last = first + digits.size();
  const auto [end, error] = std::from_chars(first, last, code, 16);
  if (digits.size() < 4 || error != std::errc() || end != last) fail_expected("four hexadecimal digits");
  position_ += 4;
  return code;
}

JsonNumber JsonReader::number() {
  skip_space();
  const size_t begin = position_;
  const auto digits = [this] {
    if (position_ == text_.size() || !is_digit(text_[position_])) fail_expected("a digit");
    while (position_ < text_.size() && is_digit(text_[position_])) ++position_;
  };
  if (next_is('-')) ++position_;
  if (next_is('0')) {
    ++position_;
    if (position_ < text_.size() && is_digit(text_[position_])) fail_at(begin, "the number has a leading zero");
  } else {
    digits();
  }
  bool integral = true;
  if (next_is('.')) {
    integral = false;
    ++position_;
    digits();
  }
  if (next_is('e') || next_is('E')) {
    integral = false;
    ++position_;
    if (next_is('+') || next_is('-')) ++position_;
    digits();
  }
  last_ = begin;

  JsonNumber out;
  out.text = text_.substr(begin, position_ - begin);
  const char* const first = out.text.data();
  const char* const last = first + out.text.size();
  int64_t integer = 0;
  if (integral && std::from_chars(first, last, integer).ec == std::errc()) out.integer = integer;
  if (std::from_chars(first, last, out.real).ec != std::errc()) {
    fail("number " + printable(out.text) + " is outside the range of a double");
  }
  return out;
}

bool JsonReader::boolean() {
  skip_space();
  last_ = position_;
  if (take("true")) return true;
  if (take("false")) return false;
  fail_expected("true or false");
}

void JsonReader::null() {
  skip_space();
  last_ = position_;
  if (!take("null")) fail_expected("null");
}

void JsonReader::skip() {
  switch (peek()) {
    case JsonType::object: return object([this](const std::string&) { skip(); });
    case JsonType::array: return array([this] { skip(); });
    case JsonType::string: string(); return;
    case JsonType::number: number(); return;
    case JsonType::boolean: boolean(); return;
    case JsonType::null: return null();
  }
}

void JsonReader::end() {
  skip_space();
  if (position_ != text_.size()) fail_expected("the end of the document");
}

void JsonReader::skip_space() noexcept {
  while (next_is(' ') || next_is('\n') || next_is('\r') || next_is('\t')) ++position_;
}

void JsonReader::expect(char c, const char* what) {
  skip_space();
  if (!next_is(c)) fail_expected(what);
  ++position_;
}

size_t JsonReader::open(char bracket, const char* what) {
  expect(bracket, what);
  const size_t begin = position_ - 1;
  if (++depth_ > max_depth_) fail_at(begin, concat("values are nested deeper than ", max_depth_));
  return begin;
}

void JsonReader::close(size_t begin) noexcept {
  --depth_;
  last_ = begin;
}

// After the opening bracket or a value: true if another value follows, false after the closing bracket.
bool JsonReader::more(char bracket, bool first) {
  skip_space();
  if (next_is(bracket)) {
    ++position_;
    return false;
  }
  if (!first) expect(',', bracket == '}' ? "',' or '}'" : "',' or ']'");
  return true;
}

bool JsonReader::take(std::string_view word) noexcept {
  if (text_.substr(position_, word.size()) != word) return false;
  position_ += word.size();
  return true;
}

void JsonReader::fail_expected(const char* what) const {
  const bool at_end = position_ == text_.size();
  const size_t length = at_end ? 0 : std::max<size_t>(utf8_length(text_.substr(position_)), 1);
  fail_at(position_, concat("expected ", what, ", found ",
                            at_end ? "the end of the text" : printable(text_.substr(position_, length))));
}

void JsonReader::fail_at(size_t position, const std::string& message) const {
  throw FileCorrupt(concat(source_, ": ", message, " (JSON byte ", position, ")"));
}

}  // namespace ng
