#include "job.hpp"

#include <algorithm>

#include "error.hpp"
#include "json.hpp"

namespace robx {
namespace {

constexpr const char* kKeys[] = {
    "engine",   "folder",          "manifest",      "settings",   "files",   "affinity",          "batch",
    "latency",  "cool_down_seconds", "queries",     "seconds",    "max_seconds", "warm_up_seconds", "warm_up_limit",
    "time_limit"};

void check_keys(const Json& job) {
  std::string wrong;
  const auto note = [&](const std::string& key) { wrong += (wrong.empty() ? "" : ", ") + key; };
  for (const auto& [key, value] : job.as_object("job")) {
    if (std::none_of(std::begin(kKeys), std::end(kKeys), [&, name = key](const char* known) { return name == known; }))
      note(key);
  }
  for (const char* key : kKeys) {
    const auto& members = job.as_object("job");
    if (std::none_of(members.begin(), members.end(), [&](const auto& member) { return member.first == key; })) note(key);
  }
  if (!wrong.empty()) throw Error("the job's keys do not match this runner: " + wrong.substr(0, 300));
}

std::int64_t integer(const Json& parent, const char* key, std::int64_t least, std::int64_t most) {
  const std::int64_t value = parent.get(key, "job").as_int(key);
  if (value < least || value > most)
    throw Error(std::string(key) + " must be from " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                std::to_string(value));
  return value;
}

double seconds(const Json& job, const char* key) {
  const double value = job.get(key, "job").as_number(key);
  if (!(value >= 0 && value <= 1e6)) throw Error(std::string(key) + " must be from 0 to 1e6 seconds");
  return value;
}

// A path inside the job's folder: relative, without "..".
const std::string& inside(const std::string& path) {
  const std::string slashed = "/" + path + "/";
  const bool leaves = path.empty() || path[0] == '/' || slashed.find("/../") != std::string::npos;
  if (leaves || path.find('\0') != std::string::npos) throw Error("the file " + path.substr(0, 80) + " is outside the job's folder");
  return path;
}

const Json& first(const Json& manifest, const char* key) {
  const auto& tensors = manifest.get(key, "manifest").as_array(key);
  if (tensors.empty()) throw Error(std::string("the manifest lists no ") + key);
  return tensors[0];
}

Tensor tensor(const Json& spec, const char* where) {
  Tensor found{spec.get("name", where).as_string("name"), spec.get("dtype", where).as_string("dtype"), {}};
  if (found.name.empty() || found.name.find('\0') != std::string::npos) throw Error(std::string(where) + " has no name");
  for (const auto& size : spec.get("shape", where).as_array("shape")) {
    const std::int64_t value = size.is_null() ? 0 : size.as_int("shape");
    if (value < 0 || value > 1 << 24) throw Error(std::string(where) + " has an impossible shape");
    found.shape.push_back(value);
  }
  return found;
}

std::string model_path(const Json& job, const Json& manifest) {
  for (const auto& file : manifest.get("files", "manifest").as_array("files")) {
    if (file.get("role", "files").as_string("role") == "model")
      return inside(job.get("folder", "job").as_string("folder")) + "/" + inside(file.get("path", "files").as_string("path"));
  }
  throw Error("the manifest lists no model file");
}

Settings read_settings(const Json& settings) {
  Settings found;
  found.threads = static_cast<int>(integer(settings, "threads", 1, 4096));
  const Json& provider = settings.get("provider", "settings");
  if (!provider.is_null()) found.provider = provider.as_string("provider");
  const Json& hint = settings.get("precision_hint", "settings");
  if (!hint.is_null() && hint.as_string("precision_hint") != "f32")
    throw Error("this runner computes in the types of the file, and " + hint.as_string("precision_hint").substr(0, 20) +
                " was asked for");
  return found;
}

void read_preprocessing(const Json& manifest, Job& job) {
  const Json& preprocessing = manifest.get("preprocessing", "manifest");
  for (auto& [key, target] : {std::pair<const char*, float*>{"mean", job.mean}, {"std", job.std}}) {
    const auto& values = preprocessing.get(key, "preprocessing").as_array(key);
    if (values.size() != 3) throw Error(std::string(key) + " does not have three values");
    for (int i = 0; i < 3; ++i) target[i] = static_cast<float>(values[i].as_number(key));
  }
}

// How a model that takes uint8 pixels wants them. One that resizes images takes those of the job as they are.
void read_pixel_order(const Json& manifest, Job& job) {
  const Json& inside = manifest.get("in_model", "manifest");
  if (inside.is_null() || job.input.dtype != "uint8") return;
  const auto is = [&inside](const char* key, const char* other, const char* usual) {
    const Json& value = inside.get(key, "in_model");
    if (value.is_null()) return false;
    const std::string& found = value.as_string(key);
    if (found != other && found != usual)
      throw Error("the model takes " + found.substr(0, 20) + " pixels, and this runner gives " + usual + " or " + other);
    return found == other;
  };
  job.nhwc = is("layout", "NHWC", "NCHW");
  job.bgr = is("channels", "BGR", "RGB");
}

}  // namespace

Job read_job(const std::string& text) {
  const Json json = parse_json(text);
  check_keys(json);
  const Json& manifest = json.get("manifest", "job");
  Job job{};
  job.engine = json.get("engine", "job").as_string("engine");
  job.model = model_path(json, manifest);
  job.input = tensor(first(manifest, "inputs"), "the input");
  job.output = tensor(first(manifest, "outputs"), "the output");
  if (job.input.shape.size() != 4 || job.output.shape.size() != 2)
    throw Error("the manifest's input is not (N, 3, H, W) or its output is not (N, D)");
  if (job.input.dtype != "float32" && job.input.dtype != "uint8")
    throw Error("the model takes " + job.input.dtype.substr(0, 20) + ", and this runner has float32 and uint8 inputs");
  read_preprocessing(manifest, job);
  read_pixel_order(manifest, job);
  job.settings = read_settings(json.get("settings", "job"));
  for (const auto& [path, digest] : json.get("files", "job").as_object("files"))
    job.files.emplace_back(inside(path), digest.as_string("files"));
  if (const Json& cores = json.get("affinity", "job"); !cores.is_null()) {
    for (const auto& core : cores.as_array("affinity")) {
      const std::int64_t number = core.as_int("affinity");
      if (number < 0 || number > 4095) throw Error("core " + std::to_string(number) + " is not from 0 to 4095");
      job.affinity.push_back(static_cast<int>(number));
    }
  }
  job.batch = integer(json, "batch", 1, 1 << 20);
  job.queries = integer(json, "queries", 0, 100'000'000);
  job.latency = json.get("latency", "job").as_bool("latency");
  job.cool_down_seconds = seconds(json, "cool_down_seconds");
  job.seconds = seconds(json, "seconds");
  job.max_seconds = seconds(json, "max_seconds");
  job.warm_up_seconds = seconds(json, "warm_up_seconds");
  job.warm_up_limit = seconds(json, "warm_up_limit");
  job.time_limit = static_cast<unsigned>(integer(json, "time_limit", 1, 1'000'000));
  if (job.input.shape[0] != 0 && job.input.shape[0] != job.batch)
    throw Error("the model has a fixed batch of " + std::to_string(job.input.shape[0]) + ", and the job asks for " +
                std::to_string(job.batch));
  return job;
}

}  // namespace robx
