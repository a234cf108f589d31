/* Lets one call to the C library fail as on a broken disk: loaded before it (LD_PRELOAD), it stands
 * where a program asks the system for a file. Only files below a directory count.
 *
 * FAULTS="DIRECTORY KIND NTH ERRNO FOR_GOOD" arms it: the NTH call of this kind fails, and where
 * FOR_GOOD is 1 every later one of the same file too. KIND "-" lets none fail. faults_arm does the
 * same in a process that runs already. counts: a file of one uint64 a kind, where calls are counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, READ, WRITE, FSYNC, RENAME, FLOCK, MKDIR, UNLINK, KINDS };
static const char *NAMES[KINDS] = {"open", "read", "write", "fsync",
                                   "rename", "flock", "mkdir", "unlink"};
static char directory[PATH_MAX], failing[2 * PATH_MAX];
static int armed, kind_that_fails = -1, number, for_good;
static long nth;
static _Atomic uint64_t own[KINDS], *counts = own;

void faults_arm(const char *below, const char *kind, long which, int error, int lasting,
                const char *counted) {
    snprintf(directory, sizeof directory, "%s/", below);
    kind_that_fails = -1;
    for (int each = 0; each < KINDS; each++)
        if (!strcmp(kind, NAMES[each])) kind_that_fails = each;
    nth = which;
    number = error;
    for_good = lasting;
    failing[0] = 0;
    if (counted[0]) {
        int handle = open(counted, O_RDWR);
        counts = mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
        close(handle);
    }
    armed = 1;
}

__attribute__((constructor)) static void from_environment(void) {
    char below[PATH_MAX], kind[32];
    long which;
    int error, lasting;
    const char *text = getenv("FAULTS");
    if (text && sscanf(text, "%4095s %31s %ld %d %d", below, kind, &which, &error, &lasting) == 5)
        faults_arm(below, kind, which, error, lasting, "");
}

/* Returns whether a call about a file is to fail; errno is then set. */
static int fails(int kind, const char *path) {
    if (!armed) return 0;
    int before = errno;
    char whole[2 * PATH_MAX];
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        if (!getcwd(whole, PATH_MAX)) return 0;
        strcat(whole, "/");
        strncat(whole, path, PATH_MAX - 1);
    }
    errno = before;
    if (strncmp(whole, directory, strlen(directory))) return 0;
    uint64_t count = atomic_fetch_add(&counts[kind], 1) + 1;
    if (kind != kind_that_fails) return 0;
    int hit = count == (uint64_t)nth;
    if (hit) {
        snprintf(failing, sizeof failing, "%s", whole);
        const char *told = getenv("FAULTS_TOLD");
        FILE *file = told ? fopen(told, "w") : NULL;
        if (file) {
            fprintf(file, "%s", whole);
            fclose(file);
        }
    }
    if (!hit && !(for_good && !strcmp(failing, whole))) return 0;
    errno = number;
    return 1;
}

static int fails_of(int kind, int handle) {
    if (!armed) return 0;
    int before = errno;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return path[0] == '/' && fails(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPENS(name)                                                          \
    int name(const char *path, int flags, ...) {                             \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        return fails(OPEN, path) ? -1 : REAL(name)(path, flags, mode);       \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                       \
    int name(int at, const char *path, int flags, ...) {                     \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        int failed = path[0] == '/' || at == AT_FDCWD ? fails(OPEN, path) : fails_of(OPEN, at); \
        return failed ? -1 : REAL(name)(at, path, flags, mode);              \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t read(int handle, void *to, size_t size) {
    return fails_of(READ, handle) ? -1 : REAL(read)(handle, to, size);
}
ssize_t pread(int handle, void *to, size_t size, off_t at) {
    return fails_of(READ, handle) ? -1 : REAL(pread)(handle, to, size, at);
}
ssize_t pread64(int handle, void *to, size_t size, off64_t at) {
    return fails_of(READ, handle) ? -1 : REAL(pread64)(handle, to, size, at);
}
ssize_t write(int handle, const void *from, size_t size) {
    return fails_of(WRITE, handle) ? -1 : REAL(write)(handle, from, size);
}
ssize_t writev(int handle, const struct iovec *from, int count) {
    return fails_of(WRITE, handle) ? -1 : REAL(writev)(handle, from, count);
}
ssize_t pwrite(int handle, const void *from, size_t size, off_t at) {
    return fails_of(WRITE, handle) ? -1 : REAL(pwrite)(handle, from, size, at);
}
ssize_t pwrite64(int handle, const void *from, size_t size, off64_t at) {
    return fails_of(WRITE, handle) ? -1 : REAL(pwrite64)(handle, from, size, at);
}
int fsync(int handle) { return fails_of(FSYNC, handle) ? -1 : REAL(fsync)(handle); }
int fdatasync(int handle) { return fails_of(FSYNC, handle) ? -1 : REAL(fdatasync)(handle); }
int rename(const char *from, const char *to) {
    return fails(RENAME, to) ? -1 : REAL(rename)(from, to);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    return fails(RENAME, to) ? -1 : REAL(renameat)(from_at, from, to_at, to);
}
int flock(int handle, int how) { return fails_of(FLOCK, handle) ? -1 : REAL(flock)(handle, how); }
int mkdir(const char *path, mode_t mode) {
    return fails(MKDIR, path) ? -1 : REAL(mkdir)(path, mode);
}
int unlink(const char *path) { return fails(UNLINK, path) ? -1 : REAL(unlink)(path); }
