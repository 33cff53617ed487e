/* Preloaded before libc: counts the calls on files below a root, and makes one of them (or all from
   one on) fail with an errno that such a call knows, or kills the process there. Notes the path of
   whatever is written, made, renamed or removed, wherever that is. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, READ, WRITE, FSYNC, RENAME, MKDIR, UNLINK, FLOCK, STAT, LIST, CHMOD, MAP, CLOSE,
            KINDS };
static const char *NAMES[KINDS] = {"open", "read", "write", "fsync", "rename", "mkdir", "unlink",
                                   "flock", "stat", "list", "chmod", "map", "close"};
static const int ERRORS[KINDS][8] = {
    [OPEN] = {EACCES, EIO, EROFS, ENOSPC, EDQUOT, EMFILE, ESTALE},
    [READ] = {EIO, ESTALE},
    [WRITE] = {ENOSPC, EIO, EDQUOT, EFBIG},
    [FSYNC] = {EIO, EINVAL, ENOSPC, ENOSYS, EDQUOT, EROFS, ENOTSUP},
    [RENAME] = {EIO, EACCES, ENOSPC, EROFS, EDQUOT, EBUSY, ENOENT},
    [MKDIR] = {EACCES, ENOSPC, EROFS, EDQUOT, EIO},
    [UNLINK] = {EACCES, EIO, EPERM, EROFS, EBUSY},
    [FLOCK] = {ENOSYS, ENOLCK, EINVAL, EIO, ENOTSUP},
    [STAT] = {EACCES, EIO, ESTALE},
    [LIST] = {EACCES, EIO},
    [CHMOD] = {EPERM, EROFS, EIO},
    [MAP] = {ENOMEM, EACCES},
    [CLOSE] = {EIO, ENOSPC, EDQUOT},
};

static char root[4096];
static atomic_int armed, count, fired;
static int notes = -1, at, variant, sticky, deadly, after, only;
static char said[256];

/* only: -1 for every kind of call, else one; at: which of these, from 1 on. */
void faults_arm(const char *path, int kind, int number, int which, int stay, int kill_it, int later) {
  strncpy(root, path, sizeof root - 1);
  only = kind, at = number, variant = which, sticky = stay, deadly = kill_it, after = later;
  count = 0, fired = 0, said[0] = 0, armed = 1;
}
/* From now on notes go into this file, a line each. */
void faults_note(int file) { notes = file; }
int faults_disarm(void) { armed = 0; return count; }
const char *faults_fired(void) { return said; }

static int below(int folder, const char *path) {
  char whole[8192], link[64];
  if (path && path[0] == '/') return !strncmp(path, root, strlen(root));
  long length = 0;
  if (folder == AT_FDCWD) {
    if (!path) return 0;
    length = syscall(SYS_getcwd, whole, 4096) - 1;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = syscall(SYS_readlinkat, AT_FDCWD, link, whole, 4096);
  }
  if (length <= 0) return 0;
  whole[length] = 0;
  return !strncmp(whole, root, strlen(root));
}

/* The path that a call is about to change, with what links above it (and itself, if FOLLOWED) lead
   to. */
static void note(int folder, const char *path, int followed) {
  if (!armed || notes < 0 || !path) return;
  int saved = errno;
  char whole[8192], real[8192], link[64];
  long length = 0;
  if (path[0] != '/') {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = folder == AT_FDCWD ? syscall(SYS_getcwd, whole, 4096) - 1
                                : syscall(SYS_readlinkat, AT_FDCWD, link, whole, 4096);
    if (length < 0) length = 0;
    whole[length++] = '/';
  }
  snprintf(whole + length, sizeof whole - length, "%s", path);
  if (!followed || !realpath(whole, real)) {
    char *last = strrchr(whole, '/');
    *last = 0;
    if (!realpath(*whole ? whole : "/", real)) strcpy(real, whole);
    length = strlen(real);
    snprintf(real + length, sizeof real - length, "/%.4000s", last + 1);
  }
  strcat(real, "\n");
  (void)!syscall(SYS_write, notes, real, strlen(real));
  errno = saved;
}
static int writes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }

