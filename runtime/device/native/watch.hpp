// Monitor the device while a model is timed: memory, energy, clocks, temperature, other load. As runtime/device/watch.py.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "json.hpp"

namespace robx {

// Resident bytes of this process, current and peak (VmRSS, VmHWM); null where the kernel does not report them.
Json memory(bool reset);

// Joules counted so far by the processor packages (RAPL), or the reason why there is no count. Counters wrap: given an
// earlier reading, a wrap since then is added back.
Json energy(const std::string& root, const Json& since = {});

// One sample: time, jiffies, clock frequencies, temperatures, throttling counters and power, of the file system `root`.
JsonObject snapshot(const std::string& root);

// Degrees Celsius of the hottest sensor; none where no sensor can be read.
std::optional<double> hottest();

// What limits the clock, according to the firmware of a Raspberry Pi or to Android; null on other devices.
Json throttle_flags();

// The current flags of `after`, and those of its "since boot" flags that `before` does not have.
Json new_flags(const Json& before, const Json& after);

// A second process that writes a snapshot five times a second until it is stopped or this process ends; it ends this
// process when the host that waits for it is gone. It avoids `cores` if there are others. Start it before any thread.
class Telemetry {
 public:
  Telemetry(const std::string& path, const std::vector<int>& cores);
  Telemetry(const Telemetry&) = delete;
  Telemetry& operator=(const Telemetry&) = delete;
  ~Telemetry() { stop(); }
  void stop();
  bool started() const { return started_; }

 private:
  pid_t child_ = -1;
  int pipe_ = -1;
  bool started_ = false;
};

}  // namespace robx
