/* A fault-injecting file layer: LD_PRELOAD this library, and chosen calls below one folder fail.

   LPL_CHAOS_ROOT   only paths below this folder are touched
   LPL_CHAOS_HITS   every fault that happens appends a line: id pid rank op action path
   LPL_CHAOS_FULL   while this file exists the disk is full: writes and new files fail with ENOSPC
   LPL_CHAOS_PLAN   "id rank op action nth times match;...": calls number nth ... nth + times - 1 of `op` on a path that
                    contains `match` ("*": any) fail; rank -1: any process; times 0: all calls from nth on.
                    action: an errno, or short (half of the bytes), kill, stop (this process), full (creates LPL_CHAOS_FULL)
   LPL_CHAOS_TRACE  when set, every call below the root is a line "trace pid rank op - path"

   The environment is read when a process first makes a call, so that a process forked from a server has a plan of its own.
   Counts start anew after a fork. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FAULTS 32
#define SHORT (-1)

struct fault {
    int id, rank, error;
    char op[12], action[12], match[80];
    long nth, times;
    atomic_long calls;
    atomic_int logged;
};

static struct fault faults[FAULTS];
static int number_of_faults, rank, trace;
static const char *root, *hits, *full;
static size_t root_length;
static atomic_int state; /* 0: environment not read, 1: being read, 2: read */
static atomic_int logged_full;
static __thread int inside;

static void forget(void) {
    state = 0;
    logged_full = 0;
    inside = 0;
}

__attribute__((constructor)) static void begin(void) { pthread_atfork(NULL, NULL, forget); }

static int ready(void) {
    if (state == 2) return 1;
    const char *folder = getenv("LPL_CHAOS_ROOT"), *plan = getenv("LPL_CHAOS_PLAN"), *own = getenv("RANK");
    if (!folder || !*folder || !plan) return 0;
    int unread = 0;
    if (!atomic_compare_exchange_strong(&state, &unread, 1)) return 0;
    rank = own ? atoi(own) : 0;
    root = strdup(folder), root_length = strlen(folder);
    hits = strdup(getenv("LPL_CHAOS_HITS") ?: ""), full = strdup(getenv("LPL_CHAOS_FULL") ?: "");
    trace = getenv("LPL_CHAOS_TRACE") != NULL;
    number_of_faults = 0;
    for (const char *entry = plan; entry && *entry && number_of_faults < FAULTS; entry = strchr(entry, ';')) {
        if (*entry == ';') entry++;
        struct fault *f = &faults[number_of_faults];
        memset(f, 0, sizeof *f);
        if (sscanf(entry, "%d %d %11s %11s %ld %ld %79[^;]", &f->id, &f->rank, f->op, f->action, &f->nth, &f->times, f->match) != 7)
            break;
        f->error = atoi(f->action);
        number_of_faults++;
    }
    state = 2;
    return 1;
}

static void note(int id, const char *op, const char *action, const char *path) {
    char line[PATH_MAX + 128];
    int size = id < 0 ? snprintf(line, sizeof line, "trace %d %d %s - %s\n", getpid(), rank, op, path)
                      : snprintf(line, sizeof line, "%d %d %d %s %s %s\n", id, getpid(), rank, op, action, path);
    int fd = syscall(SYS_openat, AT_FDCWD, hits, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) return;
    syscall(SYS_write, fd, line, (size_t)size);
    syscall(SYS_close, fd);
}

static int takes_room(const char *op) {
    return !strcmp(op, "write") || !strcmp(op, "create") || !strcmp(op, "mkdir") || !strcmp(op, "link") || !strcmp(op, "truncate");
}

/* 0: let it pass; SHORT; or an errno. */
static int fate(const char *op, const char *path) {
    if (strncmp(path, root, root_length) || (path[root_length] && path[root_length] != '/')) return 0;
    if (trace) note(-1, op, "-", path);
    int found = 0;
    for (int i = 0; i < number_of_faults; i++) {
        struct fault *f = &faults[i];
        if ((f->rank >= 0 && f->rank != rank) || strcmp(f->op, op)) continue;
        if (strcmp(f->match, "*") && !strstr(path, f->match)) continue;
        long call = atomic_fetch_add(&f->calls, 1) + 1;
        if (call < f->nth || (f->times && call >= f->nth + f->times) || found) continue;
        if (!atomic_exchange(&f->logged, 1)) note(f->id, op, f->action, path);
        if (!strcmp(f->action, "kill")) kill(getpid(), SIGKILL);
        else if (!strcmp(f->action, "stop")) kill(getpid(), SIGSTOP);
        else if (!strcmp(f->action, "short")) found = SHORT;
        else if (!strcmp(f->action, "full")) {
            int fd = syscall(SYS_openat, AT_FDCWD, full, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
            if (fd >= 0) syscall(SYS_close, fd);
        } else found = f->error;
    }
    if (!found && takes_room(op) && !syscall(SYS_faccessat, AT_FDCWD, full, F_OK)) {
        if (!atomic_exchange(&logged_full, 1)) note(0, op, "full", path);
        return ENOSPC;
    }
    return found;
}

static int judge(const char *op, const char *path) {
    if (inside) return 0;
    inside = 1;
    int before = errno, found = fate(op, path);
    errno = before;
    inside = 0;
    return found;
}

static int of_path(const char *op, int folder, const char *path) {
    if (!path || !ready()) return 0;
    char whole[2 * PATH_MAX];
    if (*path == '/') return judge(op, path);
    char link[64];
    if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, whole, PATH_MAX);
    if (size <= 0) return 0;
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return judge(op, whole);
}

