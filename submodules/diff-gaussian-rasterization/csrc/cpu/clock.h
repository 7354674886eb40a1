// clock.h: how long each stage takes, for benchmarks: always on, two clock readings per stage.
#pragma once
#include <cstdint>
#include <ctime>

namespace gs::cpu {

enum class Stage { project, sort, tiles, blend, loss, blend_backward, project_backward, adam, count };
constexpr const char* kStageNames[] = {"project",          "sort", "tiles", "blend", "loss", "blend_backward",
                                       "project_backward", "adam"};

struct StageTime { double wall, own; };  // seconds; `own` is the processor time of the calling thread alone
inline StageTime stage_times[int(Stage::count)];

// Adds the time of its own scope to a stage.
class Clock {
  public:
    explicit Clock(Stage stage) : stage_(stage), wall_(now(CLOCK_MONOTONIC)), own_(now(CLOCK_THREAD_CPUTIME_ID)) {}
    ~Clock() {
        StageTime& t = stage_times[int(stage_)];
        t.wall += now(CLOCK_MONOTONIC) - wall_, t.own += now(CLOCK_THREAD_CPUTIME_ID) - own_;
    }

  private:
    static double now(clockid_t id) {
        timespec t;
        clock_gettime(id, &t);
        return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
    }
    Stage stage_;
    double wall_, own_;
};

}  // namespace gs::cpu
