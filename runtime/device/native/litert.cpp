// LiteRT (.tflite) models on the CPU, through LiteRT's C API (libLiteRt.so and its CompiledModel).
//
// The functions are looked up by name and declared here as LiteRT 2.3 has them. Of its structures, only two are read: a
// tensor's type, whose first word is the element type and whose second begins the layout, and its quantisation.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "engine.hpp"
#include "error.hpp"

namespace robx {
namespace {

using Pointer = void*;

struct TensorType {  // LiteRtRankedTensorType
  std::int32_t element;
  std::uint32_t rank;  // in its low seven bits
  std::int32_t sizes[8];
  std::uint32_t strides[24];  // more than any version has
};

struct EnvironmentOption {  // LiteRtEnvOption with an integer
  int tag;
  struct {
    int type;  // 2: kLiteRtAnyTypeInt
    std::int64_t value;
  } any;
};

struct PerTensorQuantization {
  float scale;
  std::int64_t zero_point;
};

constexpr std::int32_t kFloat32 = 1, kUint8 = 3, kInt8 = 9;  // LiteRtElementType
constexpr int kCpu = 1;                                      // LiteRtHwAcceleratorSet
constexpr int kRead = 0, kWrite = 1;                         // LiteRtTensorBufferLockMode
constexpr int kAutoRegister = 24, kMinLogSeverity = 25;      // LiteRtEnvOptionTag
constexpr int kPerTensor = 1;                                // LiteRtQuantizationTypeId

class Api {
 public:
  explicit Api(const std::string& libraries) : library_(libraries + "/libLiteRt.so") {
    // This function came with the model's first argument being the environment, as open() passes it.
    library_.find<void()>("LiteRtCreateModelFromAllocation");
  }

  template <typename Function>
  Function* find(const char* name) const {
    return library_.find<Function>(name);
  }

  // Call a function that returns a status. Throws Error, which says `doing` and the status.
  template <typename... Arguments>
  void call(const std::string& doing, const char* name, Arguments... arguments) const {
    if (const int status = library_.find<int(Arguments...)>(name)(arguments...))
      throw Error(doing + ": " + name + " returned status " + std::to_string(status));
  }

  void destroy(const char* name, Pointer object) const {
    if (object != nullptr) library_.find<void(Pointer)>(name)(object);
  }

 private:
  Library library_;
};

// One object of the API, destroyed at the end of its scope.
class Handle {
 public:
  Handle(const Api& api, const char* destroy) : api_(api), destroy_(destroy) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { api_.destroy(destroy_, object_); }
  Pointer get() const { return object_; }
  Pointer* out() { return &object_; }

 private:
  const Api& api_;
  const char* destroy_;
  Pointer object_ = nullptr;
};

// An input or output of the model and the buffer that holds its values.
struct Slot {
  explicit Slot(const Api& api) : buffer(api, "LiteRtDestroyTensorBuffer") {}

  std::size_t count() const {
    std::size_t product = 1;
    for (std::uint32_t i = 0; i < rank(); ++i) product *= static_cast<std::size_t>(std::max(type.sizes[i], 1));
    return product;
  }
  std::uint32_t rank() const { return std::min<std::uint32_t>(type.rank & 0x7F, 8); }
  std::size_t bytes() const { return count() * (type.element == kFloat32 ? sizeof(float) : 1); }
  const char* dtype() const { return type.element == kFloat32 ? "float32" : type.element == kInt8 ? "int8" : "uint8"; }

