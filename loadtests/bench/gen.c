/* gen.c - a load generator for chat completions that checks every byte it is sent: one thread, epoll, HTTP/1.1.
 *
 *   gen --port 8080 --connections 32 --seconds 5 --body chat.json --expect-model bench-model --forbid-model mock-model
 *
 * Closed loop by default: each connection sends its next request when the last answer is whole. With --rate the loop
 * is open: requests are due at random moments of a Poisson process whatever the gateway does, and time is counted
 * from the moment they were due. Bodies are taken by weight, keys in turn.
 *
 * What it checks, in every answer: status 200; the public model name in every chunk and the engine's name in none;
 * the chunks of a stream in sequence, none lost, none of another stream, as many as the body asked for; a chunk with
 * a finish reason, then the usage chunk exactly when the body asked for it, then [DONE], then nothing; a blank line
 * after every event. A body without the first or last word of the answer, or without usage, is bad too.
 *
 * It prints JSON lines: {"event":"start"} and {"event":"end"} around the measured window, so that whoever measures
 * the gateway's CPU can read the clocks at those moments, then one {"event":"result",…}. Times are milliseconds.
 */
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---------------------------------------------------------------- options */

struct body {
    struct buffer text;
    struct chat chat;
    long chunks; /* content chunks a stream must bring */
    double weight;
};

static struct {
    int port, connections;
    const char *path;
    double warmup_s, seconds, drain_s, stagger_s, rate;
    long requests;
    uint64_t seed;
    const char *expect, *forbid;
    struct body *bodies;
    int body_count;
    char **keys;
    long key_count;
} options = {.path = "/v1/chat/completions", .connections = 1, .drain_s = 30, .seed = 1, .port = 8080};

/* ---------------------------------------------------------------- random numbers: splitmix64 */

