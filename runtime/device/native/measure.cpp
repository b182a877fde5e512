#include "measure.hpp"

#include <algorithm>
#include <cmath>
#include <future>
#include <limits>
#include <memory>

#include "arrays.hpp"
#include "clock.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "files.hpp"
#include "watch.hpp"

namespace robx {
namespace {

constexpr std::size_t kWindowQueries = 10;  // minimum per warm-up window
constexpr double kAgreement = 0.02;         // steady: the medians of three windows are this close

void verify(const Job& job) {
  for (const auto& [path, expected] : job.files) {
    if (sha256_file(path) != expected) throw Error(path + " arrived damaged: its SHA-256 differs");
  }
}

void check_images(const Job& job, const Images& images) {
  const int axes[] = {0, job.nhwc ? 3 : 1, job.nhwc ? 1 : 2, job.nhwc ? 2 : 3};  // of the input, in the images' order
  for (int axis = 1; axis < 4; ++axis) {
    const std::int64_t want = job.input.shape[axes[axis]], have = images.shape[axis];
    if ((want != 0 && want != have) || (axis == 1 && have != 3))
      throw Error("images.npy does not have the shape of the model's input: export the bundle again");
  }
  if (images.shape[0] < job.batch) throw Error("there are fewer images than one batch: give more images");
}

// The queries of a job in turns, and the outputs that they gave.
class Queries {
 public:
  Queries(const Job& job, const Images& images, Model& model)
      : batch_(static_cast<std::size_t>(job.batch)), count_(images.count() / batch_), images_(images), model_(model) {}

  std::size_t count() const { return count_; }

  // Run one query; returns its nanoseconds.
  std::int64_t run(std::size_t index) {
    const float* start = images_.values.data() + index * batch_ * images_.each();
    const std::int64_t before = monotonic_ns();
    model_.run(start, output_);
    return monotonic_ns() - before;
  }

  // Check the first output against the manifest, and reserve the outputs of all images.
  void accept_first(std::int64_t width) {
    if (output_.batch != static_cast<std::int64_t>(batch_) || (width != 0 && output_.width != width))
      throw Error("the output has shape (" + std::to_string(output_.batch) + ", " + std::to_string(output_.width) +
                  "), expected (" + std::to_string(batch_) + ", " + (width ? std::to_string(width) : "D") +
                  "): export the bundle again");
    width_ = static_cast<std::size_t>(output_.width);
    outputs_.assign(images_.count() * width_, std::numeric_limits<float>::quiet_NaN());
    seen_.assign(images_.count(), 0);
  }

  // Keep the output of the last run, of the query `index`.
  void keep(std::size_t index) {
    if (output_.values.size() != batch_ * width_) throw Error("the shape of the output changed during the run");
    std::copy(output_.values.begin(), output_.values.end(), outputs_.begin() + static_cast<std::ptrdiff_t>(index * batch_ * width_));
    std::fill_n(seen_.begin() + static_cast<std::ptrdiff_t>(index * batch_), batch_, 1);
  }

  std::string archive() const {
    const auto n = static_cast<std::int64_t>(images_.count());
    return stored_zip({{"outputs.npy", npy("<f4", {n, static_cast<std::int64_t>(width_)}, bytes_of(outputs_))},
                       {"seen.npy", npy("|b1", {n}, bytes_of(seen_))}});
  }

 private:
  std::size_t batch_, count_, width_ = 0;
  const Images& images_;
  Model& model_;
  Output output_;
  std::vector<float> outputs_;
  std::vector<unsigned char> seen_;
};

// Windows of queries until three consecutive medians agree within 2 %, or `limit` seconds have passed.
Json warm_up(Queries& queries, double least, double limit) {
  const double start = monotonic_seconds();
  std::size_t number = 0;
  std::vector<double> medians;
  const auto done = [&](bool steady) {
    return Json(JsonObject{{"steady", steady}, {"queries", number}, {"seconds", monotonic_seconds() - start}});
  };
  while (true) {
    const double window = monotonic_seconds();
    std::vector<double> times;
    while (times.size() < kWindowQueries || monotonic_seconds() - window < least / 3) {
      times.push_back(static_cast<double>(queries.run(number++ % queries.count())));
      if (monotonic_seconds() - start > limit) break;
    }
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::nth_element(times.begin(), middle, times.end());
    medians.push_back(*middle);
    if (medians.size() >= 3) {
      const auto [low, high] = std::minmax_element(medians.end() - 3, medians.end());
      if (*high - *low <= kAgreement * *low) return done(true);
    }
    if (monotonic_seconds() - start > limit) return done(false);
  }
}

// Time one query after the other until both the queries and the seconds of the job are reached, or max_seconds.
void time_queries(const Job& job, Queries& queries, Measurement& found) {
  const Json warm = warm_up(queries, job.warm_up_seconds, job.warm_up_limit);
  std::vector<std::int64_t> samples;
  samples.reserve(static_cast<std::size_t>(std::min<std::int64_t>(job.queries, 1 << 20)));
  const Json energy_before = energy("");
  const double began = monotonic_seconds(), wall = wall_seconds(), cpu = cpu_seconds();
  const std::int64_t start = monotonic_ns();
  const std::int64_t least = start + static_cast<std::int64_t>(job.seconds * 1e9);
  const std::int64_t most = start + static_cast<std::int64_t>(job.max_seconds * 1e9);
  const auto wanted = static_cast<std::size_t>(job.queries);
  std::int64_t now = start;
  while ((samples.size() < wanted || now < least) && now < most) {
    const std::size_t index = samples.size() % queries.count();
    samples.push_back(queries.run(index));
    now = monotonic_ns();
    queries.keep(index);  // not timed
  }
  const double ended = monotonic_seconds(), wall_took = wall_seconds() - wall, cpu_took = cpu_seconds() - cpu;
  found.parts.emplace_back("samples.npy", npy("<i8", {static_cast<std::int64_t>(samples.size())}, bytes_of(samples)));
  const JsonObject result = {
      {"warm_up", warm},
      {"window", JsonArray{began, ended}},
      {"wall_seconds", wall_took},
      {"cpu_seconds", cpu_took},
      {"complete", samples.size() >= wanted && now >= least},
      {"energy", JsonObject{{"before", energy_before}, {"after", energy("", energy_before)}}},
      {"gpu", nullptr},
  };
  found.result.insert(found.result.end(), result.begin(), result.end());
}

}  // namespace

Measurement measure(const Job& job, bool timed, const std::string& libraries) {
  std::future<void> verified = std::async(std::launch::async, verify, std::cref(job));
  const Images images = read_images("images.npy");
  verified.get();
  check_images(job, images);
  const Json before = memory(true);
  const std::int64_t start = monotonic_ns();
  const std::unique_ptr<Model> model = open_model(job, images, libraries);
  const std::int64_t loaded = monotonic_ns();
  Queries queries(job, images, *model);
  queries.run(0);
  queries.accept_first(job.output.shape[1]);
  const std::int64_t answered = monotonic_ns();
  Measurement found;
  found.result = {
      {"schema", 1},
      {"load_ns", loaded - start},
      {"first_ns", answered - loaded},
      {"facts", model->facts()},
      {"answered", static_cast<double>(answered) / 1e9},
  };
  if (timed) {
    time_queries(job, queries, found);
  } else {
    for (std::size_t index = 0; index < queries.count(); ++index) {
      queries.run(index);
      queries.keep(index);
    }
  }
  found.result.emplace_back("memory", memory(false));
  found.result.emplace_back("memory_before", before);
  found.parts.emplace_back("outputs.npz", queries.archive());
  return found;
}

}  // namespace robx
