// The parts of ONNX Runtime's C++ interface that a bundle's README uses, for tests on machines without its headers:
// the Python package has the library and no headers. Every call goes through the C interface, whose table of functions
// (OrtGetApiBase) keeps its order in all versions. $ORT_INCLUDE names a folder with the real headers instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

struct OrtApiBase {
  void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};
extern "C" const OrtApiBase* OrtGetApiBase() noexcept;

enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

namespace Ort {

template <typename... Arguments>
void call(size_t position, Arguments... arguments) {
  static void* const* api = OrtGetApiBase()->get_api(12);
  void* status = reinterpret_cast<void* (*)(Arguments...)>(api[position])(arguments...);
  if (status != nullptr) throw std::runtime_error(reinterpret_cast<const char* (*)(void*)>(api[2])(status));
}

struct Object {
  void* object = nullptr;
};

struct Env : Object {
  Env() { call(3, 2, "", &object); }
};

struct SessionOptions : Object {
  SessionOptions() { call(10, &object); }
};

struct RunOptions : Object {
  RunOptions() { call(39, &object); }
};

struct MemoryInfo : Object {
  static MemoryInfo CreateCpu(OrtAllocatorType allocator, OrtMemType memory) {
    MemoryInfo info;
    call(69, static_cast<int>(allocator), static_cast<int>(memory), &info.object);
    return info;
  }
};

struct Value : Object {
  template <typename T>
  static Value CreateTensor(const MemoryInfo& info, T* data, size_t count, const int64_t* shape, size_t rank) {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint8_t>);
    Value value;
    const int type = std::is_same_v<T, float> ? 1 : 2;
    call(49, info.object, static_cast<void*>(data), count * sizeof(T), shape, rank, type, &value.object);
    return value;
  }

  template <typename T>
  const T* GetTensorData() const {
    void* data = nullptr;
    call(51, object, &data);
    return static_cast<const T*>(data);
  }
};

struct Session : Object {
  Session(const Env& env, const char* path, const SessionOptions& options) {
    call(7, env.object, path, options.object, &object);
  }

  std::vector<Value> Run(const RunOptions& options, const char* const* names, const Value* values, size_t count,
                         const char* const* outputs, size_t wanted) {
    std::vector<void*> given(count), made(wanted);
    for (size_t i = 0; i < count; ++i) given[i] = values[i].object;
    call(9, object, options.object, names, static_cast<void* const*>(given.data()), count, outputs, wanted, made.data());
    std::vector<Value> found(wanted);
    for (size_t i = 0; i < wanted; ++i) found[i].object = made[i];
    return found;
  }
};

}  // namespace Ort
