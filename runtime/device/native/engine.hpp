// An inference runtime, loaded from its shared library when a model is opened.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "job.hpp"
#include "json.hpp"

namespace robx {

// Embeddings of one batch: (batch, width), row-major.
struct Output {
  std::vector<float> values;
  std::int64_t batch = 0, width = 0;
};

// An opened model. Its destructor frees it.
class Model {
 public:
  virtual ~Model() = default;

  // Run `batch` preprocessed images, float32 (batch, 3, H, W), and replace `output`. Throws Error if the runtime fails
  // or the output is not (batch, D).
  virtual void run(const float* images, Output& output) = 0;

  // What is actually in use: engine, version, provider, threads, ... as runtime/engines/*.py report it.
  virtual JsonObject facts() const = 0;
};

// Open the job's model in its engine. `libraries` is the folder of the runtime's shared library.
// Throws MissingLibrary if that cannot be loaded, and Error if it does not take the model or the settings.
std::unique_ptr<Model> open_model(const Job& job, const Images& images, const std::string& libraries);
std::unique_ptr<Model> open_onnxruntime(const Job& job, const Images& images, const std::string& libraries);
std::unique_ptr<Model> open_litert(const Job& job, const Images& images, const std::string& libraries);

// The runtimes that can be loaded from `libraries`, by the name of their Python package, with their versions.
JsonObject find_runtimes(const std::string& libraries);
std::string onnxruntime_version(const std::string& libraries);  // throws MissingLibrary

// A shared library that stays loaded until the process ends; runtimes do not survive being unloaded.
class Library {
 public:
  // Throws MissingLibrary with the loader's message.
  explicit Library(const std::string& path);

  template <typename Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(address(name));
  }

 private:
  void* address(const char* name) const;  // throws Error if the library does not export it
  void* handle_;
  std::string path_;
};

// The provider to use: the requested one, or the first of `known`. Throws Error if the engine does not have it.
std::string check_provider(const char* engine, const Settings& settings, const std::vector<std::string>& known);

}  // namespace robx
