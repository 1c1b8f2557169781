/* Counts the system calls of a save that change a disk, writes them down, and makes the one it is told to go wrong.
   FAULT_AT: which call (from 1); FAULT: kill, torn (half of a write, then kill), short (half of a write) or an errno. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int armed = 0, count = 0, at = 0, sticky = 0, log_fd = -1;
static const char *fault = "";

void shim_arm(int n, const char *what, int stays, const char *log_path) {
    at = n; fault = strdup(what); sticky = stays; count = 0;
    log_fd = log_path[0] ? open(log_path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    armed = 1;
}
int shim_disarm(void) { armed = 0; return count; }

/* 0: go on; 1: fail with errno; 2: do half of it and succeed; 3: do half of it, then die */
static int decide(const char *name, const char *path, int fd) {
    if (!armed) return 0;
    count++;
    if (log_fd >= 0) {
        char target[512] = "", link[64];
        if (fd >= 0) { snprintf(link, sizeof link, "/proc/self/fd/%d", fd); ssize_t n = readlink(link, target, 511); if (n > 0) target[n] = 0; }
        dprintf(log_fd, "%s %s\n", name, path ? path : target);
    }
    if (count != at && !(sticky && at && count > at)) return 0;
    if (!strcmp(fault, "kill")) { kill(getpid(), SIGKILL); pause(); }
    if (!strcmp(fault, "torn")) return 3;
    if (!strcmp(fault, "short")) return 2;
    errno = atoi(fault);
    return 1;
}
#define REAL(ret, name, ...) static ret (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
static void die(void) { kill(getpid(), SIGKILL); pause(); }

ssize_t write(int fd, const void *buf, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (fd <= 2 || fd == log_fd) return real(fd, buf, n);
    int d = decide("write", NULL, fd);
    if (d == 1) return -1;
    if (d == 2) return real(fd, buf, n > 1 ? n / 2 : n);
    if (d == 3) { real(fd, buf, n / 2); die(); }
    return real(fd, buf, n);
}
int fsync(int fd) {
    REAL(int, fsync, int);
    int d = decide("fsync", NULL, fd);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(fd);
}
int mkdir(const char *p, mode_t m) {
    REAL(int, mkdir, const char *, mode_t);
    int d = decide("mkdir", p, -1);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(p, m);
}
int renameat2(int a, const char *p, int b, const char *q, unsigned int f) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned int);
    int d = decide("rename", q, -1);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(a, p, b, q, f);
}
int rename(const char *p, const char *q) {
    REAL(int, rename, const char *, const char *);
    int d = decide("rename", q, -1);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(p, q);
}
static int opening(const char *p, int flags) {
    return (flags & (O_CREAT | O_WRONLY | O_RDWR)) ? decide("open", p, -1) : 0;
}
int open64(const char *p, int flags, ...) {
    REAL(int, open64, const char *, int, ...);
    va_list l; va_start(l, flags); mode_t m = va_arg(l, mode_t); va_end(l);
    int d = opening(p, flags);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(p, flags, m);
}
int open(const char *p, int flags, ...) {
    REAL(int, open, const char *, int, ...);
    va_list l; va_start(l, flags); mode_t m = va_arg(l, mode_t); va_end(l);
    int d = opening(p, flags);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(p, flags, m);
}
int unlinkat(int fd, const char *p, int f) {
    REAL(int, unlinkat, int, const char *, int);
    int d = decide(f & AT_REMOVEDIR ? "rmdir" : "unlink", p, -1);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(fd, p, f);
}
int unlink(const char *p) {
    REAL(int, unlink, const char *);
    int d = decide("unlink", p, -1);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(p);
}
int rmdir(const char *p) {
    REAL(int, rmdir, const char *);
    int d = decide("rmdir", p, -1);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(p);
}
