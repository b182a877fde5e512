#include "json.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "error.hpp"

namespace robx {
namespace {

constexpr int kMaxDepth = 64;

void append_utf8(std::string& out, std::uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

// Length in bytes of the UTF-8 sequence at the start of `text`; 0 if it is not valid (Unicode, table 3-7).
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const unsigned second = byte(1);
  const bool overlong = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
  const bool surrogate_or_beyond = (first == 0xED && second >= 0xA0) || (first == 0xF4 && second >= 0x90);
  return overlong || surrogate_or_beyond ? 0 : length;
}

void write_string(std::string& out, std::string_view text) {
  out += '"';
  while (!text.empty()) {
    const auto c = static_cast<unsigned char>(text[0]);
    std::size_t length = 1;
    if (c == '"' || c == '\\') {
      out += '\\';
      out += text[0];
    } else if (c < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else if ((length = utf8_length(text)) != 0) {
      out += text.substr(0, length);
    } else {
      out += "\\ufffd";
      length = 1;
    }
    text.remove_prefix(length);
  }
  out += '"';
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    skip_space();
    if (at_ < text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error("invalid JSON at byte " + std::to_string(at_) + ": " + what);
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
      ++at_;
  }

  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected ") + c);
  }

  Json literal(std::string_view word, Json value) {
    if (text_.substr(at_, word.size()) != word) fail("unknown word");
    at_ += word.size();
    return value;
  }

  Json parse(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    skip_space();
    if (at_ >= text_.size()) fail("unexpected end");
    switch (text_[at_]) {
      case '{': return object(depth);
      case '[': return array(depth);
      case '"': return string();
      case 't': return literal("true", true);
      case 'f': return literal("false", false);
      case 'n': return literal("null", nullptr);
      default: return number();
    }
  }

  Json object(int depth) {
    JsonObject found;
    expect('{');
    skip_space();
    if (take('}')) return found;
    do {
      skip_space();
      std::string key = string();
      for (const auto& [name, value] : found) {
        if (name == key) fail("repeated key " + key.substr(0, 40));
      }
      skip_space();
      expect(':');
      found.emplace_back(std::move(key), parse(depth + 1));
      skip_space();
    } while (take(','));
    expect('}');
    return found;
  }

  Json array(int depth) {
    JsonArray found;
    expect('[');
    skip_space();
    if (take(']')) return found;
    do {
      found.push_back(parse(depth + 1));
      skip_space();
    } while (take(','));
    expect(']');
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (true) {
      if (at_ >= text_.size()) fail("unterminated string");
      const char c = text_[at_];
      if (c == '"') break;
      if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
      if (c == '\\') {
        ++at_;
        escape(found);
        continue;
      }
      const std::size_t length = utf8_length(text_.substr(at_));
      if (length == 0) fail("invalid UTF-8");
      found += text_.substr(at_, length);
      at_ += length;
    }
    ++at_;
    return found;
  }

  void escape(std::string& found) {
    if (at_ >= text_.size()) fail("unterminated string");
    const char c = text_[at_++];
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    if (const auto i = kNames.find(c); i != std::string_view::npos) {
      found += kMeanings[i];
      return;
    }
    if (c != 'u') fail("unknown escape");
    std::uint32_t code = hex4();
    if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const std::uint32_t low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail("invalid surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xD800 && code <= 0xDFFF) {
      fail("invalid surrogate pair");
    }
    append_utf8(found, code);
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = at_ < text_.size() ? text_[at_] : '\0';
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) fail("invalid \\u escape");
      code = code << 4 | static_cast<std::uint32_t>(digit);
    }
    return code;
  }

  std::size_t digits() {
    const std::size_t start = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return at_ - start;
  }

  Json number() {
    const std::size_t start = at_;
    take('-');
    const std::size_t first = at_;
    const std::size_t whole = digits();
    if (whole == 0 || (whole > 1 && text_[first] == '0')) fail("not a value");
    bool integer = true;
    if (take('.')) {
      integer = false;
      if (digits() == 0) fail("not a number");
    }
    if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      ++at_;
      integer = false;
      if (!take('+')) take('-');
      if (digits() == 0) fail("not a number");
    }
    const std::string token(text_.substr(start, at_ - start));
    if (integer) {
      if (whole > 18) fail("number too large");
      return std::int64_t{std::strtoll(token.c_str(), nullptr, 10)};
    }
    const double value = std::strtod(token.c_str(), nullptr);
    if (!std::isfinite(value)) fail("number too large");
    return value;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

[[noreturn]] void wrong_type(std::string_view where, const char* kind) {
  throw Error(std::string(where) + " is not " + kind);
}

}  // namespace

bool Json::as_bool(std::string_view where) const {
  if (const auto* value = std::get_if<bool>(&value_)) return *value;
  wrong_type(where, "true or false");
}

std::int64_t Json::as_int(std::string_view where) const {
  if (const auto* value = std::get_if<std::int64_t>(&value_)) return *value;
  wrong_type(where, "an integer");
}

double Json::as_number(std::string_view where) const {
  if (const auto* value = std::get_if<std::int64_t>(&value_)) return static_cast<double>(*value);
  if (const auto* value = std::get_if<double>(&value_)) return *value;
  wrong_type(where, "a number");
}

const std::string& Json::as_string(std::string_view where) const {
  if (const auto* value = std::get_if<std::string>(&value_)) return *value;
  wrong_type(where, "a string");
}

const JsonArray& Json::as_array(std::string_view where) const {
  if (const auto* value = std::get_if<JsonArray>(&value_)) return *value;
  wrong_type(where, "a list");
}

const JsonObject& Json::as_object(std::string_view where) const {
  if (const auto* value = std::get_if<JsonObject>(&value_)) return *value;
  wrong_type(where, "an object");
}

const Json& Json::get(std::string_view key, std::string_view where) const {
  static const Json kNull;
  for (const auto& [name, value] : as_object(where)) {
    if (name == key) return value;
  }
  return kNull;
}

std::string Json::dump() const {
  std::string out;
  write(out);
  return out;
}

void Json::write(std::string& out) const {
  if (is_null()) {
    out += "null";
  } else if (const auto* flag = std::get_if<bool>(&value_)) {
    out += *flag ? "true" : "false";
  } else if (const auto* integer = std::get_if<std::int64_t>(&value_)) {
    out += std::to_string(*integer);
  } else if (const auto* number = std::get_if<double>(&value_)) {
    char digits[32] = "null";
    if (std::isfinite(*number)) std::snprintf(digits, sizeof digits, "%.17g", *number);
    out += digits;
  } else if (const auto* text = std::get_if<std::string>(&value_)) {
    write_string(out, *text);
  } else if (const auto* items = std::get_if<JsonArray>(&value_)) {
    out += '[';
    for (std::size_t i = 0; i < items->size(); ++i) {
      if (i) out += ", ";
      (*items)[i].write(out);
    }
    out += ']';
  } else if (const auto* members = std::get_if<JsonObject>(&value_)) {
    out += '{';
    for (std::size_t i = 0; i < members->size(); ++i) {
      if (i) out += ", ";
      write_string(out, (*members)[i].first);
      out += ": ";
      (*members)[i].second.write(out);
    }
    out += '}';
  }
}

Json parse_json(std::string_view text) { return Parser(text).document(); }

}  // namespace robx
