#include "describe.hpp"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <set>
#include <sstream>

#include "files.hpp"
#include "power.hpp"
#include "watch.hpp"

namespace robx {
namespace {

Json or_null(const std::optional<std::string>& text) { return text ? Json(*text) : Json(); }

std::string trim(const std::string& text) {
  const auto start = text.find_first_not_of(" \t");
  if (start == std::string::npos) return "";
  return text.substr(start, text.find_last_not_of(" \t\r") - start + 1);
}

// The first value of each field of /proc/cpuinfo, by its name in lower case.
std::map<std::string, std::string> cpu_fields(const std::string& cpuinfo) {
  std::map<std::string, std::string> fields;
  std::istringstream lines(cpuinfo);
  for (std::string line; std::getline(lines, line);) {
    const auto colon = line.find(':');
    std::string name = trim(line.substr(0, colon));
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    fields.emplace(name, colon == std::string::npos ? "" : trim(line.substr(colon + 1)));
  }
  return fields;
}

JsonArray numbers(const std::string& folder, const std::string& file) {
  JsonArray found;
  for (const auto& name : numbered(folder, "cpu")) {
    if (const auto number = read_number(folder + "/" + name + "/" + file)) found.push_back(std::int64_t{*number});
  }
  return found;
}

Json describe_cpu(const std::string& root, const std::string& cpuinfo) {
  static const std::set<std::string> kWanted = {"avx2",  "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "fma",
                                                "asimd", "asimddp", "i8mm",     "sve",         "bf16"};
  const auto fields = cpu_fields(cpuinfo);
  const auto first = [&](std::initializer_list<const char*> names) -> Json {
    for (const char* name : names) {
      const auto found = fields.find(name);
      if (found != fields.end() && !found->second.empty()) return found->second;
    }
    return nullptr;
  };
  std::set<std::string> flags;
  const Json listed = first({"flags", "features"});
  if (!listed.is_null()) {
    std::istringstream words(listed.as_string("flags"));
    for (std::string word; words >> word;) flags.insert(word);
  }
  JsonArray present;
  for (const auto& flag : kWanted) {
    if (flags.count(flag)) present.push_back(flag);
  }
  const std::string base = root + "/sys/devices/system/cpu";
  const auto turbo_off = read_text(base + "/intel_pstate/no_turbo"), boost = read_text(base + "/cpufreq/boost");
  cpu_set_t usable;
  const std::int64_t cores = ::sysconf(_SC_NPROCESSORS_ONLN);
  const bool known = ::sched_getaffinity(0, sizeof usable, &usable) == 0;
  return JsonObject{
      {"model", first({"model name", "hardware", "cpu part"})},
      {"cores", cores},
      {"usable_cores", known ? std::int64_t{CPU_COUNT(&usable)} : cores},
      {"flags", std::move(present)},
      {"microcode", first({"microcode"})},
      {"governor", or_null(read_text(base + "/cpu0/cpufreq/scaling_governor"))},
      {"max_khz", numbers(base, "cpufreq/cpuinfo_max_freq")},
      {"capacity", numbers(base, "cpu_capacity")},
      {"turbo", turbo_off ? Json(*turbo_off == "0") : boost ? Json(*boost == "1") : Json()},
      {"smt", or_null(read_text(base + "/smt/control"))},
      {"hypervisor", flags.count("hypervisor") > 0},
  };
}

Json os_name(const std::string& root, const utsname& system) {
  std::istringstream lines(read_text(root + "/etc/os-release").value_or(""));
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, 12, "PRETTY_NAME=") != 0) continue;
    const auto start = line.find_first_not_of('"', 12);
    return start == std::string::npos ? "" : line.substr(start, line.find_last_not_of('"') - start + 1);
  }
  const auto release = ask({"getprop", "ro.build.version.release"});
  return release ? "Android " + *release : std::string(system.sysname);
}