  TensorType type{};
  PerTensorQuantization quantization{1, 0};
  Handle buffer;
};

std::uint8_t quantise(float value, const Slot& slot) {
  const bool is_signed = slot.type.element == kInt8;
  const float low = is_signed ? -128.0f : 0.0f, high = is_signed ? 127.0f : 255.0f;
  const float real = std::nearbyint(value / slot.quantization.scale) + static_cast<float>(slot.quantization.zero_point);
  const float saturated = real >= high ? high : real > low ? real : low;  // NaN is the lowest value
  return static_cast<std::uint8_t>(static_cast<int>(saturated));
}

class LiteRtModel final : public Model {
 public:
  LiteRtModel(const Job& job, const Images& images, const std::string& libraries)
      : api_(libraries),
        job_(job),
        run_(api_.find<int(Pointer, std::size_t, std::size_t, Pointer*, std::size_t, Pointer*)>("LiteRtRunCompiledModel")),
        lock_(api_.find<int(Pointer, Pointer*, int)>("LiteRtLockTensorBuffer")),
        unlock_(api_.find<int(Pointer)>("LiteRtUnlockTensorBuffer")) {
    check_provider("LiteRT", job.settings, {"cpu", "xnnpack"});
    const std::string name = job.model.substr(job.model.rfind('/') + 1), doing = "LiteRT cannot open " + name;
    // The CPU only: no GPU or NPU plug-in is looked for. The log has errors only.
    const EnvironmentOption options[] = {{kAutoRegister, {2, kCpu}}, {kMinLogSeverity, {2, 3}}};
    api_.call(doing, "LiteRtCreateEnvironment", 2, &options[0], environment_.out());
    api_.call(doing, "LiteRtCreateModelFromFile", environment_.get(), job.model.c_str(), model_.out());
    compile(doing);
    open_slots(doing);
    if (input_.count() != images.each() * static_cast<std::size_t>(job.batch))
      throw Error(name + " takes " + std::to_string(input_.count()) + " values, and the images have others: export the bundle again");
  }

  void run(const float* images, Output& output) override {
    write_input(images);
    Pointer inputs[] = {input_.buffer.get()};
    if (const int status = run_(compiled_.get(), 0, 1, inputs, buffers_.size(), buffers_.data()))
      throw Error("the model failed: LiteRT returned status " + std::to_string(status));
    read_output(output);
  }

  JsonObject facts() const override {
    return {
        {"engine", "litert"},
        {"version", nullptr},  // the API does not say; the host knows the library's
        {"provider", "xnnpack"},
        {"fully_delegated", fully_delegated_},
        {"threads", job_.settings.threads},
        {"input_dtype", input_.dtype()},
        {"output_dtype", outputs_[chosen_]->dtype()},
        {"precision", "the file's"},
        {"fallback", false},
    };
  }

 private:
  void compile(const std::string& doing) {
    Handle options(api_, "LiteRtDestroyOptions");
    api_.call(doing, "LiteRtCreateOptions", options.out());
    api_.call(doing, "LiteRtSetOptionsHardwareAccelerators", options.get(), kCpu);
    // XNNPACK's options are TOML; LiteRT frees the text.
    const std::string threads = "num_threads = " + std::to_string(job_.settings.threads) + "\n";
    Pointer xnnpack = nullptr;
    api_.call(doing, "LiteRtCreateOpaqueOptions", static_cast<const char*>("xnnpack"), static_cast<Pointer>(::strdup(threads.c_str())),
              &std::free, &xnnpack);
    api_.call(doing, "LiteRtAddOpaqueOptions", options.get(), xnnpack);
    api_.call(doing, "LiteRtCreateCompiledModel", environment_.get(), model_.get(), options.get(), compiled_.out());
    api_.call(doing, "LiteRtCompiledModelIsFullyAccelerated", compiled_.get(), &fully_delegated_);
  }

  void open_slots(const std::string& doing) {
    Pointer signature = nullptr;
    std::size_t inputs = 0, outputs = 0;
    api_.call(doing, "LiteRtGetModelSignature", model_.get(), std::size_t{0}, &signature);
    api_.call(doing, "LiteRtGetNumSignatureInputs", signature, &inputs);
    api_.call(doing, "LiteRtGetNumSignatureOutputs", signature, &outputs);
    if (inputs != 1 || outputs < 1 || outputs > 16) throw Error(doing + ": it does not have one input and some outputs");
    open_slot(doing, signature, "Input", 0, input_);
    for (std::size_t i = 0; i < outputs; ++i) {
      outputs_.push_back(std::make_unique<Slot>(api_));
      open_slot(doing, signature, "Output", i, *outputs_.back());
      buffers_.push_back(outputs_.back()->buffer.get());
    }
    // Outputs are sorted by name; where there are logits, too, the width identifies the embedding.
    const auto fits = [&](const auto& slot) {
      return slot->rank() > 0 && slot->type.sizes[slot->rank() - 1] == job_.output.shape[1];
    };
    const auto found = std::find_if(outputs_.begin(), outputs_.end(), fits);
    chosen_ = found == outputs_.end() ? 0 : static_cast<std::size_t>(found - outputs_.begin());
    if (outputs_[chosen_]->rank() != 2) throw Error("the output is not a matrix (N, D): export the bundle again");
  }