static uint64_t random_bits(void) {
    uint64_t z = options.seed += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform in (0, 1). */
static double random_unit(void) { return ((double)(random_bits() >> 11) + 0.5) / 9007199254740992.0; }

/* ---------------------------------------------------------------- histograms
 *
 * Counts of microseconds, exact below 512 µs and within 0.4 % above, so that an hour of chunks takes no more memory
 * than a second of them. */

#define FINE 256
#define BUCKETS (FINE * 26)
struct histogram {
    uint64_t count[BUCKETS], total;
};
static struct histogram first_byte, first_event, whole, delay, added_gap;

static int bucket_of(uint64_t us) {
    int shift = 0;
    while (us >> shift >= FINE * 2) shift++;
    int bucket = (int)(us >> shift) + shift * FINE;
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

static void record(struct histogram *h, uint64_t us) {
    h->count[bucket_of(us)]++;
    h->total++;
}

/* The q-quantile in milliseconds; 0 when nothing was recorded. */
static double quantile(const struct histogram *h, double q) {
    uint64_t rank = (uint64_t)(q * (double)(h->total ? h->total - 1 : 0)), seen = 0;
    for (int bucket = 0; h->total && bucket < BUCKETS; bucket++) {
        seen += h->count[bucket];
        if (seen <= rank) continue;
        int shift = bucket < FINE * 2 ? 0 : bucket / FINE - 1;
        return (double)((uint64_t)(bucket - shift * FINE) << shift) / 1000.0;
    }
    return 0;
}

/* ---------------------------------------------------------------- counters and faults */

enum fault {
    CONNECT, CUT_SHORT, STATUS, NOT_HTTP, WRONG_MODEL, ENGINE_NAME, LOST_CHUNK, FOREIGN_CHUNK, WRONG_COUNT, NO_FINISH,
    USAGE_SHOWN, USAGE_MISSING, NO_DONE, AFTER_DONE, BAD_FRAMING, ERROR_EVENT, BAD_BODY, FAULTS
};
static const char *const fault_names[FAULTS] = {
    "connect", "cut_short", "status", "not_http", "wrong_model", "engine_name", "lost_chunk", "foreign_chunk",
    "wrong_count", "no_finish", "usage_shown", "usage_missing", "no_done", "after_done", "bad_framing", "error_event",
    "bad_body"};
static long faults[FAULTS]; /* of the whole run, warm-up and drain included */
static char example[240];   /* the first fault in words */

static bool measuring; /* inside the window: only then are times and counts kept */
static long completed, chunks, connects, left_open, late;
static unsigned long long bytes_in;
static double inflight_seconds;

static void fault(enum fault what, const char *text, size_t length) {
    if (!faults[what]++ && !example[0]) {
        int n = snprintf(example, sizeof example, "%s: %.*s", fault_names[what], (int)(length < 160 ? length : 160), text);
        for (int i = 0; i < n && i < (int)sizeof example; i++)
            if (example[i] == '"' || example[i] == '\\' || example[i] < ' ') example[i] = '\'';
    }
}

/* ---------------------------------------------------------------- connections */

enum phase { IDLE, HEAD, BODY };
enum chunk_phase { SIZE, DATA, DATA_END, TRAILER };

struct connection {
    int fd;
    enum phase phase;
    bool wants_write, reused; /* reused: it has answered before, so a close before the first byte is only stale */
    uint64_t begins_us;       /* closed loop: when it joins in */
    /* the request */
    const struct body *body;
    char head[1024];
    size_t head_length, sent;
    uint64_t due_us;
    /* the response as HTTP */
    struct buffer response_head, text; /* text: a partial line of a stream, or the whole of a plain body */
    int status;
    bool chunked, close_after, saw_byte;
    long length_left; /* of a body with content-length; -1 when it ends with the connection */
    enum chunk_phase chunk_phase;
    char size_text[20];
    int size_length;
    size_t chunk_left;
    /* the response as a stream of events */
    long next_chunk;
    uint64_t last_stamp_us, last_seen_us;
    bool saw_event, finished, saw_usage, done, blank_due;
    char id[72];
    size_t id_length;
};

static int poller, inflight, refused;
static struct connection *connections;
static struct sockaddr_in address;
static long issued;
static bool stopping; /* no new requests */

static void watch(struct connection *c, int operation) {
    struct epoll_event event = {.events = EPOLLIN | (c->wants_write ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, operation, c->fd, &event);
}

static bool dial(struct connection *c) {
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    if (connect(c->fd, (void *)&address, sizeof address)) {
        fault(CONNECT, strerror(errno), strlen(strerror(errno)));
        close(c->fd);
        c->fd = -1;
        refused++;
        return false;
    }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->reused = c->wants_write = false;
    watch(c, EPOLL_CTL_ADD);
    connects++;
    return true;
}

static void hang_up(struct connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

/* ---------------------------------------------------------------- sending */

static const struct body *pick_body(void) {
    if (options.body_count == 1) return options.bodies;
    double total = 0, at;
    for (int i = 0; i < options.body_count; i++) total += options.bodies[i].weight;
    at = random_unit() * total;
    for (int i = 0; i < options.body_count; i++)
        if ((at -= options.bodies[i].weight) < 0) return &options.bodies[i];
    return &options.bodies[options.body_count - 1];
}

static void push_request(struct connection *c) {
    const struct buffer *text = &c->body->text;
    size_t total = c->head_length + text->length;
    while (c->sent < total) {
        struct iovec parts[2] = {{c->head + c->sent, c->head_length - c->sent}, {text->bytes, text->length}};
        struct iovec *first = parts;
        if (c->sent >= c->head_length) {
            parts[1].iov_base = text->bytes + (c->sent - c->head_length);
            parts[1].iov_len = total - c->sent;
            first = parts + 1;
        }
        ssize_t n = writev(c->fd, first, (int)(parts + 2 - first));
        if (n < 0) break; /* full: goes on at EPOLLOUT; broken: the read side says so */
        c->sent += (size_t)n;
    }
    bool more = c->sent < total;
    if (more != c->wants_write) {
        c->wants_write = more;
        watch(c, EPOLL_CTL_MOD);
    }
}

static void send_request(struct connection *c) {
    c->phase = HEAD;
    c->sent = 0;
    c->saw_byte = c->saw_event = c->finished = c->saw_usage = c->done = c->blank_due = false;
    c->next_chunk = 0;
    c->last_seen_us = 0;
    c->id_length = 0;
    c->response_head.length = c->text.length = 0;
    push_request(c);
}

static void finish_connection(struct connection *c) {
    c->phase = IDLE;
    inflight--;
}

/* Starts one request that was due at `due_us`. */
static void begin(struct connection *c, uint64_t due_us) {
    c->body = pick_body();
    c->due_us = due_us;
    const char *key = options.key_count ? options.keys[issued % options.key_count] : "sk-none";
    c->head_length = (size_t)snprintf(c->head, sizeof c->head,
                                      "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: gen/1\r\nAccept: */*\r\n"
                                      "Content-Type: application/json\r\nAuthorization: Bearer %s\r\n"
                                      "Content-Length: %zu\r\n\r\n",
                                      options.path, options.port, key, c->body->text.length);
    issued++;
    inflight++;
    if (c->fd < 0 && !dial(c)) {
        finish_connection(c);
        return;
    }
    send_request(c);
}

/* ---------------------------------------------------------------- checking what came back */

static bool contains(const char *text, size_t length, const char *needle) {
    return memmem(text, length, needle, strlen(needle)) != NULL;
}

/* A copy of the model check is made for every chunk, so the two ways to write it are prepared once. */
static char expect_tight[128], expect_loose[128];

static void check_model(const char *text, size_t length) {
    if (options.expect && !contains(text, length, expect_tight) && !contains(text, length, expect_loose))
        fault(WRONG_MODEL, text, length);
    if (options.forbid && contains(text, length, options.forbid)) fault(ENGINE_NAME, text, length);
}

/* All chunks of a stream carry the id of its first. */
static void check_id(struct connection *c, const char *text, size_t length) {
    const char *id = memmem(text, length, "chatcmpl-", 9);
    size_t room = id ? (size_t)(text + length - id) : 0, id_length = 0;
    while (id_length < room && id_length < sizeof c->id && id[id_length] != '"') id_length++;
    if (!c->id_length) {
        memcpy(c->id, id ? id : "", id_length);
        c->id_length = id_length;
    }
    if (id_length != c->id_length || memcmp(id ? id : "", c->id, id_length) != 0) fault(FOREIGN_CHUNK, text, length);
}

/* A content chunk: its stamp tells the one-way delay, its number whether one is missing. */
static void content_chunk(struct connection *c, const char *stamp, const char *text, size_t length, uint64_t now) {
    uint64_t sent_us = strtoull(stamp + 2, NULL, 10);
    long number = stamp[18] == '#' ? strtol(stamp + 19, NULL, 10) : -1;
    if (number != c->next_chunk) fault(LOST_CHUNK, text, length);
    c->next_chunk = number + 1;
    if (measuring) {
        chunks++;
        record(&delay, now > sent_us ? now - sent_us : 0);
        if (c->last_seen_us) {
            uint64_t gap = now - c->last_seen_us, made_gap = sent_us - c->last_stamp_us;
            record(&added_gap, gap > made_gap ? gap - made_gap : 0);
        }
    }
    c->last_seen_us = now;
    c->last_stamp_us = sent_us;
}

/* One line of a stream, without its line feed. */
static void stream_line(struct connection *c, const char *line, size_t length, uint64_t now) {
    if (length && line[length - 1] == '\r') length--;
    if (c->blank_due != (length == 0)) fault(BAD_FRAMING, line, length);
    c->blank_due = length != 0;
    if (!length || line[0] == ':') return; /* a blank line, or a comment: a heartbeat */
    if (c->done) fault(AFTER_DONE, line, length);
    if (length < 6 || memcmp(line, "data: ", 6) != 0) {
        fault(BAD_FRAMING, line, length);
        return;
    }
    if (named(line + 6, length - 6, "[DONE]")) {
        c->done = true;
        return;
    }
    if (!c->saw_event) {
        c->saw_event = true;
        if (measuring) record(&first_event, now - c->due_us);
    }
    const char *stamp = memmem(line, length, "\"@T", 3);
    if (!stamp && contains(line, length, "{\"error\"")) {
        fault(ERROR_EVENT, line, length);
        return;
    }
    check_model(line, length);
    check_id(c, line, length);
    if (stamp && stamp + 20 < line + length) {
        content_chunk(c, stamp + 1, line, length, now);
    } else if (contains(line, length, "\"stop\"")) {
        c->finished = true;
    } else if (contains(line, length, "\"completion_tokens\"")) {
        if (!c->body->chat.include_usage) fault(USAGE_SHOWN, line, length);
        c->saw_usage = true;
    }
}

static void check_stream_end(const struct connection *c) {
    if (c->next_chunk != c->body->chunks) fault(WRONG_COUNT, c->head, 0);
    if (!c->finished) fault(NO_FINISH, c->head, 0);
    if (!c->done) fault(NO_DONE, c->head, 0);
    if (c->body->chat.include_usage && !c->saw_usage) fault(USAGE_MISSING, c->head, 0);
    if (c->text.length || c->blank_due) fault(BAD_FRAMING, c->head, 0);
}

static void check_plain_body(const struct connection *c) {
    const char *text = c->text.bytes;
    size_t length = c->text.length;
    check_model(text, length);
    if (!length || text[0] != '{' || text[length - 1] != '}' || !contains(text, length, "First word.") ||
        !contains(text, length, "Last word.") || !contains(text, length, "\"total_tokens\""))
        fault(BAD_BODY, text ? text : "", length);
}

/* ---------------------------------------------------------------- receiving */

/* Bytes of the body, out of their HTTP framing. */
static void body_bytes(struct connection *c, const char *bytes, size_t length, uint64_t now) {
    if (c->status != 200 || !c->body->chat.stream) {
        buffer_append(&c->text, bytes, length);
        return;
    }
    while (length) {
        const char *eol = memchr(bytes, '\n', length);
        if (!eol) {
            buffer_append(&c->text, bytes, length);
            return;
        }
        size_t line = (size_t)(eol - bytes);
        if (c->text.length) {
            buffer_append(&c->text, bytes, line);
            stream_line(c, c->text.bytes, c->text.length, now);
            c->text.length = 0;
        } else {
            stream_line(c, bytes, line, now);
        }
        bytes += line + 1;
        length -= line + 1;
    }
}

/* Reads the status line and the three headers that frame the body. False when it is no HTTP. */
static bool parse_head(struct connection *c) {
    const char *head = c->response_head.bytes, *end = head + c->response_head.length;
    if (memcmp(head, "HTTP/1.", 7) != 0) return false;
    c->status = atoi(head + 9);
    c->chunked = false;
    c->close_after = head[7] == '0';
    c->length_left = -1;
    c->chunk_phase = SIZE;
    c->size_length = 0;
    for (const char *eol = memchr(head, '\n', (size_t)(end - head)); eol && eol + 1 < end;
         eol = memchr(eol + 1, '\n', (size_t)(end - eol - 1))) {
        const char *line = eol + 1;
        if (!strncasecmp(line, "content-length:", 15)) c->length_left = atol(line + 15);
        if (!strncasecmp(line, "transfer-encoding:", 18)) c->chunked = true;
        if (!strncasecmp(line, "connection: close", 17)) c->close_after = true;
    }
    return true;
}

/* Takes bytes of a chunked body. True when the body has ended. */
static bool chunked_bytes(struct connection *c, const char *bytes, size_t length, uint64_t now) {
    while (length) {
        if (c->chunk_phase == DATA) {
            size_t n = length < c->chunk_left ? length : c->chunk_left;
            body_bytes(c, bytes, n, now);
            bytes += n, length -= n, c->chunk_left -= n;
            if (!c->chunk_left) c->chunk_phase = DATA_END;
            continue;
        }
        char byte = *bytes;
        bytes++, length--;
        if (byte != '\n') {
            if (byte != '\r' && c->size_length < (int)sizeof c->size_text - 1) c->size_text[c->size_length++] = byte;
            continue;
        }
        c->size_text[c->size_length] = 0;
        bool empty = c->size_length == 0;
        c->size_length = 0;
        if (c->chunk_phase == TRAILER) {
            if (empty) return true;
        } else if (c->chunk_phase == DATA_END) {
            c->chunk_phase = SIZE;
        } else {
            c->chunk_left = strtoul(c->size_text, NULL, 16);
            c->chunk_phase = c->chunk_left ? DATA : TRAILER;
        }
    }
    return false;
}

/* Takes bytes of the response. 1 when it is whole, 0 when more must come, -1 when it is no HTTP. */
static int response_bytes(struct connection *c, const char *bytes, size_t length, uint64_t now) {
    if (c->phase == HEAD) {
        size_t before = c->response_head.length;
        buffer_append(&c->response_head, bytes, length);
        char *end = memmem(c->response_head.bytes, c->response_head.length, "\r\n\r\n", 4);
        if (!end) return c->response_head.length > 65536 ? -1 : 0;
        size_t head = (size_t)(end - c->response_head.bytes) + 4;
        bytes += head - before, length -= head - before;
        c->response_head.length = head;
        if (!parse_head(c)) return -1;
        if (c->status == 100) { /* an interim response: the real one follows */
            c->response_head.length = 0;
            return length ? response_bytes(c, bytes, length, now) : 0;
        }
        c->phase = BODY;
    }
    if (c->chunked) return chunked_bytes(c, bytes, length, now);
    if (c->length_left < 0) { /* ends with the connection */
        body_bytes(c, bytes, length, now);
        return 0;
    }
    size_t n = length < (size_t)c->length_left ? length : (size_t)c->length_left;
    body_bytes(c, bytes, n, now);
    c->length_left -= (long)n;
    return c->length_left == 0;
}

static void answered(struct connection *c, uint64_t now) {
    if (c->status != 200)
        fault(STATUS, c->text.bytes ? c->text.bytes : "", c->text.length);
    else if (c->body->chat.stream)
        check_stream_end(c);
    else
        check_plain_body(c);
    if (measuring && c->status == 200) {
        completed++;
        record(&whole, now - c->due_us);
    }
    if (c->close_after) hang_up(c);
    c->reused = true;
    finish_connection(c);
}

/* The connection ended or broke. */
static void broken(struct connection *c, const char *why) {
    uint64_t now = now_us();
    if (c->phase == BODY && !c->chunked && c->length_left < 0) {
        c->close_after = true;
        answered(c, now);
        return;
    }
    hang_up(c);
    if (c->phase == IDLE) return;
    if (c->reused && !c->saw_byte && dial(c)) { /* closed while idle: the request goes again */
        send_request(c);
        return;
    }
    fault(CUT_SHORT, why, strlen(why));
    finish_connection(c);
}

static void receive(struct connection *c) {
    static char bytes[262144];
    while (c->fd >= 0) {
        ssize_t n = recv(c->fd, bytes, sizeof bytes, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            broken(c, n ? strerror(errno) : "end of file");
            return;
        }
        uint64_t now = now_us();
        if (measuring) bytes_in += (unsigned long long)n;
        if (c->phase == IDLE) { /* bytes after the end of an answer */
            fault(NOT_HTTP, bytes, (size_t)n);
            hang_up(c);
            return;
        }
        if (!c->saw_byte) {
            c->saw_byte = true;
            if (measuring) record(&first_byte, now - c->due_us);
        }
        int whole_answer = response_bytes(c, bytes, (size_t)n, now);
        if (whole_answer < 0) {
            fault(NOT_HTTP, bytes, (size_t)n);
            hang_up(c);
            finish_connection(c);
        } else if (whole_answer) {
            answered(c, now);
        }
        if ((size_t)n < sizeof bytes) return;
    }
}

/* ---------------------------------------------------------------- when requests begin */

static bool may_begin(void) { return !stopping && (!options.requests || issued < options.requests); }

/* Closed loop: an idle connection sends again at once. One that was refused a connection is out of the run. */
static void closed_loop(struct connection *c, uint64_t now) {
    if (c->phase == IDLE && may_begin()) begin(c, now);
}

static uint64_t next_arrival_us;
static int idle_cursor;

/* Open loop: starts what is due, as long as a connection is free. */
static void open_loop(uint64_t now) {
    while (may_begin() && next_arrival_us <= now) {
        if (inflight == options.connections) return; /* none free: it stays due, and its clock runs */
        while (connections[idle_cursor].phase != IDLE) idle_cursor = (idle_cursor + 1) % options.connections;
        if (measuring && now > next_arrival_us + 10000) late++;
        begin(&connections[idle_cursor], next_arrival_us);
        next_arrival_us += (uint64_t)(-log(random_unit()) / options.rate * 1e6);
    }
}

static void begin_due(uint64_t now) {
    static int joined; /* connections that have joined the closed loop */
    if (options.rate > 0) {
        open_loop(now);
        return;
    }
    while (joined < options.connections && connections[joined].begins_us <= now) closed_loop(&connections[joined++], now);
}

/* Milliseconds epoll may sleep. */
static int sleep_ms(uint64_t now, uint64_t until) {
    if (options.rate > 0 && !stopping && next_arrival_us < until) until = next_arrival_us;
    if (until <= now) return 0;
    uint64_t ms = (until - now + 999) / 1000;
    return ms > 20 ? 20 : (int)ms;
}

static void turn(uint64_t until) {
    static struct epoll_event events[512];
    uint64_t now = now_us(), before = now;
    begin_due(now);
    int n = epoll_wait(poller, events, 512, sleep_ms(now, until));
    for (int i = 0; i < n; i++) {
        struct connection *c = events[i].data.ptr;
        if (c->fd < 0) continue;
        if (events[i].events & EPOLLOUT && c->phase != IDLE) push_request(c);
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
        if (options.rate <= 0 && c->phase == IDLE) closed_loop(c, now_us());
    }
    if (measuring) inflight_seconds += (double)inflight * (double)(now_us() - before) / 1e6;
}

static void run_until(uint64_t until) {
    while (now_us() < until) {
        if (options.requests && !may_begin() && !inflight) return;
        if (refused >= options.connections && !inflight) return; /* nobody listens */
        turn(until);
    }
}

/* ---------------------------------------------------------------- start and report */

static void add_body(const char *argument) {
    char name[1024];
    snprintf(name, sizeof name, "%s", argument);
    char *weight = strrchr(name, '=');
    if (weight) *weight++ = 0;
    FILE *file = fopen(name, "rb");
    if (!file) give_up(name);
    options.bodies = realloc(options.bodies, (size_t)(options.body_count + 1) * sizeof *options.bodies);
    struct body *body = &options.bodies[options.body_count++];
    memset(body, 0, sizeof *body);
    body->weight = weight ? atof(weight) : 1;
    char block[65536];
    for (size_t n; (n = fread(block, 1, sizeof block, file)) > 0;) buffer_append(&body->text, block, n);
    fclose(file);
    body->chat = read_chat(body->text.bytes, body->text.length);
    body->chunks = plan_number(&body->chat, "n", 64);
}

static void read_keys(const char *name) {
    FILE *file = fopen(name, "r");
    if (!file) give_up(name);
    char line[512];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\r\n")] = 0;
        if (!line[0]) continue;
        options.keys = realloc(options.keys, (size_t)(options.key_count + 1) * sizeof *options.keys);
        options.keys[options.key_count++] = strdup(line);
    }
    fclose(file);
}

static void usage(void) {
    fputs("usage: gen --port PORT --body FILE[=WEIGHT]… [options]\n"
          "  --path PATH            default /v1/chat/completions\n"
          "  --connections N        concurrent requests (default 1)\n"
          "  --seconds S            length of the measured window     --warmup S   time before it, not counted\n"
          "  --requests N           end after so many requests instead\n"
          "  --drain S              wait so long for running answers at the end (default 30; 0: hang up on them)\n"
          "  --stagger S            closed loop: connections join in evenly over this time\n"
          "  --rate R               open loop: R requests a second, Poisson      --seed N   default 1\n"
          "  --keys FILE            one key a line, used in turn as Authorization: Bearer\n"
          "  --expect-model NAME    must stand in every answer and chunk    --forbid-model NAME   must stand in none\n",
          stderr);
    exit(2);
}

static void read_options(int argc, char **argv) {
    static const struct option known[] = {
        {"port", 1, 0, 'p'}, {"body", 1, 0, 'b'}, {"path", 1, 0, 'u'}, {"connections", 1, 0, 'c'},
        {"seconds", 1, 0, 't'}, {"warmup", 1, 0, 'w'}, {"requests", 1, 0, 'n'}, {"drain", 1, 0, 'd'},
        {"stagger", 1, 0, 'g'}, {"rate", 1, 0, 'r'}, {"seed", 1, 0, 's'}, {"keys", 1, 0, 'k'},
        {"expect-model", 1, 0, 'e'}, {"forbid-model", 1, 0, 'f'}, {0, 0, 0, 0}};
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) switch (option) {
            case 'p': options.port = atoi(optarg); break;
            case 'b': add_body(optarg); break;
            case 'u': options.path = optarg; break;
            case 'c': options.connections = atoi(optarg); break;
            case 't': options.seconds = atof(optarg); break;
            case 'w': options.warmup_s = atof(optarg); break;
            case 'n': options.requests = atol(optarg); break;
            case 'd': options.drain_s = atof(optarg); break;
            case 'g': options.stagger_s = atof(optarg); break;
            case 'r': options.rate = atof(optarg); break;
            case 's': options.seed = strtoull(optarg, NULL, 10); break;
            case 'k': read_keys(optarg); break;
            case 'e': options.expect = optarg; break;
            case 'f': options.forbid = optarg; break;
            default: usage();
        }
    if (!options.body_count || (!options.seconds && !options.requests)) usage();
    snprintf(expect_tight, sizeof expect_tight, "\"model\":\"%s\"", options.expect ? options.expect : "");
    snprintf(expect_loose, sizeof expect_loose, "\"model\": \"%s\"", options.expect ? options.expect : "");
}

static void announce(const char *event) {
    printf("{\"event\":\"%s\",\"at\":%.6f}\n", event, (double)now_us() / 1e6);
    fflush(stdout);
}

static void print_times(const char *name, const struct histogram *h) {
    printf("\"%s\":{\"count\":%llu,\"p50\":%.3f,\"p99\":%.3f,\"p999\":%.3f,\"max\":%.3f},", name,
           (unsigned long long)h->total, quantile(h, .5), quantile(h, .99), quantile(h, .999), quantile(h, 1));
}

static void report(double elapsed) {
    printf("{\"event\":\"result\",\"elapsed\":%.4f,\"completed\":%ld,\"chunks\":%ld,\"requests_per_second\":%.2f,"
           "\"chunks_per_second\":%.1f,\"mean_inflight\":%.2f,\"connects\":%ld,\"left_open\":%ld,\"late\":%ld,"
           "\"bytes_in\":%llu,",
           elapsed, completed, chunks, (double)completed / elapsed, (double)chunks / elapsed,
           inflight_seconds / elapsed, connects, left_open, late, bytes_in);
    print_times("first_byte", &first_byte);
    print_times("first_event", &first_event);
    print_times("whole", &whole);
    print_times("delay", &delay);
    print_times("added_gap", &added_gap);
    printf("\"faults\":{");
    for (int i = 0, some = 0; i < FAULTS; i++)
        if (faults[i]) printf("%s\"%s\":%ld", some++ ? "," : "", fault_names[i], faults[i]);
    printf("},\"example\":\"%s\"}\n", example);
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    address = (struct sockaddr_in){.sin_family = AF_INET,
                                   .sin_port = htons((uint16_t)options.port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    poller = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc((size_t)options.connections, sizeof *connections);
    if (!connections) give_up("memory");
    uint64_t start = now_us();
    next_arrival_us = start;
    for (int i = 0; i < options.connections; i++) {
        connections[i].fd = -1;
        connections[i].begins_us = start + (uint64_t)(options.stagger_s * 1e6 * i / options.connections);
    }
    uint64_t window = start + (uint64_t)(options.warmup_s * 1e6);
    run_until(window);
    measuring = true;
    window = now_us();
    announce("start");
    run_until(options.seconds ? window + (uint64_t)(options.seconds * 1e6) : UINT64_MAX);
    measuring = false;
    double elapsed = (double)(now_us() - window) / 1e6;
    announce("end");
    stopping = true;
    for (uint64_t until = now_us() + (uint64_t)(options.drain_s * 1e6); inflight && now_us() < until;) turn(until);
    left_open = inflight;
    report(elapsed);
    return 0;
}
