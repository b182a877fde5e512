#include "files.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "clock.hpp"
#include "error.hpp"

namespace robx {
namespace {

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

File open_or_throw(const std::string& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode));
  if (!file) throw Error("cannot open " + path + ": " + std::strerror(errno));
  return file;
}

std::string strip(std::string text) {
  const auto is_space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  while (!text.empty() && is_space(text.back())) text.pop_back();
  std::size_t start = 0;
  while (start < text.size() && is_space(text[start])) ++start;
  return text.substr(start);
}

bool on_path(const std::string& tool) {
  const char* path = std::getenv("PATH");
  std::string_view rest = path ? path : "/bin:/usr/bin";
  while (true) {
    const auto colon = rest.find(':');
    if (::access((std::string(rest.substr(0, colon)) + "/" + tool).c_str(), X_OK) == 0) return true;
    if (colon == std::string_view::npos) return false;
    rest.remove_prefix(colon + 1);
  }
}

}  // namespace

std::string read_file(const std::string& path, std::size_t most) {
  const File file = open_or_throw(path, "rb");
  std::string content;
  char chunk[65536];
  std::size_t got;
  while ((got = std::fread(chunk, 1, sizeof chunk, file.get())) > 0) {
    content.append(chunk, got);
    if (content.size() > most) throw Error(path + " has more than " + std::to_string(most) + " bytes");
  }
  if (std::ferror(file.get())) throw Error("cannot read " + path + ": " + std::strerror(errno));
  return content;
}

void write_file(const std::string& path, std::string_view content) {
  const std::string temporary = path + ".tmp";
  File file = open_or_throw(temporary, "wb");
  const bool written = std::fwrite(content.data(), 1, content.size(), file.get()) == content.size();
  // Closing writes the rest, so it may find the disk full, too.
  if (std::fclose(file.release()) != 0 || !written || std::rename(temporary.c_str(), path.c_str()) != 0)
    throw Error("cannot write " + path + ": " + std::strerror(errno));
}

std::optional<std::string> read_text(const std::string& path) {
  try {
    return strip(read_file(path, 1 << 22));
  } catch (const Error&) {
    return std::nullopt;
  }
}

std::optional<long long> read_number(const std::string& path) {
  const auto text = read_text(path);
  if (!text || text->empty()) return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text->c_str(), &end, 10);
  if (*end != '\0' || errno != 0) return std::nullopt;
  return value;
}

std::vector<std::string> entries(const std::string& folder) {
  std::vector<std::string> found;
  DIR* directory = ::opendir(folder.c_str());
  if (directory == nullptr) return found;
  while (const dirent* entry = ::readdir(directory)) {
    if (entry->d_name[0] != '.') found.emplace_back(entry->d_name);
  }
  ::closedir(directory);
  return found;
}

std::vector<std::string> numbered(const std::string& folder, const std::string& prefix) {
  std::vector<std::string> found;
  for (const auto& name : entries(folder)) {
    const bool matches = name.size() > prefix.size() && name.compare(0, prefix.size(), prefix) == 0 &&
                         name.find_first_not_of("0123456789", prefix.size()) == std::string::npos;
    if (matches) found.push_back(name);
  }
  std::sort(found.begin(), found.end(), [](const std::string& a, const std::string& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  });
  return found;
}

std::optional<std::string> ask(const std::vector<std::string>& command) {
  int ends[2];
  if (!on_path(command[0]) || ::pipe(ends) != 0) return std::nullopt;
  std::vector<char*> arguments;
  for (const auto& argument : command) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    const int none = ::open("/dev/null", O_RDWR);
    ::dup2(none, 0);
    ::dup2(ends[1], 1);
    ::dup2(none, 2);
    ::close(ends[0]);
    ::execvp(arguments[0], arguments.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  std::string text;
  const double limit = monotonic_seconds() + 10;
  while (child > 0 && text.size() < (1 << 20)) {
    pollfd ready = {ends[0], POLLIN, 0};
    char chunk[4096];
    const double left = limit - monotonic_seconds();
    if (left <= 0 || ::poll(&ready, 1, static_cast<int>(left * 1000) + 1) <= 0) {
      ::kill(child, SIGKILL);
      text.clear();
      break;
    }
    const ssize_t got = ::read(ends[0], chunk, sizeof chunk);
    if (got <= 0) break;
    text.append(chunk, static_cast<std::size_t>(got));
  }
  ::close(ends[0]);
  if (child > 0) ::waitpid(child, nullptr, 0);
  text = strip(text);
  if (text.empty()) return std::nullopt;
  return text;
}

}  // namespace robx
