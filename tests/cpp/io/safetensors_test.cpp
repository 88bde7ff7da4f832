// Safetensors files: what is written reads back, and no altered, truncated or hostile file gets through.
#include "narrowgauge/io.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <numeric>
#include <utility>

#include "io/safetensors_header.hpp"
#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"

namespace ng {
namespace {

using namespace std::string_literals;

// Bytes 0, 1, 2, ... for tensors to borrow.
std::span<const std::byte> some_bytes(size_t count) {
  static const std::vector<std::byte> all = [] {
    std::vector<std::byte> out(4096);
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::byte>(i * 7 + i / 256);
    return out;
  }();
  return std::span(all).first(count);
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A file's text from its JSON header and data.
std::string file_of(const std::string& json, const std::string& data) {
  std::string out(8, '\0');
  for (size_t i = 0; i < 8; ++i) out[i] = static_cast<char>(json.size() >> 8 * i & 0xff);
  return out + json + data;
}

template <typename Kind, typename F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const Kind& error) {
    return error.what();
  }
  return "";
}

std::string parse_error(const std::string& json, size_t data_bytes) {
  return message_of<FileCorrupt>([&] { parse_safetensors_header(json, some_bytes(data_bytes), "f"); });
}

std::string open_error(const std::string& text) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x.safetensors";
  write_text(path, text);
  const std::string message = message_of<FileCorrupt>([&] { SafetensorsFile{path}; });
  EXPECT_TRUE(message.empty() || message.starts_with(path + ": ")) << message;
  return message;
}

std::string write_error(const std::vector<FileTensor>& tensors, const std::map<std::string, std::string>& metadata) {
  const TemporaryDirectory directory;
  const std::string message =
      message_of<InvalidArgument>([&] { write_safetensors(directory / "x.safetensors", tensors, metadata); });
  EXPECT_EQ(directory.entries(), message.empty() ? 1u : 0u);
  return message;
}

TEST(Safetensors, EveryDTypeReadsBackAlignedInFileOrder) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x.safetensors";
  const std::vector<FileTensor> tensors = {
      {"bool", "BOOL", {3}, some_bytes(3)},
      {"u8", "U8", {2, 3}, some_bytes(6)},
      {"i8", "I8", {1}, some_bytes(1)},
      {"e5m2", "F8_E5M2", {5}, some_bytes(5)},
      {"e4m3", "F8_E4M3", {5}, some_bytes(5)},
      {"e8m0", "F8_E8M0", {7}, some_bytes(7)},
      {"f4", "F4", {3, 2}, some_bytes(3)},
      {"f6a", "F6_E2M3", {4}, some_bytes(3)},
      {"f6b", "F6_E3M2", {8, 1}, some_bytes(6)},
      {"i16", "I16", {3}, some_bytes(6)},
      {"u16", "U16", {3}, some_bytes(6)},
      {"f16", "F16", {1, 1, 1}, some_bytes(2)},
      {"bf16", "BF16", {5}, some_bytes(10)},
      {"i32", "I32", {2}, some_bytes(8)},
      {"u32", "U32", {2}, some_bytes(8)},
      {"f32", "F32", {}, some_bytes(4)},
      {"f64", "F64", {2}, some_bytes(16)},
      {"i64", "I64", {1}, some_bytes(8)},
      {"u64", "U64", {1}, some_bytes(8)},
      {"c64", "C64", {1}, some_bytes(8)},
      {"empty", "F32", {0, 5}, {}},
      {"", "U8", {1}, some_bytes(1)},
      {"a \"quoted\"\n\xe2\x82\xac name", "U8", {1}, some_bytes(1)},
  };
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"a\"\\\n", "\x01\xf0\x9f\x98\x80"}, {"", ""}};
  write_safetensors(path, tensors, metadata);

  const SafetensorsFile file(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const FileTensor& expected : tensors) {
    const FileTensor* found = file.find(expected.name);
    ASSERT_NE(found, nullptr) << expected.name;
    EXPECT_EQ(found->dtype, expected.dtype);
    EXPECT_EQ(found->shape, expected.shape);
    EXPECT_EQ(text_of(found->bytes), text_of(expected.bytes)) << expected.name;
  }
  EXPECT_EQ(file.find("nothing"), nullptr);

  // By falling element size, then as given; the data begins at a multiple of 64.
  std::vector<std::string> names;
  for (const FileTensor& tensor : file.tensors()) names.push_back(tensor.name);
  EXPECT_EQ(names.front(), "f64");
  EXPECT_EQ(std::vector(names.begin() + 4, names.begin() + 8), (std::vector{"i32"s, "u32"s, "f32"s, "empty"s}));
  EXPECT_EQ(std::vector(names.end() - 3, names.end()), (std::vector{"f6a"s, "f6b"s, "f4"s}));
  const auto address = [&](const char* name) { return reinterpret_cast<uintptr_t>(file.find(name)->bytes.data()); };
  EXPECT_EQ(address("f64") % 64, 0u);
  for (const char* name : {"i64", "u64", "c64"}) EXPECT_EQ(address(name) % 8, 0u) << name;
  for (const char* name : {"i32", "u32", "f32"}) EXPECT_EQ(address(name) % 4, 0u) << name;
  for (const char* name : {"i16", "u16", "f16", "bf16"}) EXPECT_EQ(address(name) % 2, 0u) << name;
}

