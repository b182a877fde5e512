// The clocks of a measurement; the host compares their readings with those of runner.py, which uses the same ones.
#pragma once

#include <time.h>

#include <cstdint>

namespace robx {

inline std::int64_t nanoseconds(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

inline std::int64_t monotonic_ns() { return nanoseconds(CLOCK_MONOTONIC); }
inline double monotonic_seconds() { return static_cast<double>(monotonic_ns()) / 1e9; }
inline double wall_seconds() { return static_cast<double>(nanoseconds(CLOCK_REALTIME)) / 1e9; }
inline double cpu_seconds() { return static_cast<double>(nanoseconds(CLOCK_PROCESS_CPUTIME_ID)) / 1e9; }

}  // namespace robx
