/* Makes one call on one file fail: an LD_PRELOAD library for the tests of faults.
 *
 * FAIL_CALL names the call (write, fsync, rename, flock), FAIL_FILE a part of the path it is
 * about, FAIL_ERRNO the error. They are read at every call, so that a test can change them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    const char *name = getenv("FAIL_CALL"), *file = getenv("FAIL_FILE"), *number = getenv("FAIL_ERRNO");
    if (!name || !file || !number || strcmp(name, call) || !strstr(path, file)) return 0;
    errno = atoi(number);
    return 1;
}

static int fails_on(const char *call, int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return fails_on("write", descriptor) ? -1 : real(descriptor, data, size);
}

int fsync(int descriptor) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    return fails_on("fsync", descriptor) ? -1 : real(descriptor);
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    return fails("rename", to) ? -1 : real(from, to);
}

int flock(int descriptor, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    return fails_on("flock", descriptor) ? -1 : real(descriptor, operation);
}
