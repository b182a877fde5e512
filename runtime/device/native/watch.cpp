#include "watch.hpp"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "clock.hpp"
#include "files.hpp"
#include "power.hpp"

namespace robx {
namespace {

constexpr int kIntervalMs = 200;

std::optional<long long> field(const std::string& text, const std::string& name) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, name.size(), name) == 0) return std::atoll(line.c_str() + name.size());
  }
  return std::nullopt;
}

JsonArray numbers(const std::string& folder, const std::string& prefix, const std::string& file, double divisor = 0) {
  JsonArray found;
  for (const auto& name : numbered(folder, prefix)) {
    if (const auto number = read_number(folder + "/" + name + "/" + file)) {
      found.push_back(divisor != 0 ? Json(static_cast<double>(*number) / divisor) : Json(std::int64_t{*number}));
    }
  }
  return found;
}

// Busy, stolen and total time of all cores, in ticks. User time already includes guest time.
Json jiffies(const std::string& root) {
  std::istringstream lines(read_text(root + "/proc/stat").value_or(""));
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, 4, "cpu ") != 0) continue;
    std::istringstream words(line.substr(4));
    std::int64_t n[8], total = 0;
    for (auto& value : n) {
      if (!(words >> value)) return nullptr;
      total += value;
    }
    return JsonObject{{"busy", n[0] + n[1] + n[2] + n[5] + n[6]}, {"steal", n[7]}, {"total", total}};
  }
  return nullptr;
}

// Power of a Jetson's input rails (INA3221 monitors): mV x mA.
Json milliwatts(const std::string& root) {
  double total = 0;
  bool seen = false;
  const std::string monitors = root + "/sys/class/hwmon";
  for (const auto& name : numbered(monitors, "hwmon")) {
    for (const std::string channel : {"1", "2", "3"}) {
      const std::string folder = monitors + "/" + name;
      const std::string label = read_text(folder + "/in" + channel + "_label").value_or("");
      const auto volts = read_number(folder + "/in" + channel + "_input");
      const auto amps = read_number(folder + "/curr" + channel + "_input");
      if (label.compare(0, 6, "VDD_IN") != 0 || !volts || !amps) continue;
      total += static_cast<double>(*volts) * static_cast<double>(*amps) / 1000;
      seen = true;
    }
  }
  return seen ? Json(total) : Json();
}

// A field of /proc/PID/stat, counted from the one after the command, which is in parentheses and may contain spaces.
std::optional<long long> stat_field(pid_t pid, int index) {
  const std::string text = read_text("/proc/" + std::to_string(pid) + "/stat").value_or("");
  const auto command_end = text.rfind(')');
  if (command_end == std::string::npos) return std::nullopt;
  std::istringstream words(text.substr(command_end + 1));
  std::string word;
  for (int i = 0; i <= index; ++i) words >> word;
  return words ? std::optional<long long>(std::atoll(word.c_str())) : std::nullopt;
}

long long process_jiffies(pid_t pid) { return stat_field(pid, 11).value_or(0) + stat_field(pid, 12).value_or(0); }

// Whether nobody is left to read this process's output: the connection that started it has ended.
bool hung_up() {
  pollfd output = {1, 0, 0};  // a pipe or socket with a closed end is always reported; a file or terminal never is
  return ::poll(&output, 1, 0) > 0 && (output.revents & (POLLHUP | POLLERR)) != 0;
}

void record(const std::string& path, int stop, pid_t measured, pid_t host) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (file == nullptr) return;
  while (true) {
    JsonObject sample = snapshot("");
    sample.emplace_back("own", std::int64_t{process_jiffies(measured) + process_jiffies(::getpid())});
    std::fputs((Json(std::move(sample)).dump() + "\n").c_str(), file);
    std::fflush(file);
    // The pipe becomes readable (end of file) when the measured process closes it or dies.
    pollfd ended = {stop, POLLIN, 0};
    if (::poll(&ended, 1, kIntervalMs) > 0) break;
    const auto parent = stat_field(measured, 1);
    if (hung_up() || (parent && *parent != host)) {
      ::kill(measured, SIGTERM);
      break;
    }
  }
  std::fclose(file);
}

}  // namespace

Json memory(bool reset) {
  bool refused = false;
  if (reset) {
    std::FILE* file = std::fopen("/proc/self/clear_refs", "w");
    refused = file == nullptr || std::fputs("5", file) < 0;
    if (file != nullptr) refused = std::fclose(file) != 0 || refused;
  }
  const std::string status = read_text("/proc/self/status").value_or("");
  const auto now = field(status, "VmRSS:"), peak = field(status, "VmHWM:");
  if (!now || !peak) return nullptr;
  return JsonObject{{"now", std::int64_t{*now * 1024}}, {"peak", std::int64_t{*peak * 1024}}, {"reset_refused", int{refused}}};
}