Json board(const std::string& root) {
  if (auto model = read_text(root + "/proc/device-tree/model"); model && !model->empty()) {
    model->erase(std::remove(model->begin(), model->end(), '\0'), model->end());
    return *model;
  }
  std::string phone;
  for (const char* key : {"ro.product.manufacturer", "ro.product.model", "ro.soc.model"}) {
    if (const auto name = ask({"getprop", key})) phone += (phone.empty() ? "" : " ") + *name;
  }
  return phone.empty() ? or_null(read_text(root + "/sys/class/dmi/id/product_name")) : Json(phone);
}

Json memory_bytes(const std::string& root) {
  std::istringstream lines(read_text(root + "/proc/meminfo").value_or(""));
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, 9, "MemTotal:") == 0) return std::int64_t{std::atoll(line.c_str() + 9)} * 1024;
  }
  return nullptr;
}

Json jetson(const std::string& root) {
  const auto release = read_text(root + "/etc/nv_tegra_release");
  if (!release) return nullptr;
  return JsonObject{{"release", release->substr(0, release->find('\n'))}, {"power_mode", or_null(ask({"nvpmodel", "-q"}))}};
}

Json watched(const std::string& root) {
  const Json sample = snapshot(root);
  const auto any = [&](const char* key) { return !sample.get(key, "snapshot").as_array(key).empty(); };
  const Json reason = energy(root).get("reason", "energy");
  const bool rails = !sample.get("milliwatt", "snapshot").is_null();
  return JsonObject{
      {"clocks", any("khz")},
      {"temperatures", any("celsius")},
      {"throttling", any("cooling") || !throttle_flags().is_null()},
      {"load", !sample.get("jiffies", "snapshot").is_null()},
      {"energy", rails || reason.is_null() ? Json("") : reason},
  };
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

std::string family(const std::string& machine) {
  for (const char* name : {"x86_64", "i386", "i686", "AMD64"}) {
    if (machine == name) return "x86";
  }
  return machine.compare(0, 3, "arm") == 0 || machine.compare(0, 7, "aarch64") == 0 ? "arm" : machine;
}

}  // namespace

Json describe(const std::string& root) {
  utsname system{};
  ::uname(&system);
  const std::string cpuinfo = read_text(root + "/proc/cpuinfo").value_or("");
  const Json supply = power(root);
  const auto exists = [&](const char* path) { return ::access((root + path).c_str(), F_OK) == 0; };
  return JsonObject{
      {"host", system.nodename},
      {"arch", system.machine},
      {"os", os_name(root, system)},
      {"kernel", system.release},
      {"python", nullptr},
      {"board", board(root)},
      {"cpu", describe_cpu(root, cpuinfo)},
      {"memory_bytes", memory_bytes(root)},
      {"accelerator", nullptr},  // the engines of this runner use the CPU
      {"container", exists("/.dockerenv") ? Json("docker") : exists("/run/.containerenv") ? Json("podman") : Json()},
      {"cgroup_cpu_max", or_null(read_text(root + "/sys/fs/cgroup/cpu.max"))},
      {"power_source", supply.get("source", "power")},
      {"battery", supply.get("battery", "power")},
      {"jetson", jetson(root)},
      {"emulated", emulation(root, system.machine, cpuinfo)},
      {"energy_counter", energy(root).get("source", "energy")},
      {"watched", watched(root)},
  };
}

Json emulation(const std::string& root, const std::string& machine, const std::string& cpuinfo) {
  const std::string comm = read_text(root + "/proc/self/comm").value_or("");
  if (comm.compare(0, 4, "qemu") == 0) return "the process is " + comm;
  const std::string kernel = read_text(root + "/proc/sys/kernel/arch").value_or("");
  if (!kernel.empty() && family(kernel) != family(machine))
    return "the kernel is " + kernel + " but the processor reports " + machine;
  if (family(machine) == "arm" && (has(cpuinfo, "GenuineIntel") || has(cpuinfo, "AuthenticAMD")))
    return "the processor reports " + machine + " but /proc/cpuinfo is that of an x86";
  if (has(cpuinfo, "QEMU TCG") || has(cpuinfo, "QEMU Virtual CPU")) return "/proc/cpuinfo names QEMU";
  return nullptr;
}

}  // namespace robx
