// Random edits of a text, for the fixed mutations that every build runs.
#pragma once

#include <random>
#include <span>
#include <string>
#include <string_view>

namespace ng::fuzz {

// One to four edits: flipped bits, erased and repeated runs, words of the language, changed digits, another text's end.
inline std::string mutate(std::string text, std::span<const std::string> corpus,
                          std::span<const std::string_view> words, std::mt19937_64& random) {
  const auto below = [&](size_t limit) { return static_cast<size_t>(random() % limit); };
  for (size_t edits = 1 + below(4); edits > 0; --edits) {
    const size_t at = below(text.size() + 1);
    switch (below(6)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 1: text.erase(at, 1 + below(8)); break;
      case 2: text.insert(at, words[below(words.size())]); break;
      case 3: text.insert(at, text.substr(below(text.size() + 1), 1 + below(40))); break;
      case 4: {
        // One digit: the mutation that keeps the syntax and breaks the sizes.
        const size_t digit = text.find_first_of("0123456789", at);
        if (digit != std::string::npos) text[digit] = static_cast<char>('0' + below(10));
        break;
      }
      default: {
        const std::string& other = corpus[below(corpus.size())];
        text = text.substr(0, at) + other.substr(below(other.size() + 1));
      }
    }
  }
  return text;
}

}  // namespace ng::fuzz