TEST(Safetensors, AFileWithoutTensorsIsValid) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "x", {}, {});
  EXPECT_EQ(read_text(directory / "x"), file_of("{}" + std::string(54, ' '), ""));
  const SafetensorsFile file(directory / "x");
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_TRUE(file.metadata().empty());
}

TEST(Safetensors, ViewsSurviveAMoveAndTheReplacementOfTheFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  write_safetensors(path, std::vector<FileTensor>{{"a", "U8", {100}, some_bytes(100)}}, {});
  SafetensorsFile first(path);
  const std::span<const std::byte> view = first.find("a")->bytes;
  // The source of a write may be a view of the file that it replaces.
  write_safetensors(path, std::vector<FileTensor>{{"b", "U8", {50}, view.subspan(50)}}, {});
  SafetensorsFile second(std::move(first));
  EXPECT_EQ(text_of(view), text_of(some_bytes(100)));
  EXPECT_EQ(second.find("a")->bytes.data(), view.data());
  second = SafetensorsFile(path);
  EXPECT_EQ(second.find("a"), nullptr);
  EXPECT_EQ(text_of(second.find("b")->bytes), text_of(some_bytes(100).subspan(50)));
}

TEST(Safetensors, ReadsHeadersThatOthersWrite) {
  // Unpadded, spaced, keys and tensors in any order, an unknown key, empty tensors between, unaligned data.
  const std::string json =
      R"({ "b" : {"shape":[2],"extra":{"x":[1,null]},"data_offsets":[3,5],"dtype":"U8"},)"
      R"("zero":{"dtype":"I64","shape":[0],"data_offsets":[3,3]},"__metadata__":{},)"
      R"("a":{"dtype":"U8","shape":[3,1],"data_offsets":[0,3]},"end":{"dtype":"F16","shape":[4,0],"data_offsets":[5,5]}})";
  const SafetensorsHeader header = parse_safetensors_header(json + "  ", some_bytes(5), "f");
  std::string order;
  for (const FileTensor& tensor : header.tensors) order += tensor.name + " ";
  EXPECT_EQ(order, "a zero b end ");
  EXPECT_EQ(text_of(header.tensors[2].bytes), text_of(some_bytes(5).subspan(3)));
}

