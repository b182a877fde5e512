#include "power.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <sstream>

#include "files.hpp"

namespace robx {
namespace {

using Fields = std::map<std::string, std::string>;

std::optional<long long> number(const std::string& text) {
  const char* start = text.c_str();
  char* end = nullptr;
  const long long value = std::strtoll(start, &end, 10);
  if (end == start || *end != '\0') return std::nullopt;
  return value;
}

// The first value of each "name: value" line.
Fields fields_of(const std::string& text) {
  Fields fields;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const auto colon = line.find(':'), start = line.find_first_not_of(" \t");
    if (colon == std::string::npos || start > colon) continue;
    const auto value = line.find_first_not_of(" \t", colon + 1), last = line.find_last_not_of(" \t\r");
    fields.emplace(line.substr(start, colon - start), value == std::string::npos ? "" : line.substr(value, last - value + 1));
  }
  return fields;
}

std::string get(const Fields& fields, const std::string& name) {
  const auto found = fields.find(name);
  return found == fields.end() ? "" : found->second;
}

Json describe_battery(std::optional<long long> percent, const Json& charging, std::optional<long long> tenths) {
  return JsonObject{{"percent", percent ? Json(std::int64_t{*percent}) : Json()},
                    {"charging", charging},
                    {"celsius", tenths ? Json(static_cast<double>(*tenths) / 10) : Json()}};
}

Json sysfs_battery(const std::string& root) {
  const std::string folder = root + "/sys/class/power_supply";
  auto supplies = entries(folder);
  std::sort(supplies.begin(), supplies.end());
  for (const auto& supply : supplies) {
    const auto read = [&](const char* file) { return read_text(folder + "/" + supply + "/" + file).value_or(""); };
    // The scope of a mouse's or a keyboard's battery is Device.
    if (read("type") != "Battery" || read("scope") == "Device") continue;
    const std::string status = read("status");
    const bool charging = status == "Charging" || status == "Full";
    const bool known = charging || status == "Discharging" || status == "Not charging";
    return describe_battery(number(read("capacity")), known ? Json(charging) : Json(), number(read("temp")));
  }
  return nullptr;
}

Json result(const std::string& source, const Json& battery) { return JsonObject{{"source", source}, {"battery", battery}}; }

Json from_dumpsys(const Fields& fields) {
  bool any = false, powered = false;
  for (const auto& [name, value] : fields) {
    const bool tells = name.size() > 8 && name.compare(name.size() - 8, 8, " powered") == 0;
    any = any || tells;
    powered = powered || (tells && value == "true");
  }
  const std::string source = powered ? "mains" : any ? "battery" : "unknown";
  if (get(fields, "present") != "true") return result(source, nullptr);
  const auto level = number(get(fields, "level"));
  const long long scale = number(get(fields, "scale")).value_or(100);
  // android.os.BatteryManager: 1 unknown, 2 charging, 3 discharging, 4 not charging, 5 full.
  const std::string status = get(fields, "status");
  const bool charging = status == "2" || status == "5", known = charging || status == "3" || status == "4";
  std::optional<long long> percent;
  if (level) percent = std::llrint(100.0 * static_cast<double>(*level) / static_cast<double>(scale != 0 ? scale : 100));
  return result(source, describe_battery(percent, known ? Json(charging) : Json(), number(get(fields, "temperature"))));
}

}  // namespace

Json power(const std::string& root) {
  const Json battery = sysfs_battery(root);
  if (battery.is_null() && root.empty()) {
    if (const auto dumped = ask({"dumpsys", "battery"})) return from_dumpsys(fields_of(*dumped));
  }
  const std::string folder = root + "/sys/class/power_supply";
  for (const auto& supply : entries(folder)) {
    if (read_number(folder + "/" + supply + "/online").value_or(0) != 0) return result("mains", battery);
  }
  const bool discharging = !battery.is_null() && battery.get("charging", "battery").dump() == "false";
  return result(discharging ? "battery" : "unknown", battery);
}

Json thermal_status() {
  // android.os.PowerManager.THERMAL_STATUS_*, from 1 on: the device slows down.
  static constexpr const char* kHeat[] = {"light", "moderate", "severe", "critical", "emergency", "shutdown"};
  const auto status = number(get(fields_of(ask({"dumpsys", "thermalservice"}).value_or("")), "Thermal Status"));
  if (!status) return nullptr;
  if (*status <= 0) return JsonArray{};
  return JsonArray{std::string(kHeat[std::min(*status, 6LL) - 1]) + " thermal throttling"};
}

}  // namespace robx
