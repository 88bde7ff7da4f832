// Threads of the library's own that move bytes. They carry no signals: handlers run on the program's threads.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace ng {

// Throws std::system_error if there is no thread to be had.
template <typename F>
std::thread start_thread(F&& body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  struct Restore {
    const sigset_t* mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, mask, nullptr); }
  } const restore{&before};
  return std::thread(std::forward<F>(body));
}

}  // namespace ng