TEST(Safetensors, RefusesMalformedHeaders) {
  const auto entry = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"x\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
  };
  struct Case {
    std::string json;
    size_t data_bytes;
    const char* expected;
  };
  const std::vector<Case> cases = {
      {"", 0, "does not begin with '{'"},
      {" {}", 0, "does not begin with '{'"},
      {"[]", 0, "does not begin with '{'"},
      {"{}x", 0, "expected the end of the document"},
      {"{}\0"s, 0, "expected the end of the document"},
      {"{", 0, "found the end of the text"},
      {"{}", 1, "the tensors take 0 data bytes, but the file has 1"},
      {"{\"x\":1}", 0, "expected an object"},
      {"{\"x\":null}", 0, "expected an object"},
      {"{\"x\":[]}", 0, "expected an object"},
      {"{\"x\":{}}", 0, "tensor \"x\" has no dtype"},
      {"{\"x\":{\"dtype\":\"U8\"}}", 0, "has no shape"},
      {"{\"x\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "has no data_offsets"},
      {"{\"x\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "\"dtype\" occurs twice"},
      {"{\"__metadata__\":null}", 0, "expected an object"},
      {"{\"__metadata__\":{\"a\":1}}", 0, "expected a string"},
      {"{\"__metadata__\":{\"a\":null}}", 0, "expected a string"},
      {"{\"__metadata__\":{\"a\":{}}}", 0, "expected a string"},
      {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "\"a\" occurs twice"},
      {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "\"__metadata__\" occurs twice"},
      {entry("1", "[1]", "[0,1]"), 1, "expected a string"},
      {entry("\"\"", "[1]", "[0,1]"), 1, "unknown dtype \"\"; the dtypes are BOOL,"},
      {entry("\"u8\"", "[1]", "[0,1]"), 1, "unknown dtype \"u8\""},
      {entry("\"F128\"", "[1]", "[0,16]"), 16, "unknown dtype \"F128\""},
      {entry("\"U8\"", "1", "[0,1]"), 1, "expected an array"},
      {entry("\"U8\"", "[-1]", "[0,1]"), 1, "expected an integer in [0, 2^63), found \"-1\""},
      {entry("\"U8\"", "[1.0]", "[0,1]"), 1, "found \"1.0\""},
      {entry("\"U8\"", "[1e0]", "[0,1]"), 1, "found \"1e0\""},
      {entry("\"U8\"", "[\"1\"]", "[0,1]"), 1, "expected a digit"},
      {entry("\"U8\"", "[[1]]", "[0,1]"), 1, "expected a digit"},
      {entry("\"U8\"", "[9223372036854775808]", "[0,1]"), 1, "found \"9223372036854775808\""},
      {entry("\"U8\"", "[1]", "[]"), 1, "data_offsets []; expected [begin, end]"},
      {entry("\"U8\"", "[1]", "[0]"), 1, "expected [begin, end]"},
      {entry("\"U8\"", "[1]", "[0,1,2]"), 1, "expected [begin, end]"},
      {entry("\"U8\"", "[1]", "[1,0]"), 1, "data_offsets [1, 0]; expected [begin, end]"},
      {entry("\"U8\"", "[1]", "[-1,0]"), 1, "expected an integer in [0, 2^63)"},
      {entry("\"U8\"", "[1]", "[0,18446744073709551616]"), 1, "expected an integer in [0, 2^63)"},
      {entry("\"U8\"", "[2]", "[0,1]"), 1, "has 1 bytes, but shape [2] of U8 takes 2"},
      {entry("\"U8\"", "[]", "[0,0]"), 0, "has 0 bytes, but shape [] of U8 takes 1"},
      {entry("\"F32\"", "[1]", "[0,1]"), 1, "takes 4"},
      {entry("\"F4\"", "[3]", "[0,2]"), 2, "has 12 bits, not whole bytes"},
      {entry("\"F6_E2M3\"", "[2]", "[0,2]"), 2, "has 12 bits, not whole bytes"},
      // Products that wrap to the byte range that is there.
      {entry("\"U8\"", "[4294967296,4294967296]", "[0,0]"), 0, "overflows 64 bits"},
      {entry("\"F64\"", "[2305843009213693952]", "[0,0]"), 0, "overflows 64 bits"},
      {entry("\"F32\"", "[2147483648,2147483648,2,2]", "[0,0]"), 0, "overflows 64 bits"},
      {entry("\"F32\"", "[0,4294967296,4294967296]", "[0,0]"), 0, "overflows 64 bits"},
      {entry("\"U8\"", "[1152921504606846976]", "[0,1152921504606846976]"), 1, "but the file has 1 data bytes"},
      {entry("\"U8\"", "[2]", "[0,2]"), 1, "ends at data byte 2, but the file has 1 data bytes"},
      {entry("\"U8\"", "[1]", "[0,1]"), 2, "the tensors take 1 data bytes, but the file has 2"},
      {entry("\"U8\"", "[1]", "[1,2]"), 2, "begins at data byte 1; expected 0"},
      {entry("\"U8\"", "[0]", "[1,1]"), 1, "begins at data byte 1; expected 0"},
      // A hole, an overlap, the same bytes twice, a tensor inside another.
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3, "tensor \"b\" begins at data byte 2; expected 1"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, "tensor \"b\" begins at data byte 1; expected 2"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1, "begins at data byte 0; expected 1"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}})",
       3, "begins at data byte 1; expected 3"},
      {"{\"x\":" + std::string(100, '['), 0, "expected an object"},
      {"{\"x\":{\"y\":" + std::string(100, '['), 0, "nested deeper than 64"},
  };
  for (const Case& each : cases) {
    const std::string message = parse_error(each.json, each.data_bytes);
    EXPECT_NE(message.find(each.expected), std::string::npos) << each.json << " gave: " << message;
    EXPECT_TRUE(message.starts_with("f: ")) << message;
    // The same through a file.
    EXPECT_NE(open_error(file_of(each.json, text_of(some_bytes(each.data_bytes)))), "") << each.json;
  }
}

