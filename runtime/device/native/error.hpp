// What went wrong, in one line for the host.
#pragma once

#include <stdexcept>
#include <string>

namespace robx {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The runtime's library is not on the device, or cannot be loaded there.
struct MissingLibrary : Error {
  using Error::Error;
};

inline std::string first_line(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return "unknown error";
  return text.substr(begin, text.find_first_of("\r\n", begin) - begin);
}

}  // namespace robx
