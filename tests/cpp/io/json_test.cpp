// The strict JSON reader: what RFC 8259 allows is read, everything else is refused with the place.
#include "io/json.hpp"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

using namespace std::string_literals;

// The message of the FileCorrupt that reading the whole text throws; empty if it is valid.
std::string error_of(std::string_view text) {
  try {
    JsonReader reader(text, "f");
    reader.skip();
    reader.end();
  } catch (const FileCorrupt& error) {
    return error.what();
  }
  return "";
}

std::string string_of(std::string_view text) {
  JsonReader reader(text, "f");
  std::string out = reader.string();
  reader.end();
  return out;
}

JsonNumber number_of(std::string_view text) {
  JsonReader reader(text, "f");
  JsonNumber out = reader.number();
  reader.end();
  return out;
}

TEST(Json, AcceptsWhatTheStandardAllows) {
  for (const char* text : {
           "{}",
           "[]",
           " [ ] ",
           "\t\r\n{ }\n",
           "0",
           "-0",
           "-1",
           "10",
           "1.5",
           "-0.0",
           "1e5",
           "1E+5",
           "1e-5",
           "0e0",
           "true",
           "false",
           "null",
           "\"\"",
           "[1,2 , 3]",
           "[[],{}]",
           "{\"a\":1,\"b\":[null]}",
           "{\"\":0}",
           "{\"a\":{\"a\":{\"a\":1}}}",
           "\"\x7f\"",
           "\"\xc2\x80\"",
           "\"\xe2\x82\xac\"",
           "\"\xf0\x9f\x98\x80\"",
           "\"\xf4\x8f\xbf\xbf\"",
           "\"\xed\x9f\xbf\"",
           "\"\xef\xbf\xbf\"",
           "\"\\u0000\"",
           "\"\\uD83D\\uDE00\"",
           "123456789012345678901234567890",
           "[9223372036854775807,-9223372036854775808]",
       }) {
    EXPECT_EQ(error_of(text), "") << text;
  }
}

TEST(Json, RefusesEverythingElse) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "expected a value, found the end of the text (JSON byte 0)"},
      {"  ", "(JSON byte 2)"},
      {"\xef\xbb\xbf{}", "expected a value"},
      {"{", "expected a string, found the end"},
      {"[", "expected a value, found the end"},
      {"[1", "expected ',' or ']', found the end"},
      {"[1,]", "expected a value, found \"]\" (JSON byte 3)"},
      {"[,1]", "expected a value"},
      {"[1 2]", "expected ',' or ']', found \"2\""},
      {"[1}", "expected ',' or ']'"},
      {"{\"a\"}", "expected ':'"},
      {"{\"a\":}", "expected a value"},
      {"{\"a\":1,}", "expected a string"},
      {"{,}", "expected a string"},
      {"{a:1}", "expected a string, found \"a\""},
      {"{'a':1}", "expected a string"},
      {"{1:1}", "expected a string"},
      {"{\"a\":1 \"b\":2}", "expected ',' or '}'"},
      {"{\"a\":1}}", "expected the end of the document, found \"}\" (JSON byte 7)"},
      {"{} {}", "expected the end of the document"},
      {"{}\0"s, "expected the end of the document, found \"\\x00\""},
      {"// c\n{}", "expected a value"},
      {"{\"a\":1,\"a\":2}", "key \"a\" occurs twice (JSON byte 7)"},
      {"{\"a\":1,\"\\u0061\":2}", "key \"a\" occurs twice"},
      {"{\"x\":{\"a\":1,\"b\":2,\"a\":3}}", "key \"a\" occurs twice"},
      {"tru", "expected true or false"},
      {"True", "expected a value"},
      {"truefalse", "expected the end"},
      {"nul", "expected null"},
      {"NaN", "expected a value"},
      {"Infinity", "expected a value"},
      {"-Infinity", "expected a digit"},
      {"+1", "expected a value"},
      {"-", "expected a digit, found the end"},
      {"01", "leading zero"},
      {"-01", "leading zero"},
      {"00", "leading zero"},
      {"1.", "expected a digit"},
      {".5", "expected a value"},
      {"1.e5", "expected a digit"},
      {"1e", "expected a digit"},
      {"1e+", "expected a digit"},
      {"0x10", "expected the end"},
      {"1_000", "expected the end"},
      {"1e999", "outside the range of a double"},
      {"\"", "no closing quote (JSON byte 0)"},
      {"\"abc", "no closing quote"},
      {"\"a\nb\"", "without control characters"},
      {"\"a\tb\"", "without control characters"},
      {"\"\0\""s, "without control characters"},
      {"\"\\", "unknown escape"},
      {"\"\\\"", "no closing quote"},
      {"\"\\x41\"", "unknown escape"},
      {"\"\\'\"", "unknown escape"},
      {"\"\\u12\"", "four hexadecimal digits"},
      {"\"\\u12g4\"", "four hexadecimal digits"},
      {"\"\\u-123\"", "four hexadecimal digits"},
      {"\"\\u", "four hexadecimal digits"},
      {"\"\\uD83D\"", "half of a surrogate pair (JSON byte 1)"},
      {"\"\\uD83Dx\"", "half of a surrogate pair"},
      {"\"\\uD83D\\u0041\"", "half of a surrogate pair"},
      {"\"\\uD83D\\uD83D\"", "half of a surrogate pair"},
      {"\"\\uDE00\"", "half of a surrogate pair"},
      {"\"\x80\"", "not UTF-8 (JSON byte 1)"},
      {"\"\xff\"", "not UTF-8"},
      {"\"\xc0\x80\"", "not UTF-8"},          // overlong NUL
      {"\"\xc1\xbf\"", "not UTF-8"},          // overlong
      {"\"\xe0\x9f\xbf\"", "not UTF-8"},      // overlong
      {"\"\xf0\x8f\xbf\xbf\"", "not UTF-8"},  // overlong
      {"\"\xed\xa0\x80\"", "not UTF-8"},      // surrogate
      {"\"\xf4\x90\x80\x80\"", "not UTF-8"},  // above U+10FFFF
      {"\"\xf5\x80\x80\x80\"", "not UTF-8"},
      {"\"\xc2\"", "not UTF-8"},
      {"\"\xe2\x82\"", "not UTF-8"},
      {"\"\xf0\x9f\x98", "not UTF-8"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string message = error_of(text);
    EXPECT_NE(message.find(expected), std::string::npos) << printable(text) << " gave: " << message;
    EXPECT_TRUE(message.starts_with("f: ")) << message;
  }
}

