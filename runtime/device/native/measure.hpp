// One measurement: load, first inference, then warm-up and timed queries, or every image once. As runner.py and timing.py.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "job.hpp"
#include "json.hpp"

namespace robx {

struct Measurement {
  JsonObject result;                                        // of result.json
  std::vector<std::pair<std::string, std::string>> parts;  // outputs.npz and, if timed, samples.npy
};

// Verify the job's files, open the model and measure it; the outputs of the timed run itself are kept.
Measurement measure(const Job& job, bool timed, const std::string& libraries);

}  // namespace robx
