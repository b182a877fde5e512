// Describe the device. As runtime/device/describe.py, with null where the device does not say.
#pragma once

#include <string>

#include "json.hpp"

namespace robx {

// Plain values about the device whose file system is `root` ("" for this one; tests pass others).
Json describe(const std::string& root);

// Why this processor counts as emulated, or null. Latency measured on an emulator is meaningless.
Json emulation(const std::string& root, const std::string& machine, const std::string& cpuinfo);

}  // namespace robx