/* The errno of this call, 0 for none. */
static int due(enum kind kind, int folder, const char *path) {
  if (!armed || (only >= 0 && only != (int)kind)) return 0;
  int saved = errno, found = 0;
  if (below(folder, path)) {
    int number = ++count;
    if (number == at || (sticky && fired == (int)kind + 1)) {
      int choices = 0;
      while (choices < 8 && ERRORS[kind][choices]) choices++;
      found = ERRORS[kind][variant % choices];
      if (!fired) snprintf(said, sizeof said, "%s %d of %.150s", NAMES[kind], found, path ? path : "");
      fired = kind + 1;
      if (deadly && (!after || kind == LIST || kind == MAP)) syscall(SYS_kill, getpid(), SIGKILL);
    }
  }
  errno = saved;
  return found;
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CALL(kind, folder, path, ...) \
  int error = due(kind, folder, path); \
  if (error && !after) return errno = error, -1; \
  if (error) { \
    (void)!next(__VA_ARGS__); \
    if (deadly) syscall(SYS_kill, getpid(), SIGKILL); \
    return errno = error, -1; \
  } \
  return next(__VA_ARGS__)
#define MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); \
  }

#define OPENED(folder) if (writes(flags)) note(folder, path, !(flags & O_NOFOLLOW))

