// The program that runs on a device without Python and measures one model.
//
//     robx_runner JOB.json
//     robx_runner --doctor [PACKAGE...]
//
// It takes the same job.json and images.npy as runtime/device/runner.py, works in the same folder under the same lock, and
// writes the same result.zip. The runtime's shared library is in the folder lib beside this program.
#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "clock.hpp"
#include "describe.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "files.hpp"
#include "job.hpp"
#include "json.hpp"
#include "measure.hpp"
#include "watch.hpp"

namespace robx {
namespace {

constexpr std::size_t kMostJobBytes = 16 << 20;
constexpr const char* kResult = "result.zip";
constexpr const char* kStale[] = {"outputs.npz", "samples.npy", "telemetry.jsonl", "result.json", kResult};
// Environment variables that may change an engine's threads or memory allocation.
constexpr const char* kEnvironment[] = {
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY",      "OMP_PROC_BIND",   "GOMP_CPU_AFFINITY", "KMP_AFFINITY",    "KMP_BLOCKTIME",
    "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD",      "GLIBC_TUNABLES",    "MALLOC_ARENA_MAX"};

// The folder `lib` beside this program.
std::string library_folder() {
  char path[4096];
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path);
  const std::string program = length > 0 ? std::string(path, static_cast<std::size_t>(length)) : "./";
  return program.substr(0, program.rfind('/')) + "/lib";
}

std::vector<int> usable_cores() {
  std::vector<int> cores;
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

std::string listed(const std::vector<int>& cores) {
  std::string text;
  for (const int core : cores) text += (text.empty() ? "" : ", ") + std::to_string(core);
  return "[" + text + "]";
}

// Pin this process and its future threads to `wanted`; returns the cores that it may use.
std::vector<int> pin(std::vector<int> wanted) {
  const std::vector<int> have = usable_cores();
  if (wanted.empty()) return have;
  std::sort(wanted.begin(), wanted.end());
  // The kernel accepts a set if any of its cores exists, and silently ignores the others.
  const bool available = std::includes(have.begin(), have.end(), wanted.begin(), wanted.end());
  if (!available) throw Error("cores " + listed(wanted) + " are not available: this process may use " + listed(have));
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : wanted) CPU_SET(core, &set);
  if (::sched_setaffinity(0, sizeof set, &set) != 0) throw Error("this system cannot pin a process to cores: leave out --affinity");
  return wanted;
}

// Wait until no sensor is more than 3 degrees above the reading of the first process, which it left in the parent folder.
Json cool_down(double limit) {
  constexpr const char* kShared = "../celsius.json";
  const auto state = [](double seconds, const std::optional<double>& celsius, bool reached) {
    return Json(JsonObject{{"seconds", seconds}, {"celsius", celsius ? Json(*celsius) : Json()}, {"reached", reached}});
  };
  std::optional<double> reading = hottest();
  if (!reading || ::access(kShared, F_OK) != 0) {
    if (reading) write_file(kShared, Json(*reading).dump());
    return state(0, reading, true);
  }
  const double wanted = parse_json(read_file(kShared, 100)).as_number("celsius.json") + 3;
  const double start = monotonic_seconds();
  const pid_t host = ::getppid();
  while (*reading > wanted && monotonic_seconds() - start < limit) {
    if (::getppid() != host) throw Error("the host's process is gone");
    ::sleep(1);
    reading = hottest().value_or(*reading);
  }
  return state(monotonic_seconds() - start, reading, *reading <= wanted);
}

Json used_environment() {
  JsonObject found;
  for (const char* name : kEnvironment) {
    if (const char* value = std::getenv(name)) found.emplace_back(name, value);
  }
  return found;
}

// Open the model, measure it, and add the device's facts and what the second process recorded.
Measurement run_job(const std::string& text) {
  const Job job = read_job(text);
  ::alarm(job.time_limit);  // the kernel ends a hung engine, even if the host is gone
  const Json facts = describe("");
  const std::vector<int> cores = pin(job.affinity);
  if (job.settings.threads > static_cast<int>(cores.size()) && !cores.empty())
    throw Error(std::to_string(job.settings.threads) + " threads on the cores " + listed(cores) + ": use at most " +
                std::to_string(cores.size()) + " threads");
  // On an emulated processor nothing is timed, so that no time can be mistaken for a result.
  const bool timed = job.latency && facts.get("emulated", "facts").is_null();
  const Json cooled = cool_down(job.cool_down_seconds);
  const Json flags = throttle_flags();
  Telemetry telemetry("telemetry.jsonl", job.affinity.empty() ? std::vector<int>{} : cores);
  Measurement found = measure(job, timed, library_folder());
  telemetry.stop();
  if (telemetry.started()) found.parts.emplace_back("telemetry.jsonl", read_file("telemetry.jsonl", 1 << 26));
  JsonArray numbers(cores.begin(), cores.end());
  const JsonObject more = {
      {"cores", cores.empty() ? Json() : Json(numbers)},
      {"environment", used_environment()},
      {"telemetry_process", telemetry.started()},
      {"cool_down", cooled},
      {"timed", timed},
      {"device", facts},
      {"throttled", new_flags(flags, throttle_flags())},
  };
  found.result.insert(found.result.end(), more.begin(), more.end());
  return found;
}

int run_alone(const std::string& job) {
  const int lock = ::open("lock", O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (lock < 0) throw Error("cannot write in the job's folder: " + std::string(std::strerror(errno)));
  if (::flock(lock, LOCK_EX | LOCK_NB) != 0) {
    // A runner that lost its host may still be running, and would write the same files.
    std::fputs("another runner is still working in this folder\n", stderr);
    return 1;
  }
  for (const char* stale : kStale) std::remove(stale);
  Measurement found;
  try {
    found = run_job(job);
  } catch (const std::exception& error) {
    const bool missing = dynamic_cast<const MissingLibrary*>(&error) != nullptr;
    found = {};
    found.result = {{"schema", 1}, {"error", first_line(error.what()).substr(0, 500)}, {"missing", missing}};
  }
  const bool failed = found.result[1].first == "error";
  found.parts.emplace_back("result.json", Json(std::move(found.result)).dump());
  write_file(kResult, stored_zip(found.parts));
  return failed ? 1 : 0;
}

int doctor(const std::vector<std::string>& packages) {
  JsonObject present;
  for (auto& runtime : find_runtimes(library_folder())) {
    if (std::find(packages.begin(), packages.end(), runtime.first) != packages.end()) present.push_back(std::move(runtime));
  }
  std::puts(Json(JsonObject{{"facts", describe("")}, {"packages", std::move(present)}}).dump().c_str());
  return 0;
}

int run(const std::vector<std::string>& arguments) {
  if (!arguments.empty() && arguments[0] == "--doctor") return doctor({arguments.begin() + 1, arguments.end()});
  if (arguments.size() == 2 && arguments[0] == "--describe") {  // the facts of a file system, for tests
    std::puts(describe(arguments[1]).dump().c_str());
    return 0;
  }
  if (arguments.size() != 1 || arguments[0].compare(0, 1, "-") == 0) {
    std::fputs("usage: robx_runner JOB.json | --doctor [PACKAGE...]\n", stderr);
    return 2;
  }
  const std::string job = read_file(arguments[0], kMostJobBytes);
  const auto slash = arguments[0].rfind('/');
  if (slash != std::string::npos && ::chdir(arguments[0].substr(0, slash + 1).c_str()) != 0)
    throw Error("cannot enter the job's folder: " + std::string(std::strerror(errno)));
  return run_alone(job);
}

}  // namespace
}  // namespace robx

int main(int count, char** values) {
  try {
    return robx::run({values + 1, values + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", robx::first_line(error.what()).c_str());
    return 1;
  }
}
