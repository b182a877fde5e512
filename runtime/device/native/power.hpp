// The battery and the heat of a device. As runtime/device/power.py.
#pragma once

#include <string>

#include "json.hpp"

namespace robx {

// {"source": mains, battery or unknown; "battery": percent, charging and celsius, or null} of the file system `root`;
// of this device ("") also as dumpsys tells, on Android, where sysfs is closed to the shell.
Json power(const std::string& root);

// How much Android slows the device down for heat, as a list of at most one flag; null where it does not say.
Json thermal_status();

}  // namespace robx
