// JSON values: a strict reader for job.json, and the writer of result.json.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace robx {

class Json;
using JsonArray = std::vector<Json>;
using JsonObject = std::vector<std::pair<std::string, Json>>;  // in the order in which the keys were written

// One JSON value. The typed accessors throw Error, with the name `where`, if the value has another type.
class Json {
 public:
  Json(std::nullptr_t = nullptr) {}
  Json(bool value) : value_(value) {}
  Json(int value) : value_(std::int64_t{value}) {}
  Json(std::int64_t value) : value_(value) {}
  Json(std::size_t value) : value_(static_cast<std::int64_t>(value)) {}
  Json(double value) : value_(value) {}
  Json(const char* value) : value_(std::string(value)) {}
  Json(std::string value) : value_(std::move(value)) {}
  Json(JsonArray value) : value_(std::move(value)) {}
  Json(JsonObject value) : value_(std::move(value)) {}

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool as_bool(std::string_view where) const;
  std::int64_t as_int(std::string_view where) const;
  double as_number(std::string_view where) const;  // an integer or a finite floating-point number
  const std::string& as_string(std::string_view where) const;
  const JsonArray& as_array(std::string_view where) const;
  const JsonObject& as_object(std::string_view where) const;

  // The value of a key of an object; null if there is none.
  const Json& get(std::string_view key, std::string_view where) const;

  // One line of ASCII or UTF-8; bytes that are not UTF-8 become U+FFFD, infinity and NaN become null.
  std::string dump() const;

 private:
  void write(std::string& out) const;
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, JsonArray, JsonObject> value_;
};

// Parse RFC 8259 text. Throws Error: it is not valid JSON, repeats a key, nests more than 64 levels deep, or has a
// number that neither int64 nor a finite double can hold.
Json parse_json(std::string_view text);

}  // namespace robx
