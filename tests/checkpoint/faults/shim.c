/* Counts the system calls of a save that change a disk, writes them down, and makes the one it is told to go wrong.
   FAULT_AT: which call (from 1); FAULT: kill, stop, torn (half of a write, then kill), short (half of a write), cut (the file
   system in POWER_CUT forgets all that is not on its disk, then kill) or an errno. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int armed = 0, count = 0, at = 0, sticky = 0, log_fd = -1;
static const char *fault = "";

void shim_arm(int n, const char *what, int stays, const char *log_path) {
    at = n; fault = strdup(what); sticky = stays; count = 0;
    log_fd = log_path[0] ? open(log_path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    armed = 1;
}
int shim_disarm(void) { armed = 0; return count; }

/* EXT4_IOC_SHUTDOWN without flushing the log: what a power cut leaves */
void shim_cut(void) {
    unsigned int no_log_flush = 2;
    int folder = open(getenv("POWER_CUT"), O_RDONLY | O_DIRECTORY);
    if (folder < 0 || ioctl(folder, 0x8004587d, &no_log_flush)) _exit(3);
    kill(getpid(), SIGKILL);
    pause();
}

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
    if (!strcmp(fault, "stop")) { kill(getpid(), SIGSTOP); return 0; }
    if (!strcmp(fault, "cut")) shim_cut();
    if (!strcmp(fault, "torn")) return 3;
    if (!strcmp(fault, "short")) return 2;
    errno = atoi(fault);
    return 1;
}
#define REAL(ret, name, ...) static ret (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
static void die(void) { kill(getpid(), SIGKILL); pause(); }

/* Pipes, sockets and what a program prints are not on a disk. */
static int elsewhere(int fd) {
    struct stat s;
    return fd <= 2 || fd == log_fd || fstat(fd, &s) || !S_ISREG(s.st_mode);
}

ssize_t write(int fd, const void *buf, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (elsewhere(fd)) return real(fd, buf, n);
    int d = decide("write", NULL, fd);
    if (d == 1) return -1;
    if (d == 2) return real(fd, buf, n > 1 ? n / 2 : n);
    if (d == 3) { real(fd, buf, n / 2); die(); }
    return real(fd, buf, n);
}
ssize_t pwrite64(int fd, const void *buf, size_t n, off64_t at_byte) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    if (elsewhere(fd)) return real(fd, buf, n, at_byte);
    int d = decide("write", NULL, fd);
    if (d == 1) return -1;
    if (d == 2) return real(fd, buf, n > 1 ? n / 2 : n, at_byte);
    if (d == 3) { real(fd, buf, n / 2, at_byte); die(); }
    return real(fd, buf, n, at_byte);
}
ssize_t pwrite(int fd, const void *buf, size_t n, off_t at_byte) { return pwrite64(fd, buf, n, at_byte); }

/* Half of several pieces is half of each one's share: all before the middle, and the one that straddles it cut. */
ssize_t writev(int fd, const struct iovec *pieces, int k) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (elsewhere(fd)) return real(fd, pieces, k);
    int d = decide("write", NULL, fd);
    if (d == 1) return -1;
    if (d == 0) return real(fd, pieces, k);
    struct iovec part[k];
    size_t all = 0;
    for (int i = 0; i < k; i++) all += pieces[i].iov_len;
    size_t left = d == 2 && all == 1 ? 1 : all / 2;
    for (int i = 0; i < k; i++) {
        part[i] = pieces[i];
        if (part[i].iov_len > left) part[i].iov_len = left;
        left -= part[i].iov_len;
    }
    ssize_t n = real(fd, part, k);
    if (d == 3) die();
    return n;
}

