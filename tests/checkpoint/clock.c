/* A wall clock that is moved all the time: every reading is off by up to a day either way, by hours as where summer time
   begins and ends, or back by a second. Monotonic clocks are left alone, as the kernel leaves them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static long off(void) {
    static unsigned int state = 1;
    static const long jumps[] = {86400, -86400, 3600, -3600, -1, 0};
    state = state * 1103515245u + 12345u;
    return jumps[(state >> 16) % 6];
}
int clock_gettime(clockid_t which, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, t);
    if (!failed && which == CLOCK_REALTIME) t->tv_sec += off();
    return failed;
}
int gettimeofday(struct timeval *t, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(t, zone);
    if (!failed) t->tv_sec += off();
    return failed;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
