// Arrays as NumPy's .npy files, and the stored (uncompressed) zip archives that hold results.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace robx {

struct Images {
  std::vector<float> values;           // (count, channels, height, width), row-major
  std::vector<std::int64_t> shape;     // its four dimensions
  std::size_t count() const { return static_cast<std::size_t>(shape[0]); }
  std::size_t each() const { return values.size() / count(); }  // values of one image
};

// Read a little-endian float32 .npy of four dimensions in C order. Throws Error if it is anything else.
Images read_images(const std::string& path);

// A .npy file of version 1.0; `descr` is NumPy's type ("<f4", "<i8", "|b1") and `bytes` the values in C order.
std::string npy(const char* descr, const std::vector<std::int64_t>& shape, std::string_view bytes);

// A zip archive of (name, content), not compressed. Throws Error above 4 GB, which would need ZIP64.
std::string stored_zip(const std::vector<std::pair<std::string, std::string>>& files);

template <typename T>
std::string_view bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

}  // namespace robx