/* Half of a copy: its length says more than there is, so half of what is left to read. */
static size_t half(int in, const off64_t *from, size_t n) {
    struct stat s;
    off64_t begin = from ? *from : lseek64(in, 0, SEEK_CUR);
    if (!fstat(in, &s) && S_ISREG(s.st_mode) && begin >= 0 && (off64_t)n > s.st_size - begin) n = s.st_size - begin;
    return n > 1 ? n / 2 : n;
}
ssize_t sendfile64(int out, int in, off64_t *from, size_t n) {
    REAL(ssize_t, sendfile64, int, int, off64_t *, size_t);
    if (elsewhere(out)) return real(out, in, from, n);
    int d = decide("write", NULL, out);
    if (d == 1) return -1;
    if (d == 2) return real(out, in, from, half(in, from, n));
    if (d == 3) { real(out, in, from, half(in, from, n)); die(); }
    return real(out, in, from, n);
}
ssize_t sendfile(int out, int in, off_t *from, size_t n) { return sendfile64(out, in, from, n); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned int flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned int);
    int d = decide("write", NULL, out);
    if (d == 1) return -1;
    if (d == 2) return real(in, from, out, to, half(in, from, n), flags);
    if (d == 3) { real(in, from, out, to, half(in, from, n), flags); die(); }
    return real(in, from, out, to, n, flags);
}

/* A call that is done whole or not at all. */
#define WHOLE(name, verb, path, fd, parameters, arguments) \
    int name parameters { \
        static int (*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        int d = decide(verb, path, fd); \
        if (d == 1) return -1; \
        if (d == 3) die(); \
        return real arguments; \
    }
WHOLE(fsync, "fsync", NULL, fd, (int fd), (fd))
WHOLE(fdatasync, "fsync", NULL, fd, (int fd), (fd))
WHOLE(ftruncate, "truncate", NULL, fd, (int fd, off_t n), (fd, n))
WHOLE(ftruncate64, "truncate", NULL, fd, (int fd, off64_t n), (fd, n))
WHOLE(truncate, "truncate", p, -1, (const char *p, off_t n), (p, n))
WHOLE(mkdir, "mkdir", p, -1, (const char *p, mode_t m), (p, m))
WHOLE(mkdirat, "mkdir", p, -1, (int a, const char *p, mode_t m), (a, p, m))
WHOLE(rename, "rename", q, -1, (const char *p, const char *q), (p, q))
WHOLE(renameat, "rename", q, -1, (int a, const char *p, int b, const char *q), (a, p, b, q))
WHOLE(renameat2, "rename", q, -1, (int a, const char *p, int b, const char *q, unsigned int f), (a, p, b, q, f))
WHOLE(link, "link", q, -1, (const char *p, const char *q), (p, q))
WHOLE(linkat, "link", q, -1, (int a, const char *p, int b, const char *q, int f), (a, p, b, q, f))
WHOLE(symlink, "link", q, -1, (const char *p, const char *q), (p, q))
WHOLE(symlinkat, "link", q, -1, (const char *p, int b, const char *q), (p, b, q))
WHOLE(unlink, "unlink", p, -1, (const char *p), (p))
WHOLE(unlinkat, f & AT_REMOVEDIR ? "rmdir" : "unlink", p, -1, (int fd, const char *p, int f), (fd, p, f))
WHOLE(rmdir, "rmdir", p, -1, (const char *p), (p))

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
int openat64(int a, const char *p, int flags, ...) {
    REAL(int, openat64, int, const char *, int, ...);
    va_list l; va_start(l, flags); mode_t m = va_arg(l, mode_t); va_end(l);
    int d = opening(p, flags);
    if (d == 1) return -1;
    if (d == 3) die();
    return real(a, p, flags, m);
}
int openat(int a, const char *p, int flags, ...) {
    va_list l; va_start(l, flags); mode_t m = va_arg(l, mode_t); va_end(l);
    return openat64(a, p, flags, m);
}
/* The C++ library opens with fopen, and then writes to the descriptor itself; a C program's fwrite would go unseen. */
FILE *fopen64(const char *p, const char *mode) {
    REAL(FILE *, fopen64, const char *, const char *);
    int d = strpbrk(mode, "wa+") ? decide("open", p, -1) : 0;
    if (d == 1) return NULL;
    if (d == 3) die();
    return real(p, mode);
}
FILE *fopen(const char *p, const char *mode) { return fopen64(p, mode); }
