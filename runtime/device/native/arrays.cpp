#include "arrays.hpp"

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>

#include "error.hpp"

namespace robx {
namespace {

constexpr std::int64_t kMostBytes = std::int64_t{1} << 31;

static_assert(
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    true
#else
    false
#endif
    ,
    ".npy and .zip are written in the machine's byte order, which has to be little-endian");

std::uint32_t crc32(std::string_view data) {
  static const auto table = [] {
    std::array<std::uint32_t, 256> entries{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
      entries[i] = value;
    }
    return entries;
  }();
  std::uint32_t crc = 0xFFFFFFFF;
  for (const char c : data) crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xFF];
  return crc ^ 0xFFFFFFFF;
}

template <typename T>
void append(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// The value of a key in a .npy header, up to the comma or bracket that ends it: {'descr': '<f4', 'shape': (64, 3), }.
std::string_view header_value(std::string_view header, std::string_view key) {
  const std::string quoted = "'" + std::string(key) + "':";
  const auto start = header.find(quoted);
  if (start == std::string_view::npos || header.find(quoted, start + 1) != std::string_view::npos) return {};
  std::string_view rest = header.substr(start + quoted.size());
  rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
  const auto end = !rest.empty() && rest[0] == '(' ? rest.find(')') : rest.find_first_of(",}");
  return rest.substr(0, end);
}

// Four positive dimensions from "(64, 3, 224, 224"; empty if it is anything else, or more than kMostBytes of floats.
std::vector<std::int64_t> parse_shape(std::string_view text) {
  std::vector<std::int64_t> shape;
  if (text.empty() || text[0] != '(') return {};
  text.remove_prefix(1);
  std::int64_t product = sizeof(float);
  while (!text.empty()) {
    std::int64_t size = 0;
    std::size_t digits = 0;
    for (; digits < text.size() && text[digits] >= '0' && text[digits] <= '9' && digits < 10; ++digits)
      size = size * 10 + (text[digits] - '0');
    if (digits == 0 || size < 1 || size > kMostBytes / product) return {};
    product *= size;
    shape.push_back(size);
    text.remove_prefix(digits);
    if (!text.empty() && text[0] != ',') return {};
    text.remove_prefix(std::min<std::size_t>(text.find_first_not_of(", "), text.size()));
  }
  return shape.size() == 4 ? shape : std::vector<std::int64_t>{};
}

}  // namespace

Images read_images(const std::string& path) {
  const auto refuse = [&](const char* what) { return Error(path + " is not a float32 (N, 3, H, W) .npy file: " + what); };
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw Error("cannot open " + path + ": " + std::strerror(errno));
  unsigned char start[12];
  if (std::fread(start, 1, 10, file.get()) != 10 || std::memcmp(start, "\x93NUMPY", 6) != 0) throw refuse("no .npy header");
  std::size_t length = start[8] | std::size_t{start[9]} << 8;
  if (start[6] != 1) {
    if (start[6] > 3 || std::fread(start + 10, 1, 2, file.get()) != 2) throw refuse("unknown version");
    length |= std::size_t{start[10]} << 16 | std::size_t{start[11]} << 24;
  }
  if (length > 4096) throw refuse("the header is too long");
  std::string header(length, '\0');
  if (std::fread(header.data(), 1, length, file.get()) != length) throw refuse("the header is truncated");
  if (header_value(header, "descr") != "'<f4'") throw refuse("another type");
  if (header_value(header, "fortran_order") != "False") throw refuse("not in C order");
  Images images;
  images.shape = parse_shape(header_value(header, "shape"));
  if (images.shape.empty()) throw refuse("another shape");
  std::size_t count = 1;
  for (const auto size : images.shape) count *= static_cast<std::size_t>(size);
  images.values.resize(count);
  if (std::fread(images.values.data(), sizeof(float), count, file.get()) != count) throw refuse("it is truncated");
  if (std::fgetc(file.get()) != EOF) throw refuse("there are bytes after the values");
  return images;
}

std::string npy(const char* descr, const std::vector<std::int64_t>& shape, std::string_view bytes) {
  std::string header = "{'descr': '" + std::string(descr) + "', 'fortran_order': False, 'shape': (";
  for (const auto size : shape) header += std::to_string(size) + ",";
  header += "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');  // the values start at a multiple of 64 bytes
  header += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  append(out, static_cast<std::uint16_t>(header.size()));
  out += header;
  out += bytes;
  return out;
}

std::string stored_zip(const std::vector<std::pair<std::string, std::string>>& files) {
  std::string out, directory;
  for (const auto& [name, content] : files) {
    if (out.size() + content.size() > 0xFFFF0000u) throw Error("the results are larger than 4 GB: use fewer images");
    // Version 2.0, no flags, stored, 1980-01-01 00:00, then the fields that both headers share.
    std::string common;
    for (const int field : {20, 0, 0, 0, 0x21}) append(common, static_cast<std::uint16_t>(field));
    append(common, crc32(content));
    append(common, static_cast<std::uint32_t>(content.size()));
    append(common, static_cast<std::uint32_t>(content.size()));
    append(common, static_cast<std::uint16_t>(name.size()));
    append(common, std::uint16_t{0});
    directory += std::string("PK\x01\x02\x14\x00", 6) + common;
    for (int i = 0; i < 3; ++i) append(directory, std::uint16_t{0});  // no comment, disk 0, no internal attributes
    append(directory, std::uint32_t{0100644} << 16);
    append(directory, static_cast<std::uint32_t>(out.size()));
    directory += name;
    out += std::string("PK\x03\x04", 4) + common + name + content;
  }
  const auto offset = static_cast<std::uint32_t>(out.size());
  out += directory;
  out += std::string("PK\x05\x06\x00\x00\x00\x00", 8);
  append(out, static_cast<std::uint16_t>(files.size()));
  append(out, static_cast<std::uint16_t>(files.size()));
  append(out, static_cast<std::uint32_t>(directory.size()));
  append(out, offset);
  append(out, std::uint16_t{0});
  return out;
}

}  // namespace robx
