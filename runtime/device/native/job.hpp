// job.json: what the host asks for. The same file as for runner.py; everything is checked here, once.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace robx {

struct Tensor {
  std::string name, dtype;          // "float32" or "uint8"
  std::vector<std::int64_t> shape;  // 0 where it is dynamic
};

struct Settings {
  int threads = 1;
  std::string provider;  // "" for the engine's default
};

struct Job {
  std::string engine;  // on_onnxruntime or on_litert
  std::string model;   // path of the model file, in the job's folder
  Tensor input, output;
  float mean[3], std[3];  // of the preprocessing, to turn normalised values into uint8 pixels again
  bool nhwc, bgr;         // the axes and the channels of those pixels; else NCHW and RGB, as the images are
  Settings settings;
  std::vector<std::pair<std::string, std::string>> files;  // path -> hex SHA-256
  std::vector<int> affinity;                               // empty: any core
  std::int64_t batch, queries;
  bool latency;
  double cool_down_seconds, seconds, max_seconds, warm_up_seconds, warm_up_limit;
  unsigned time_limit;  // seconds
};

// Read and check a job. Throws Error, which names the key, for a missing or unknown key, a value of another type or out
// of range, and a file outside the job's folder.
Job read_job(const std::string& text);

}  // namespace robx