Json energy(const std::string& root, const Json& since) {
  const auto none = [](const std::string& reason) {
    return Json(JsonObject{{"source", nullptr}, {"joules", nullptr}, {"reason", reason}});
  };
  const std::string parent = root + "/sys/class/powercap";
  const auto zones = numbered(parent, "intel-rapl:");
  if (zones.empty()) return none("the device has no energy counter (RAPL)");
  double total = 0;
  JsonObject read;
  for (const auto& zone : zones) {
    const std::string folder = parent + "/" + zone;
    // The zone psys, the whole platform, includes the packages.
    if (zones.size() > 1 && read_text(folder + "/name") == "psys") continue;
    const auto count = read_number(folder + "/energy_uj");
    if (!count) return none("only root can read the energy counter " + folder + "/energy_uj");
    double joules = static_cast<double>(*count) / 1e6;
    if (!since.is_null() && !since.get("zones", "energy").is_null()) {
      const Json& earlier = since.get("zones", "energy").get(folder, "zones");
      if (!earlier.is_null() && joules < earlier.as_number("joules"))
        joules += static_cast<double>(read_number(folder + "/max_energy_range_uj").value_or(0)) / 1e6;
    }
    read.emplace_back(folder, joules);
    total += joules;
  }
  return JsonObject{{"source", "rapl"}, {"joules", total}, {"reason", nullptr}, {"zones", std::move(read)}};
}

JsonObject snapshot(const std::string& root) {
  const auto throttled = field(read_text(root + "/sys/fs/cgroup/cpu.stat").value_or(""), "nr_throttled");
  const std::string thermal = root + "/sys/class/thermal";
  return {
      {"t", monotonic_seconds()},
      {"jiffies", jiffies(root)},
      {"khz", numbers(root + "/sys/devices/system/cpu", "cpu", "cpufreq/scaling_cur_freq")},
      {"celsius", numbers(thermal, "thermal_zone", "temp", 1000)},
      {"cooling", numbers(thermal, "cooling_device", "cur_state")},
      {"cgroup_throttled", throttled ? Json(std::int64_t{*throttled}) : Json()},
      {"milliwatt", milliwatts(root)},
  };
}

std::optional<double> hottest() {
  std::optional<double> most;
  for (const auto& value : numbers("/sys/class/thermal", "thermal_zone", "temp", 1000)) {
    most = std::max(most.value_or(-1e9), value.as_number("celsius"));
  }
  return most;
}

Json throttle_flags() {
  const auto text = ask({"vcgencmd", "get_throttled"});
  if (!text) return thermal_status();
  const auto equals = text->find('=');
  if (equals == std::string::npos) return nullptr;
  char* end = nullptr;
  const unsigned long bits = std::strtoul(text->c_str() + equals + 1, &end, 16);
  if (end == text->c_str() + equals + 1 || *end != '\0') return nullptr;
  // Bits 0-3: now; 16-19: since boot.
  static constexpr const char* kNames[] = {"under-voltage", "frequency capped", "throttled", "soft temperature limit"};
  JsonArray now, since_boot;
  for (int bit = 0; bit < 4; ++bit) {
    if (bits >> bit & 1) now.push_back(kNames[bit]);
    if (bits >> (bit + 16) & 1) since_boot.push_back(std::string(kNames[bit]) + " since boot");
  }
  now.insert(now.end(), since_boot.begin(), since_boot.end());
  return now;
}

Json new_flags(const Json& before, const Json& after) {
  if (after.is_null()) return nullptr;
  JsonArray found;
  for (const auto& flag : after.as_array("flags")) {
    const std::string& text = flag.as_string("flag");
    bool old = false;
    if (text.find("since boot") != std::string::npos && !before.is_null()) {
      for (const auto& earlier : before.as_array("flags")) old = old || earlier.as_string("flag") == text;
    }
    if (!old) found.push_back(text);
  }
  return found;
}

Telemetry::Telemetry(const std::string& path, const std::vector<int>& cores) {
  int ends[2];
  if (::pipe(ends) != 0) return;
  const pid_t measured = ::getpid(), host = ::getppid();
  child_ = ::fork();
  if (child_ == 0) {
    ::close(ends[1]);
    ::signal(SIGALRM, SIG_DFL);
    cpu_set_t mine, others;
    if (::sched_getaffinity(0, sizeof mine, &mine) == 0) {
      others = mine;
      for (const int core : cores) CPU_CLR(core, &others);
      if (CPU_COUNT(&others) > 0) ::sched_setaffinity(0, sizeof others, &others);
    }
    record(path, ends[0], measured, host);
    ::_exit(0);
  }
  ::close(ends[0]);
  pipe_ = ends[1];
  started_ = child_ > 0;
  if (!started_) stop();
}

void Telemetry::stop() {
  if (pipe_ >= 0) ::close(pipe_);
  if (child_ > 0) ::waitpid(child_, nullptr, 0);
  pipe_ = -1;
  child_ = -1;
}

}  // namespace robx