TEST(Json, LimitsDepth) {
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(error_of(nested(64)), "");
  EXPECT_NE(error_of(nested(65)).find("nested deeper than 64 (JSON byte 64)"), std::string::npos);
  EXPECT_NE(error_of(std::string(1'000'000, '[')).find("nested deeper"), std::string::npos);
  // Depth counts open values, not all values.
  std::string wide = "[";
  for (int i = 0; i < 1000; ++i) wide += "[],{},";
  EXPECT_EQ(error_of(wide + "0]"), "");
}

TEST(Json, DecodesStrings) {
  EXPECT_EQ(string_of(R"("a\"\\\/\b\f\n\r\tz")"), "a\"\\/\b\f\n\r\tz");
  EXPECT_EQ(string_of(R"("\u0041\u00e9\u20AC\ud83d\ude00\u0000")"), "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\0"s);
  EXPECT_EQ(string_of("\"\xe2\x82\xac\""), "\xe2\x82\xac");
  EXPECT_EQ(string_of(R"("\udbff\udfff")"), "\xf4\x8f\xbf\xbf");
}

TEST(Json, QuotesStringsSoThatTheyReadBack) {
  std::string all;
  for (int c = 0; c < 128; ++c) all += static_cast<char>(c);
  all += "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80";
  EXPECT_EQ(string_of(json_quote(all)), all);
  EXPECT_EQ(json_quote("a\"b\\c\n\x1f"), "\"a\\\"b\\\\c\\u000a\\u001f\"");
}

TEST(Json, ReadsNumbersExactly) {
  EXPECT_EQ(number_of("9223372036854775807").integer, INT64_MAX);
  EXPECT_EQ(number_of("-9223372036854775808").integer, INT64_MIN);
  EXPECT_EQ(number_of("9223372036854775808").integer, std::nullopt);
  EXPECT_EQ(number_of("9223372036854775808").real, 0x1p63);
  EXPECT_EQ(number_of("1.0").integer, std::nullopt);
  EXPECT_EQ(number_of("1e2").integer, std::nullopt);
  EXPECT_EQ(number_of("1e2").real, 100.0);
  EXPECT_EQ(number_of("-0").integer, 0);
  EXPECT_EQ(number_of("0.1").real, 0.1);
  EXPECT_EQ(number_of(" -12.50e1 ").text, "-12.50e1");
}

TEST(Json, VisitsMembersAndElementsInOrder) {
  JsonReader reader(R"({"b":[1,2,3],"a":{"x":true,"y":null}})", "f");
  std::string order;
  reader.object([&](const std::string& key) {
    order += key;
    if (reader.peek() == JsonType::array) {
      reader.array([&] { order += std::to_string(*reader.number().integer); });
    } else {
      reader.object([&](const std::string& inner) {
        order += inner;
        if (inner == "x") {
          order += reader.boolean() ? "T" : "F";
        } else {
          reader.null();
        }
      });
    }
  });
  reader.end();
  EXPECT_EQ(order, "b123axTy");
}

TEST(Json, RefusesAnotherTypeThanAsked) {
  const auto message = [](const auto& read, const char* text) -> std::string {
    JsonReader reader(text, "f");
    try {
      read(reader);
    } catch (const FileCorrupt& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message([](JsonReader& r) { r.string(); }, " 1"), "f: expected a string, found \"1\" (JSON byte 1)");
  EXPECT_EQ(message([](JsonReader& r) { r.number(); }, "\"1\""), "f: expected a digit, found \"\"\" (JSON byte 0)");
  EXPECT_EQ(message([](JsonReader& r) { r.boolean(); }, "1"), "f: expected true or false, found \"1\" (JSON byte 0)");
  EXPECT_EQ(message([](JsonReader& r) { r.array([] {}); }, "{}"), "f: expected an array, found \"{\" (JSON byte 0)");
}

TEST(Json, MessagesStayPrintableAndShort) {
  EXPECT_EQ(printable("a\nb\xff\xc3\xa9"), "\"a\\x0ab\\xff\xc3\xa9\"");
  EXPECT_EQ(printable(std::string(100, 'x')), "\"" + std::string(64, 'x') + "...\"");
}

}  // namespace
}  // namespace ng