int open(const char *path, int flags, ...) { MODE NEXT(open); OPENED(AT_FDCWD); CALL(OPEN, AT_FDCWD, path, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE NEXT(open64); OPENED(AT_FDCWD); CALL(OPEN, AT_FDCWD, path, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE NEXT(openat); OPENED(folder); CALL(OPEN, folder, path, folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE NEXT(openat64); OPENED(folder); CALL(OPEN, folder, path, folder, path, flags, mode); }
ssize_t read(int file, void *to, size_t size) { NEXT(read); CALL(READ, file, 0, file, to, size); }
ssize_t pread64(int file, void *to, size_t size, off64_t from) { NEXT(pread64); CALL(READ, file, 0, file, to, size, from); }
ssize_t write(int file, const void *from, size_t size) { NEXT(write); CALL(WRITE, file, 0, file, from, size); }
ssize_t writev(int file, const struct iovec *parts, int number) { NEXT(writev); CALL(WRITE, file, 0, file, parts, number); }
ssize_t pwrite64(int file, const void *from, size_t size, off64_t to) { NEXT(pwrite64); CALL(WRITE, file, 0, file, from, size, to); }
ssize_t sendfile(int to, int from, off_t *start, size_t size) { NEXT(sendfile); CALL(WRITE, to, 0, to, from, start, size); }
ssize_t sendfile64(int to, int from, off64_t *start, size_t size) { NEXT(sendfile64); CALL(WRITE, to, 0, to, from, start, size); }
ssize_t copy_file_range(int from, off64_t *first, int to, off64_t *last, size_t size, unsigned flags) {
  NEXT(copy_file_range); CALL(WRITE, to, 0, from, first, to, last, size, flags);
}
int ftruncate64(int file, off64_t size) { NEXT(ftruncate64); CALL(WRITE, file, 0, file, size); }
int fallocate64(int file, int mode, off64_t start, off64_t size) { NEXT(fallocate64); CALL(WRITE, file, 0, file, mode, start, size); }
int fsync(int file) { NEXT(fsync); CALL(FSYNC, file, 0, file); }
int fdatasync(int file) { NEXT(fdatasync); CALL(FSYNC, file, 0, file); }
int rename(const char *from, const char *to) { NEXT(rename); note(AT_FDCWD, from, 0), note(AT_FDCWD, to, 0); CALL(RENAME, AT_FDCWD, from, from, to); }
int renameat(int f, const char *from, int t, const char *to) { NEXT(renameat); note(f, from, 0), note(t, to, 0); CALL(RENAME, f, from, f, from, t, to); }
int mkdir(const char *path, mode_t mode) { NEXT(mkdir); note(AT_FDCWD, path, 0); CALL(MKDIR, AT_FDCWD, path, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { NEXT(mkdirat); note(folder, path, 0); CALL(MKDIR, folder, path, folder, path, mode); }
int unlink(const char *path) { NEXT(unlink); note(AT_FDCWD, path, 0); CALL(UNLINK, AT_FDCWD, path, path); }
int unlinkat(int folder, const char *path, int flags) { NEXT(unlinkat); note(folder, path, 0); CALL(UNLINK, folder, path, folder, path, flags); }
int rmdir(const char *path) { NEXT(rmdir); note(AT_FDCWD, path, 0); CALL(UNLINK, AT_FDCWD, path, path); }
int flock(int file, int how) { NEXT(flock); CALL(FLOCK, file, 0, file, how); }
int stat(const char *path, struct stat *to) { NEXT(stat); CALL(STAT, AT_FDCWD, path, path, to); }
int stat64(const char *path, struct stat64 *to) { NEXT(stat64); CALL(STAT, AT_FDCWD, path, path, to); }
int lstat(const char *path, struct stat *to) { NEXT(lstat); CALL(STAT, AT_FDCWD, path, path, to); }
int lstat64(const char *path, struct stat64 *to) { NEXT(lstat64); CALL(STAT, AT_FDCWD, path, path, to); }
int fstat(int file, struct stat *to) { NEXT(fstat); CALL(STAT, file, 0, file, to); }
int fstat64(int file, struct stat64 *to) { NEXT(fstat64); CALL(STAT, file, 0, file, to); }
int fstatat(int folder, const char *path, struct stat *to, int flags) { NEXT(fstatat); CALL(STAT, folder, path, folder, path, to, flags); }
int fstatat64(int folder, const char *path, struct stat64 *to, int flags) { NEXT(fstatat64); CALL(STAT, folder, path, folder, path, to, flags); }
int statx(int folder, const char *restrict path, int flags, unsigned mask, struct statx *restrict to) {
  NEXT(statx); CALL(STAT, folder, path, folder, path, flags, mask, to);
}
int chmod(const char *path, mode_t mode) { NEXT(chmod); note(AT_FDCWD, path, 1); CALL(CHMOD, AT_FDCWD, path, path, mode); }
int fchmod(int file, mode_t mode) { NEXT(fchmod); CALL(CHMOD, file, 0, file, mode); }
int close(int file) {
  NEXT(close);
  int error = due(CLOSE, file, 0), done = next(file);
  if (error && deadly) syscall(SYS_kill, getpid(), SIGKILL);
  return error ? (errno = error, -1) : done;
}
DIR *opendir(const char *path) {
  NEXT(opendir);
  int error = due(LIST, AT_FDCWD, path);
  return error ? (errno = error, (DIR *)0) : next(path);
}
DIR *fdopendir(int file) {
  NEXT(fdopendir);
  int error = due(LIST, file, 0);
  return error ? (errno = error, (DIR *)0) : next(file);
}
void *mmap64(void *where, size_t size, int rights, int flags, int file, off64_t start) {
  NEXT(mmap64);
  int error = file >= 0 ? due(MAP, file, 0) : 0;
  return error ? (errno = error, MAP_FAILED) : next(where, size, rights, flags, file, start);
}
void *mmap(void *where, size_t size, int rights, int flags, int file, off_t start) {
  NEXT(mmap);
  int error = file >= 0 ? due(MAP, file, 0) : 0;
  return error ? (errno = error, MAP_FAILED) : next(where, size, rights, flags, file, start);
}
/* Calls that are noted and don't fail. */
FILE *fopen(const char *path, const char *mode) {
  NEXT(fopen);
  if (strpbrk(mode, "wa+")) note(AT_FDCWD, path, 1);
  return next(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
  NEXT(fopen64);
  if (strpbrk(mode, "wa+")) note(AT_FDCWD, path, 1);
  return next(path, mode);
}
int creat(const char *path, mode_t mode) { NEXT(creat); note(AT_FDCWD, path, 1); return next(path, mode); }
int creat64(const char *path, mode_t mode) { NEXT(creat64); note(AT_FDCWD, path, 1); return next(path, mode); }
int renameat2(int f, const char *from, int t, const char *to, unsigned flags) {
  NEXT(renameat2); note(f, from, 0), note(t, to, 0); return next(f, from, t, to, flags);
}
int link(const char *from, const char *to) { NEXT(link); note(AT_FDCWD, to, 0); return next(from, to); }
int linkat(int f, const char *from, int t, const char *to, int flags) { NEXT(linkat); note(t, to, 0); return next(f, from, t, to, flags); }
int symlink(const char *from, const char *to) { NEXT(symlink); note(AT_FDCWD, to, 0); return next(from, to); }
int symlinkat(const char *from, int t, const char *to) { NEXT(symlinkat); note(t, to, 0); return next(from, t, to); }
int truncate64(const char *path, off64_t size) { NEXT(truncate64); note(AT_FDCWD, path, 1); return next(path, size); }
int remove(const char *path) { NEXT(remove); note(AT_FDCWD, path, 0); return next(path); }
