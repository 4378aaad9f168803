/* The sockets of many sessions in one call, without the interpreter: see sockets.py, which declares and explains these.
 *
 * A service of 32 sessions reads and writes a thousand small WebSocket messages a token. Whatever is not one whole,
 * binary, masked frame (RFC 6455, 5.2) is handed on as it came.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

const uint32_t source = SOURCE; /* checksum of this file */

enum { BINARY = 0x82, MASKED = 0x80, TWO_BYTES = 126, KEY = 4, MOST_EVENTS = 256, HEADER = 48, NAP_NS = 20000, NAP_MISSING = 8 };
enum { MESSAGE = 0, BYTES = 1, END = 2, ANSWER = 3 };

/* What came of the socket `file`: `length` bytes of a message, bytes as they came, or its end; `at` counts from `space`.
 * Or the answer that was due: `at` is its volley and `length` its row there. */
typedef struct {
    int64_t file, what, at, length;
} Arrival;

/* The message that is due of a socket: this header, and a payload that goes to `answer`; nothing is, if that is NULL. */
typedef struct {
    uint8_t header[HEADER];
    uint8_t *answer;
    int64_t nbytes, volley, row;
} Due;

static void unmask(uint8_t *data, int64_t length, const uint8_t *key) {
    uint32_t key4;
    memcpy(&key4, key, KEY);
    const uint64_t key8 = (uint64_t)key4 << 32 | key4;
    int64_t i = 0;
    for (; i + 8 <= length; i += 8) {
        uint64_t eight;
        memcpy(&eight, data + i, 8);
        eight ^= key8;
        memcpy(data + i, &eight, 8);
    }
    for (; i < length; i++)
        data[i] ^= key[i % KEY];
}

/* Length of the head of the frame at `data`, of `length` payload bytes; 0 if it is not one to be unpacked here. */
static int64_t head_of(const uint8_t *data, int64_t size, int64_t largest, int64_t *length) {
    if (size < 2 + KEY || data[0] != BINARY || !(data[1] & MASKED))
        return 0;
    int64_t extended = data[1] ^ MASKED;
    int wide = extended < TWO_BYTES ? 0 : extended == TWO_BYTES ? 2 : 8;
    if (size < 2 + wide + KEY)
        return 0;
    if (wide) {
        extended = 0;
        for (int i = 0; i < wide; i++)
            extended = extended << 8 | data[2 + i]; /* beyond 2^63 it is negative, and refused by who gets it raw */
    }
    int64_t head = 2 + wide + KEY;
    if (extended < 0 || extended > largest || extended > size - head)
        return 0;
    *length = extended;
    return head;
}

/* Whether the message is the one that is due; if so it is where it belongs. */
static int answers(Due *due, const uint8_t *message, int64_t length) {
    if (!due->answer || length != HEADER + due->nbytes || memcmp(message, due->header, HEADER))
        return 0;
    memcpy(due->answer, message + HEADER, (size_t)due->nbytes);
    due->answer = NULL;
    return 1;
}

/* Reads what is readable; `missing` answers are due, and counted down. */
static int read_ready(int epoll, uint8_t *raw, Due *dues, int64_t largest, uint8_t *space, int64_t size,
                      int64_t chunk, Arrival *arrivals, int most, int64_t *at, int64_t *missing) {
    struct epoll_event events[MOST_EVENTS];
    int ready = epoll_wait(epoll, events, MOST_EVENTS, 0);
    int count = 0;
    for (int i = 0; i < ready && count < most && *at + chunk <= size; i++) { /* the others are ready the next time */
        int file = events[i].data.fd;
        ssize_t got = recv(file, space + *at, (size_t)chunk, MSG_DONTWAIT);
        if (got <= 0) {
            if (got == 0 || (errno != EAGAIN && errno != EINTR))
                arrivals[count++] = (Arrival){file, END, 0, 0};
            continue;
        }
        int64_t end = *at + got, length, head;
        while (*at < end && count < most - 1 && !raw[file] &&
               (head = head_of(space + *at, end - *at, largest, &length))) {
            uint8_t *payload = space + *at + head;
            unmask(payload, length, payload - KEY);
            if (answers(&dues[file], payload, length)) {
                arrivals[count++] = (Arrival){file, ANSWER, dues[file].volley, dues[file].row};
                --*missing;
            } else {
                arrivals[count++] = (Arrival){file, MESSAGE, *at + head, length};
            }
            *at += head + length;
        }
        if (*at < end) {
            arrivals[count++] = (Arrival){file, BYTES, *at, end - *at};
            raw[file] = 1; /* until its protocol says that a frame begins again */
        }
        *at = end;
    }
    return count;
}

int sockets_receive(int epoll, uint8_t *raw, Due *dues, int64_t largest, uint8_t *space, int64_t size,
                    int64_t chunk, Arrival *arrivals, int most, int64_t missing, int naps) {
    const struct timespec nap = {.tv_nsec = NAP_NS};
    int64_t at = 0;
    int count = read_ready(epoll, raw, dues, largest, space, size, chunk, arrivals, most, &at, &missing);
    for (int i = 0; i < naps && missing >= NAP_MISSING && count < most; i++) {
        nanosleep(&nap, NULL);
        count += read_ready(epoll, raw, dues, largest, space, size, chunk, arrivals + count, most - count, &at, &missing);
    }
    return count;
}

int sockets_send(int count, const int32_t *files, const uint8_t *data, int64_t *lengths) {
    int incomplete = 0;
    for (int i = 0; i < count; i++) {
        int64_t length = lengths[i];
        int blocked = 0; /* by an earlier message of the same socket */
        for (int j = 0; incomplete && j < i; j++)
            blocked |= files[j] == files[i] && lengths[j] != 0;
        ssize_t sent = -1;
        if (!blocked)
            do
                sent = send(files[i], data, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
            while (sent < 0 && errno == EINTR);
        data += length;
        lengths[i] = length - (sent > 0 ? sent : 0); /* what is left */
        incomplete += lengths[i] != 0;
    }
    return incomplete;
}

int sockets_post(int count, const int32_t *files, Due *dues, int64_t volley, const uint8_t *start, int start_bytes,
                 const uint8_t *headers, const uint8_t *data, int64_t row_bytes, const uint8_t *due_headers,
                 uint8_t *answers, int64_t due_bytes, int64_t *left) {
    int incomplete = 0;
    for (int i = 0; i < count; i++) {
        Due *due = &dues[files[i]];
        memcpy(due->header, due_headers + (int64_t)i * HEADER, HEADER);
        due->answer = answers + i * due_bytes;
        due->nbytes = due_bytes;
        due->volley = volley;
        due->row = i;
        struct iovec parts[] = {
            {(void *)start, (size_t)start_bytes},
            {(void *)(headers + (int64_t)i * HEADER), HEADER},
            {(void *)(data + i * row_bytes), (size_t)row_bytes},
        };
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
        ssize_t sent;
        do
            sent = sendmsg(files[i], &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (sent < 0 && errno == EINTR);
        left[i] = start_bytes + HEADER + row_bytes - (sent > 0 ? sent : 0);
        incomplete += left[i] != 0;
    }
    return incomplete;
}