static int of_fd(const char *op, int fd) {
    if (fd < 0 || !ready()) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (size <= 0 || *path != '/') return 0;
    path[size] = 0;
    return judge(op, path);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_WITH(error, result) \
    do { int e_ = (error); if (e_ > 0) { errno = e_; return result; } } while (0)

static const char *opening(int flags) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? "create" : (flags & O_ACCMODE) == O_RDONLY ? "open" : "reopen";
}

#define MODE_OF(flags) \
    mode_t mode = 0; \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); MODE_OF(flags) FAIL_WITH(of_path(opening(flags), AT_FDCWD, path), -1); return real(path, flags, mode); }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); MODE_OF(flags) FAIL_WITH(of_path(opening(flags), folder, path), -1); return real(folder, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define LESS(error, count) ((error) == SHORT && (count) > 1 ? (count) / 2 : (count))
#define TRANSFER(name, op, type, ...) \
    ssize_t name(int fd, type data, size_t count) { \
        REAL(name); int e = of_fd(op, fd); FAIL_WITH(e, -1); return real(fd, data, LESS(e, count)); }
#define TRANSFER_AT(name, op, type, offset_type) \
    ssize_t name(int fd, type data, size_t count, offset_type offset) { \
        REAL(name); int e = of_fd(op, fd); FAIL_WITH(e, -1); return real(fd, data, LESS(e, count), offset); }
TRANSFER(read, "read", void *) TRANSFER(write, "write", const void *)
TRANSFER_AT(pread, "read", void *, off_t) TRANSFER_AT(pread64, "read", void *, off64_t)
TRANSFER_AT(pwrite, "write", const void *, off_t) TRANSFER_AT(pwrite64, "write", const void *, off64_t)

/* A short transfer of a vector moves its first buffer only. */
#define FEWER(error, count) ((error) == SHORT && (count) > 1 ? 1 : (count))
#define VECTOR(name, op) \
    ssize_t name(int fd, const struct iovec *data, int count) { \
        REAL(name); int e = of_fd(op, fd); FAIL_WITH(e, -1); return real(fd, data, FEWER(e, count)); }
#define VECTOR_AT(name, op, offset_type) \
    ssize_t name(int fd, const struct iovec *data, int count, offset_type offset) { \
        REAL(name); int e = of_fd(op, fd); FAIL_WITH(e, -1); return real(fd, data, FEWER(e, count), offset); }
VECTOR(readv, "read") VECTOR(writev, "write")
VECTOR_AT(preadv, "read", off_t) VECTOR_AT(preadv64, "read", off64_t)
VECTOR_AT(pwritev, "write", off_t) VECTOR_AT(pwritev64, "write", off64_t)

#define OF_FD(name, op) \
    int name(int fd) { REAL(name); FAIL_WITH(of_fd(op, fd), -1); return real(fd); }
OF_FD(fsync, "fsync") OF_FD(fdatasync, "fsync")

/* The descriptor is gone even when close reports an error of an earlier write. */
int close(int fd) {
    REAL(close);
    int e = of_fd("close", fd), result = real(fd);
    FAIL_WITH(e, -1);
    return result;
}

int ftruncate(int fd, off_t size) { REAL(ftruncate); FAIL_WITH(of_fd("truncate", fd), -1); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); FAIL_WITH(of_fd("truncate", fd), -1); return real(fd, size); }
int posix_fallocate64(int fd, off64_t from, off64_t size) {
    REAL(posix_fallocate64);
    int e = of_fd("truncate", fd);
    return e > 0 ? e : real(fd, from, size);
}

#define TWO_PATHS(name, op) \
    int name(const char *from, const char *to) { \
        REAL(name); FAIL_WITH(of_path(op, AT_FDCWD, to), -1); return real(from, to); }
TWO_PATHS(rename, "rename") TWO_PATHS(link, "link")
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat); FAIL_WITH(of_path("rename", b, to), -1); return real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2); FAIL_WITH(of_path("rename", b, to), -1); return real(a, from, b, to, flags);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat); FAIL_WITH(of_path("link", b, to), -1); return real(a, from, b, to, flags);
}

#define ONE_PATH(name, op) \
    int name(const char *path) { REAL(name); FAIL_WITH(of_path(op, AT_FDCWD, path), -1); return real(path); }
ONE_PATH(unlink, "unlink") ONE_PATH(rmdir, "unlink")
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); FAIL_WITH(of_path("unlink", folder, path), -1); return real(folder, path, flags);
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); FAIL_WITH(of_path("mkdir", AT_FDCWD, path), -1); return real(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat); FAIL_WITH(of_path("mkdir", folder, path), -1); return real(folder, path, mode);
}
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    REAL(utimensat); FAIL_WITH(of_path("touch", folder, path), -1); return real(folder, path, times, flags);
}
DIR *opendir(const char *path) { REAL(opendir); FAIL_WITH(of_path("list", AT_FDCWD, path), NULL); return real(path); }

#define STAT(name, kind) \
    int name(const char *path, struct kind *found) { REAL(name); FAIL_WITH(of_path("stat", AT_FDCWD, path), -1); return real(path, found); }
STAT(stat, stat) STAT(stat64, stat64) STAT(lstat, stat) STAT(lstat64, stat64)
#define STATAT(name, kind) \
    int name(int folder, const char *path, struct kind *found, int flags) { \
        REAL(name); FAIL_WITH(of_path("stat", folder, path), -1); return real(folder, path, found, flags); }
STATAT(fstatat, stat) STATAT(fstatat64, stat64)