  void open_slot(const std::string& doing, Pointer signature, const std::string& kind, std::size_t index, Slot& slot) {
    Pointer tensor = nullptr, requirements = nullptr;
    int quantization = 0;
    api_.call(doing, ("LiteRtGetSignature" + kind + "TensorByIndex").c_str(), signature, index, &tensor);
    api_.call(doing, "LiteRtGetRankedTensorType", tensor, &slot.type);
    const auto element = slot.type.element;
    if (element != kFloat32 && element != kInt8 && element != kUint8)
      throw Error(doing + ": an input or output is neither float32 nor an 8-bit integer");
    api_.call(doing, "LiteRtGetQuantizationTypeId", tensor, &quantization);
    if (quantization == kPerTensor) api_.call(doing, "LiteRtGetPerTensorQuantization", tensor, &slot.quantization);
    if (element != kFloat32 && !(slot.quantization.scale > 0)) throw Error(doing + ": an 8-bit tensor has no scale");
    api_.call(doing, ("LiteRtGetCompiledModel" + kind + "BufferRequirements").c_str(), compiled_.get(), std::size_t{0}, index,
              &requirements);
    api_.call(doing, "LiteRtCreateManagedTensorBufferFromRequirements", environment_.get(), &slot.type, requirements,
              slot.buffer.out());
    std::size_t packed = 0;
    api_.call(doing, "LiteRtGetTensorBufferPackedSize", slot.buffer.get(), &packed);
    if (packed != slot.bytes()) throw Error(doing + ": a buffer has " + std::to_string(packed) + " bytes, expected " + std::to_string(slot.bytes()));
  }

  Pointer lock(const Slot& slot, int mode) const {
    Pointer memory = nullptr;
    if (lock_(slot.buffer.get(), &memory, mode) != 0) throw Error("LiteRT cannot map the memory of a tensor");
    return memory;
  }

  void write_input(const float* images) {
    const Pointer memory = lock(input_, kWrite);
    if (input_.type.element == kFloat32) {
      std::memcpy(memory, images, input_.bytes());
    } else {
      auto* values = static_cast<std::uint8_t*>(memory);
      for (std::size_t i = 0; i < input_.count(); ++i) values[i] = quantise(images[i], input_);
    }
    unlock_(input_.buffer.get());
  }

  void read_output(Output& output) const {
    const Slot& slot = *outputs_[chosen_];
    const Pointer memory = lock(slot, kRead);
    output.batch = slot.type.sizes[0];
    output.width = slot.type.sizes[1];
    output.values.resize(slot.count());
    if (slot.type.element == kFloat32) {
      std::memcpy(output.values.data(), memory, slot.bytes());
    } else {
      const auto* values = static_cast<const std::uint8_t*>(memory);
      for (std::size_t i = 0; i < slot.count(); ++i) {
        const int value = slot.type.element == kInt8 ? static_cast<std::int8_t>(values[i]) : values[i];
        output.values[i] = static_cast<float>(value - slot.quantization.zero_point) * slot.quantization.scale;
      }
    }
    unlock_(slot.buffer.get());
  }

  Api api_;
  const Job& job_;
  // Of every query, so not looked up again.
  int (*run_)(Pointer, std::size_t, std::size_t, Pointer*, std::size_t, Pointer*);
  int (*lock_)(Pointer, Pointer*, int);
  int (*unlock_)(Pointer);
  Handle environment_{api_, "LiteRtDestroyEnvironment"}, model_{api_, "LiteRtDestroyModel"};
  Handle compiled_{api_, "LiteRtDestroyCompiledModel"};
  Slot input_{api_};
  std::vector<std::unique_ptr<Slot>> outputs_;
  std::vector<Pointer> buffers_;  // of the outputs
  std::size_t chosen_ = 0;
  bool fully_delegated_ = false;
};

}  // namespace

std::unique_ptr<Model> open_litert(const Job& job, const Images& images, const std::string& libraries) {
  return std::make_unique<LiteRtModel>(job, images, libraries);
}

}  // namespace robx
