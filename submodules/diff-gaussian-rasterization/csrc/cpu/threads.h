// threads.h: all the parallelism there is: independent tasks, taken in order by whoever is free.
//
// A task must not care which thread runs it, nor which others have run. ops_cpu.cpp provides the threads (torch's).
#pragma once
#include <cstdint>

namespace gs::cpu {

int thread_count();
void run_tasks(int64_t count, void (*body)(void* context, int64_t task), void* context);

// body(task) for every task in [0, count).
template <typename Body>
static inline void parallel(int64_t count, Body&& body) {
    run_tasks(count, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace gs::cpu