TEST(Safetensors, RefusesFilesThatAreTooShortOrClaimTooMuch) {
  EXPECT_NE(open_error("").find("the file has 0 bytes"), std::string::npos);
  EXPECT_NE(open_error("\2\0\0\0\0\0\0"s).find("the file has 7 bytes"), std::string::npos);
  EXPECT_NE(open_error(std::string(8, '\0')).find("does not begin with '{'"), std::string::npos);
  EXPECT_NE(open_error("\2\0\0\0\0\0\0\0{"s).find("header's length is 2, but the file has 9 bytes"), std::string::npos);
  EXPECT_NE(open_error(std::string(100, '\xff')).find("18446744073709551615; at most 100000000"), std::string::npos);
  EXPECT_NE(open_error("\x01\xe1\xf5\x05\0\0\0\0{}"s).find("100000001; at most 100000000"), std::string::npos);
  EXPECT_NE(open_error("\x00\xe1\xf5\x05\0\0\0\0{}"s).find("but the file has 10 bytes"), std::string::npos);
  EXPECT_NE(open_error("PK\3\4 a zip archive, such as a torch file").find("not a safetensors file?"),
            std::string::npos);
  EXPECT_EQ(open_error("\2\0\0\0\0\0\0\0{}"s), "");
}

TEST(Safetensors, RefusesEveryTruncationOfAFile) {
  const TemporaryDirectory directory;
  const std::string path = directory / "x";
  write_safetensors(path, std::vector<FileTensor>{{"a", "U8", {10}, some_bytes(10)}, {"b", "F32", {3}, some_bytes(12)}},
                    {{"k", "v"}});
  const std::string whole = read_text(path);
  for (size_t length = 0; length < whole.size(); ++length) {
    EXPECT_NE(open_error(whole.substr(0, length)), "") << length;
  }
  EXPECT_NE(open_error(whole + "x"), "");
}

