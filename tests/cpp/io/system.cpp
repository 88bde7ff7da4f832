#include "io/system.hpp"

#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>

#include <cerrno>
#include <cstddef>
#include <iterator>
#include <string_view>

#include "io/temporary_directory.hpp"
#include "narrowgauge/error.hpp"

namespace ng {

thread_local const Hook* fsync_hook = nullptr;
thread_local const Hook* close_hook = nullptr;

namespace {

// The definition after this executable's: the C library's, or a sanitizer's that keeps count of descriptors.
int call(const Hook* hook, const char* name, int fd) {
  const int error = hook != nullptr ? (*hook)(fd) : -1;
  const auto next = reinterpret_cast<int (*)(int)>(dlsym(RTLD_NEXT, name));
  if (error < 0) return next(fd);
  if (name == std::string_view("close")) next(fd);  // a close that fails has closed all the same
  errno = error;
  return -1;
}

}  // namespace

bool mount_small_disk(const std::filesystem::path& path, const std::string& size) {
  // A mount of this process alone; without root, as the root of a user namespace where the kernel allows one.
  const uid_t user = geteuid();
  const gid_t group = getegid();
  if (unshare(CLONE_NEWNS) != 0) {
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    write_text("/proc/self/setgroups", "deny");
    write_text("/proc/self/uid_map", concat("0 ", user, " 1"));
    write_text("/proc/self/gid_map", concat("0 ", group, " 1"));
  }
  if (mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return false;
  return mount("tmpfs", path.c_str(), "tmpfs", 0, ("size=" + size).c_str()) == 0;
}

bool answer(unsigned call, unsigned error) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(filter), filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace ng

// The executable's own definitions come before the C library's.
extern "C" int fsync(int fd) { return ng::call(ng::fsync_hook, "fsync", fd); }
extern "C" int close(int fd) { return ng::call(ng::close_hook, "close", fd); }

#ifdef __SANITIZE_THREAD__
// The C++ library, which is not instrumented, counts the owners of an exception that a future hands over: who frees it
// last seems to race with who read it.
extern "C" const char* __tsan_default_suppressions() { return "race:std::__exception_ptr::exception_ptr::_M_release"; }
#endif
