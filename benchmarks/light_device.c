/* Answers one token's exchanges of many devices without the interpreter: see light_device.py, which declares these.
 *
 * Whatever is not exactly the one frame that is due of a device is handed on as it came.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

enum { BINARY = 0x82, MASKED = 0x80, TWO_BYTES = 126, HEAD = 4, KEY = 4, HEADER = 48, MOST_RANK = 1024, MOST_EVENTS = 256 };
enum { OTHER = 0, BYTES = 1, DONE = 2, REST = 3 };

/* A device on its way through the layers of one token; `stage` counts the answers that it has given. */
typedef struct {
    int64_t short_way;       /* whether it is one: else all that comes is handed on */
    int64_t stage, inlined;  /* inlined: layers at which it answers */
    const uint8_t *up, *due; /* headers of v (inlined, 48), and of u and of h (inlined + 1, 48) */
    const float *const *m;   /* M (down, up) of each */
    int64_t h_bytes;
    int64_t received, sent; /* bytes */
    int64_t exchanges;      /* that were answered here, h's among them */
} Device;

/* What came of the socket `file`: `length` bytes at `at` of `space`; a negative length is an errno. */
typedef struct {
    int64_t file, what, at, length;
} Event;

static uint32_t next_key(uint64_t *random) { /* xorshift, RFC 6455's masking key */
    *random ^= *random << 13, *random ^= *random >> 7, *random ^= *random << 17;
    return (uint32_t)(*random >> 32);
}

/* v (up) = u (down) M, of bfloat16 bits; v is rounded to the nearest, halves away from zero. */
static void multiply(const uint8_t *u, const float *m, int down, int up, uint16_t *v) {
    float sums[3 * MOST_RANK] = {0};
    for (int i = 0; i < down; i += 4) {
        float x[4];
        for (int j = 0; j < 4; j++) {
            uint16_t half;
            memcpy(&half, u + 2 * (i + j), 2);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(&x[j], &bits, 4);
        }
        const float *row = m + (int64_t)i * up;
        for (int c = 0; c < up; c++)
            sums[c] += x[0] * row[c] + x[1] * row[up + c] + x[2] * row[2 * up + c] + x[3] * row[3 * up + c];
    }
    for (int c = 0; c < up; c++) {
        uint32_t bits;
        memcpy(&bits, &sums[c], 4);
        v[c] = (uint16_t)((bits + 0x8000) >> 16);
    }
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Serves the sockets that are readable until something is to be handed on; 0 when nothing came for `silence_ns`, or the
 * time is `until_ns`, however much comes meanwhile; else a negative errno. */
int serve(int epoll, Device *const *devices, int files, int down, int up, uint64_t *random, Event *events,
          uint8_t *space, int64_t chunk, int64_t silence_ns, int64_t until_ns) {
    struct epoll_event ready[MOST_EVENTS];
    uint8_t message[HEAD + KEY + HEADER + 2 * 3 * MOST_RANK];
    const int64_t u_bytes = 2 * down, v_bytes = 2 * up;
    int count = 0;
    while (!count) {
        int64_t left = until_ns - now_ns(), wait = left < silence_ns ? left : silence_ns;
        if (left <= 0) return 0;
        int some = epoll_wait(epoll, ready, MOST_EVENTS, (int)((wait + 999999) / 1000000));
        if (some < 0) return -errno;
        if (!some && wait < left) return 0; /* else the time has come, which the clock says next */
        for (int i = 0; i < some; i++) {
            int file = ready[i].data.fd;
            Device *one = file < files ? devices[file] : NULL;
            uint8_t *came = space + count * chunk;
            if (!one || ready[i].events != EPOLLIN) {
                events[count++] = (Event){file, OTHER, 0, 0};
                continue;
            }
            ssize_t n = recv(file, came, (size_t)chunk, MSG_DONTWAIT);
            if (n < 0 && (errno == EAGAIN || errno == EINTR))
                continue;
            int last = one->stage == one->inlined;
            if (!one->short_way || n != HEAD + HEADER + (last ? one->h_bytes : u_bytes) ||
                memcmp(came + HEAD, one->due + one->stage * HEADER, HEADER)) {
                events[count++] = (Event){file, BYTES, came - space, n < 0 ? -errno : n};
                continue;
            }
            one->received += n;
            one->exchanges++;
            if (last) {
                events[count++] = (Event){file, DONE, 0, 0};
                continue;
            }
            uint8_t *plain = message + HEAD + KEY;
            memcpy(plain, one->up + one->stage * HEADER, HEADER);
            multiply(came + HEAD + HEADER, one->m[one->stage++], down, up, (uint16_t *)(plain + HEADER));
            int64_t length = HEADER + v_bytes, whole = HEAD + KEY + length;
            uint32_t key = next_key(random);
            message[0] = BINARY, message[1] = MASKED | TWO_BYTES;
            message[2] = (uint8_t)(length >> 8), message[3] = (uint8_t)length;
            memcpy(message + HEAD, &key, KEY);
            for (int64_t j = 0; j < length; j += KEY) { /* of whole keys: `Devices.takes` */
                uint32_t four;
                memcpy(&four, plain + j, KEY);
                four ^= key;
                memcpy(plain + j, &four, KEY);
            }
            ssize_t sent = send(file, message, (size_t)whole, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (sent < 0 && errno != EAGAIN && errno != EINTR) {
                events[count++] = (Event){file, BYTES, 0, -errno};
                continue;
            }
            one->sent += sent > 0 ? sent : 0;
            if (sent < whole) {
                int64_t rest = whole - (sent > 0 ? sent : 0);
                memcpy(came, message + whole - rest, (size_t)rest);
                events[count++] = (Event){file, REST, came - space, rest};
            }
        }
    }
    return count;
}