TEST(Safetensors, OpeningSomethingElseIsAClearError) {
  const TemporaryDirectory directory;
  const auto errno_of = [](const std::string& path) {
    try {
      SafetensorsFile{path};
    } catch (const SystemError& error) {
      EXPECT_NE(std::string(error.what()).find("cannot open " + path), std::string::npos) << error.what();
      return error.errno_value();
    }
    return 0;
  };
  EXPECT_EQ(errno_of(directory / "missing"), ENOENT);
  EXPECT_EQ(errno_of(directory.path().string()), EISDIR);
  EXPECT_EQ(errno_of(""), ENOENT);
  ASSERT_EQ(mkfifo((directory / "fifo").c_str(), 0600), 0);
  EXPECT_THROW(SafetensorsFile{directory / "fifo"}, FileCorrupt);  // and does not wait for a writer
  EXPECT_THROW(SafetensorsFile{"/dev/zero"}, FileCorrupt);
  EXPECT_THROW(SafetensorsFile{"a\0b"s}, InvalidArgument);
  if (geteuid() != 0) {
    write_text(directory / "secret", "");
    ASSERT_EQ(chmod((directory / "secret").c_str(), 0), 0);
    EXPECT_EQ(errno_of(directory / "secret"), EACCES);
  }
}

TEST(Safetensors, ErrorsLeakNoDescriptors) {
  const auto descriptors = [] {
    const std::filesystem::directory_iterator all("/proc/self/fd");
    return std::distance(begin(all), end(all));
  };
  const TemporaryDirectory directory;
  write_text(directory / "bad", "\2\0\0\0\0\0\0\0[]"s);
  const auto before = descriptors();
  for (int i = 0; i < 5; ++i) {
    EXPECT_THROW(SafetensorsFile{directory / "bad"}, FileCorrupt);
    EXPECT_THROW(write_safetensors(directory / "no/where", {}, {}), SystemError);
    EXPECT_THROW(write_safetensors(directory.path().string(), {}, {}), SystemError);
    write_safetensors(directory / "good", {}, {});
    const SafetensorsFile good(directory / "good");
  }
  EXPECT_EQ(descriptors(), before);
}

TEST(Safetensors, RefusesToWriteWhatCouldNotBeRead) {
  const auto one = [](const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
                      size_t bytes) { return write_error({{name, dtype, shape, some_bytes(bytes)}}, {}); };
  EXPECT_EQ(one("a", "U8", {2, 2}, 4), "");
  EXPECT_NE(one("a", "U8", {2, 2}, 5).find("tensor \"a\" has 5 bytes, but shape [2, 2] of U8 takes 4"),
            std::string::npos);
  EXPECT_NE(one("a", "uint8", {1}, 1).find("unknown dtype \"uint8\"; the dtypes are BOOL, F4,"), std::string::npos);
  EXPECT_NE(one("a", "U8", {-1}, 1).find("negative axis in shape [-1]"), std::string::npos);
  EXPECT_NE(one("a", "U8", {int64_t{1} << 32, int64_t{1} << 32}, 0).find("overflows"), std::string::npos);
  EXPECT_NE(one("a", "F4", {3}, 2).find("12 bits, not whole bytes"), std::string::npos);
  EXPECT_NE(one("__metadata__", "U8", {1}, 1).find("is taken by the format"), std::string::npos);
  EXPECT_NE(one("a\xff", "U8", {1}, 1).find("tensor name \"a\\xff\" is not UTF-8"), std::string::npos);
  EXPECT_NE(write_error({{"a", "U8", {1}, some_bytes(1)}, {"a", "U8", {1}, some_bytes(1)}}, {})
                .find("two tensors are named \"a\""),
            std::string::npos);
  EXPECT_NE(write_error({}, {{"a", "\xc0\x80"}}).find("metadata \"a\": \"\\xc0\\x80\" is not UTF-8"),
            std::string::npos);
  std::string long_text;
  long_text.resize(kMaxHeaderBytes, 'x');
  EXPECT_NE(write_error({}, {{"a", long_text}}).find("safetensors allows 100000000"), std::string::npos);
}

}  // namespace
}  // namespace ng
