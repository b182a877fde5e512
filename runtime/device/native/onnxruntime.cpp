// ONNX and .ort models in ONNX Runtime, through its C API.
//
// The library exports one function, OrtGetApiBase, which returns tables of function pointers. Their order is ONNX
// Runtime's ABI: entries are only ever added at the end, and GetApi(n) returns a table in which the entries of API
// version n are present. The entries used here are declared below by their positions, so that no header is needed.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "engine.hpp"
#include "error.hpp"

namespace robx {
namespace {

constexpr std::uint32_t kApiVersion = 12;  // ONNX Runtime 1.12, the first with AppendExecutionProvider
constexpr int kFloat = 1, kUint8 = 2;      // ONNXTensorElementDataType

enum Position : std::size_t {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetSessionExecutionMode = 13,
  kSetSessionLogSeverityLevel = 22,
  kSetSessionGraphOptimizationLevel = 23,
  kSetIntraOpNumThreads = 24,
  kSetInterOpNumThreads = 25,
  kCreateRunOptions = 39,
  kRunOptionsSetRunLogSeverityLevel = 41,
  kCreateTensorWithDataAsOrtValue = 49,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kReleaseEnv = 92,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseSession = 95,
  kReleaseValue = 96,
  kReleaseRunOptions = 97,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseSessionOptions = 100,
  kGetAvailableProviders = 125,
  kReleaseAvailableProviders = 126,
  kAddSessionConfigEntry = 130,
  kAppendExecutionProvider = 216,
};

struct ApiBase {
  void* const* (*get_api)(std::uint32_t version);
  const char* (*version)();
};

// Before the library is loaded: it otherwise writes a device id, and may send events.
const std::string& disabled_telemetry(const std::string& library) {
  ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  return library;
}

// The API's table; every object of it is an opaque pointer.
class Api {
 public:
  explicit Api(const std::string& libraries) : library_(disabled_telemetry(libraries + "/libonnxruntime.so")) {
    base_ = library_.find<const ApiBase*()>("OrtGetApiBase")();
    table_ = base_->get_api(kApiVersion);
    if (table_ == nullptr) throw Error("ONNX Runtime " + version() + " is too old: use 1.12 or later");
  }

  std::string version() const { return base_->version(); }

  // Call an entry that returns a status. Throws Error with its message, after `doing`.
  template <typename... Arguments>
  void call(const std::string& doing, Position position, Arguments... arguments) const {
    void* status = reinterpret_cast<void* (*)(Arguments...)>(table_[position])(arguments...);
    if (status == nullptr) return;
    const auto message = reinterpret_cast<const char* (*)(const void*)>(table_[kGetErrorMessage])(status);
    const std::string line = first_line(message);
    release(kReleaseStatus, status);
    throw Error(doing + ": " + line);
  }

  void release(Position position, void* object) const {
    if (object != nullptr) reinterpret_cast<void (*)(void*)>(table_[position])(object);
  }

 private:
  Library library_;
  const ApiBase* base_;
  void* const* table_;
};

// One object of the API, released at the end of its scope.
class Handle {
 public:
  Handle(const Api& api, Position release) : api_(api), release_(release) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { api_.release(release_, object_); }
  void* get() const { return object_; }
  void** out() { return &object_; }

 private:
  const Api& api_;
  Position release_;
  void* object_ = nullptr;
};

class OnnxRuntimeModel final : public Model {
 public:
  OnnxRuntimeModel(const Job& job, const Images& images, const std::string& libraries)
      : api_(libraries), job_(job), each_(images.each()), shape_(images.shape) {
    provider_ = check_provider("ONNX Runtime", job.settings, {"cpu", "xnnpack"});
    require_provider();
    shape_[0] = job.batch;
    if (job.nhwc) std::rotate(shape_.begin() + 1, shape_.begin() + 2, shape_.end());
    if (job.input.dtype == "uint8") pixels_.resize(each_ * static_cast<std::size_t>(job.batch));
    const std::string starting = "ONNX Runtime cannot start";
    api_.call(starting, kCreateEnv, 3, "robx", environment_.out());
    set_options(starting);
    const std::string name = job.model.substr(job.model.rfind('/') + 1);
    api_.call("onnxruntime cannot open " + name, kCreateSession, environment_.get(), job.model.c_str(), options_.get(),
              session_.out());
    api_.call(starting, kCreateRunOptions, run_options_.out());
    api_.call(starting, kRunOptionsSetRunLogSeverityLevel, run_options_.get(), 4);  // errors are thrown
    api_.call(starting, kCreateCpuMemoryInfo, 0, 0, memory_.out());
  }

  void run(const float* images, Output& output) override {
    const char* input_name = job_.input.name.c_str();
    const char* output_name = job_.output.name.c_str();
    Handle input(api_, kReleaseValue), result(api_, kReleaseValue);
    make_input(images, input);
    const void* inputs[] = {input.get()};
    api_.call("the model failed", kRun, session_.get(), run_options_.get(), &input_name, &inputs[0], std::size_t{1},
              &output_name, std::size_t{1}, result.out());
    read_output(result, output);
  }

  JsonObject facts() const override {
    return {
        {"engine", "onnxruntime"},       {"version", api_.version()},
        {"provider", full_name()},       {"threads", job_.settings.threads},
        {"inter_op_threads", 1},         {"graph_optimization", "all"},
        {"precision", "the file's"},     {"allow_spinning", true},
        {"fallback", false},
    };
  }

