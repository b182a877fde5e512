// Files: read, hash, and write so that a reader never sees half of one. Kernel files, and tools on PATH.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace robx {

// The whole file. Throws Error if it cannot be read or has more than `most` bytes.
std::string read_file(const std::string& path, std::size_t most);

// Write to a temporary file beside `path`, then rename it. Throws Error, for example on a full disk.
void write_file(const std::string& path, std::string_view content);

// Hex SHA-256 of a file (FIPS 180-4), in sha256.cpp. Throws Error if it cannot be read.
std::string sha256_file(const std::string& path);

// Stripped text of a kernel file; none if it cannot be read.
std::optional<std::string> read_text(const std::string& path);

// The decimal integer that a kernel file contains; none if it contains anything else.
std::optional<long long> read_number(const std::string& path);

// Names of the entries of `folder`; none if it cannot be read.
std::vector<std::string> entries(const std::string& folder);

// Entries of `folder` named `prefix` followed by digits only, sorted by that number: cpu2 before cpu10.
std::vector<std::string> numbered(const std::string& folder, const std::string& prefix);

// What a tool prints, stripped; none if it is not on PATH, fails to run within 10 s, or prints nothing.
std::optional<std::string> ask(const std::vector<std::string>& command);

}  // namespace robx
