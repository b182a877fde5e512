#include "engine.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include "error.hpp"

namespace robx {

std::unique_ptr<Model> open_model(const Job& job, const Images& images, const std::string& libraries) {
  if (job.engine == "on_onnxruntime") return open_onnxruntime(job, images, libraries);
  if (job.engine == "on_litert") return open_litert(job, images, libraries);
  throw Error("the native runner has no engine " + job.engine.substr(0, 40) +
              ": it runs ONNX, .ort and LiteRT bundles, so export one of these or use a Python on the device");
}

JsonObject find_runtimes(const std::string& libraries) {
  JsonObject found;
  try {
    found.emplace_back("onnxruntime", onnxruntime_version(libraries));
  } catch (const Error&) {
  }
  try {
    Library(libraries + "/libLiteRt.so");
    found.emplace_back("ai-edge-litert", "unknown");  // its API does not say
  } catch (const Error&) {
  }
  return found;
}

Library::Library(const std::string& path) : handle_(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)), path_(path) {
  if (handle_ != nullptr) return;
  if (::access(path.c_str(), F_OK) != 0) throw MissingLibrary(path + " is missing: build the runner with robx device build");
  const char* why = ::dlerror();
  throw MissingLibrary("the runtime's library cannot be loaded (" + first_line(why ? why : "") +
                       "): build the runner with a library for this device");
}

void* Library::address(const char* name) const {
  void* found = ::dlsym(handle_, name);
  if (found == nullptr) throw Error(path_ + " has no " + name + ": use a version of the library that this runner supports");
  return found;
}

std::string check_provider(const char* engine, const Settings& settings, const std::vector<std::string>& known) {
  const std::string provider = settings.provider.empty() ? known[0] : settings.provider;
  std::string names;
  for (const auto& name : known) {
    if (provider == name) return provider;
    names += (names.empty() ? "" : " or ") + name;
  }
  throw Error(std::string("the native runner uses ") + engine + " on " + names + ", and " + provider.substr(0, 20) +
              " was asked for: give one of these");
}

}  // namespace robx