 private:
  std::string full_name() const { return provider_ == "cpu" ? "CPUExecutionProvider" : "XnnpackExecutionProvider"; }

  void require_provider() const {
    char** names = nullptr;
    int count = 0;
    api_.call("ONNX Runtime cannot list its providers", kGetAvailableProviders, &names, &count);
    bool found = false;
    for (int i = 0; i < count; ++i) found = found || full_name() == names[i];
    api_.call("ONNX Runtime cannot list its providers", kReleaseAvailableProviders, names, count);
    if (!found) throw Error("this onnxruntime has no " + full_name() + ": use a build that includes it");
  }

  void set_options(const std::string& starting) {
    api_.call(starting, kCreateSessionOptions, options_.out());
    void* options = options_.get();
    const auto add = [&](const char* key, const char* value) {
      api_.call(starting, kAddSessionConfigEntry, options, key, value);
    };
    api_.call(starting, kSetIntraOpNumThreads, options, job_.settings.threads);
    api_.call(starting, kSetInterOpNumThreads, options, 1);
    api_.call(starting, kSetSessionExecutionMode, options, 0);            // sequential
    api_.call(starting, kSetSessionGraphOptimizationLevel, options, 99);  // all
    api_.call(starting, kSetSessionLogSeverityLevel, options, 3);         // errors
    add("session.intra_op.allow_spinning", "1");
    if (provider_ == "cpu") return;
    // A node that the provider does not support then fails instead of running on the CPU.
    add("session.disable_cpu_ep_fallback", "1");
    const char* const* none = nullptr;
    api_.call("ONNX Runtime cannot use XNNPACK", kAppendExecutionProvider, options, "XNNPACK", none, none, std::size_t{0});
  }

  // The uint8 pixels of a batch, in the model's order: round((x * std + mean) * 255), saturated.
  void make_pixels(const float* images) {
    const std::size_t plane = each_ / 3, step = job_.nhwc ? 3 : 1;
    std::uint8_t* image = pixels_.data();
    for (std::int64_t n = 0; n < job_.batch; ++n, image += each_) {
      for (std::size_t channel = 0; channel < 3; ++channel, images += plane) {
        const std::size_t place = job_.bgr ? 2 - channel : channel;
        std::uint8_t* pixels = image + (job_.nhwc ? place : place * plane);
        for (std::size_t i = 0; i < plane; ++i) {
          const float value = std::nearbyint((images[i] * job_.std[channel] + job_.mean[channel]) * 255.0f);
          pixels[i * step] = value >= 255.0f ? 255 : value > 0.0f ? static_cast<std::uint8_t>(value) : 0;  // NaN is 0
        }
      }
    }
  }

  // A tensor over the images themselves, or over their uint8 pixels.
  void make_input(const float* images, Handle& input) {
    if (!pixels_.empty()) make_pixels(images);
    const void* data = pixels_.empty() ? static_cast<const void*>(images) : pixels_.data();
    const std::size_t bytes = each_ * static_cast<std::size_t>(job_.batch) * (pixels_.empty() ? sizeof(float) : 1);
    api_.call("the model failed", kCreateTensorWithDataAsOrtValue, memory_.get(), data, bytes, shape_.data(), shape_.size(),
              pixels_.empty() ? kFloat : kUint8, input.out());
  }

  void read_output(const Handle& result, Output& output) {
    const std::string doing = "the output cannot be read";
    Handle info(api_, kReleaseTensorTypeAndShapeInfo);
    api_.call(doing, kGetTensorTypeAndShape, result.get(), info.out());
    int type = 0;
    std::size_t rank = 0;
    std::int64_t sizes[2] = {0, 0};
    api_.call(doing, kGetTensorElementType, info.get(), &type);
    api_.call(doing, kGetDimensionsCount, info.get(), &rank);
    if (rank == 2) api_.call(doing, kGetDimensions, info.get(), &sizes[0], std::size_t{2});
    if (type != kFloat || rank != 2 || sizes[0] < 1 || sizes[1] < 1)
      throw Error("the output is not a float32 matrix (N, D): export the bundle again");
    void* data = nullptr;
    api_.call(doing, kGetTensorMutableData, result.get(), &data);
    output.batch = sizes[0];
    output.width = sizes[1];
    output.values.resize(static_cast<std::size_t>(sizes[0] * sizes[1]));
    std::memcpy(output.values.data(), data, output.values.size() * sizeof(float));
  }

  Api api_;
  const Job& job_;
  std::string provider_;
  std::size_t each_;
  std::vector<std::int64_t> shape_;
  std::vector<std::uint8_t> pixels_;
  Handle environment_{api_, kReleaseEnv}, options_{api_, kReleaseSessionOptions}, session_{api_, kReleaseSession};
  Handle run_options_{api_, kReleaseRunOptions}, memory_{api_, kReleaseMemoryInfo};
};

}  // namespace

std::string onnxruntime_version(const std::string& libraries) { return Api(libraries).version(); }

std::unique_ptr<Model> open_onnxruntime(const Job& job, const Images& images, const std::string& libraries) {
  return std::make_unique<OnnxRuntimeModel>(job, images, libraries);
}

}  // namespace robx
