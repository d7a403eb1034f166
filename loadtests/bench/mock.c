/* mock.c - a mock engine that costs next to nothing: one thread, epoll, HTTP/1.1, answers shaped like vLLM's.
 *
 *   mock PORT        listens on 127.0.0.1, serves one model named "mock-model"
 *
 * Knobs ride in the prompt of a request, as "@@ n=64 d=5 ttfb=0 @@ …":
 *   n=COUNT    content chunks of a stream            d=MS      between chunks; 0 is full speed, one send() a chunk
 *   ttfb=MS    before the first byte                 s=STATUS  answer with this status instead of 200
 *   die=COUNT  close after so many chunks            drop=SEQ  leave one chunk out (does the generator notice?)
 *
 * Every content chunk reads "@T<16 digits>#<sequence> ": the CLOCK_MONOTONIC microseconds at which it was made and
 * its place in the stream, so that the generator knows each chunk's one-way delay and sees a lost or mixed one.
 * The usage chunk comes only when the body asks for it (stream_options.include_usage), as with the real engine.
 * A request for another model is a 404: a gateway that forgets to translate the public name is found out.
 *
 * Rule of this file: paced chunks fire on whole milliseconds, many streams together, as the steps of a real engine
 * emit the tokens of their whole batch together.
 */
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MODEL "mock-model"
#define CREATED "1700000000"

enum state {
    READING,      /* no request, or only a part of one, has come */
    DUE_REPLY,    /* waits to answer in one piece */
    DUE_STREAM,   /* waits for a stream's first byte */
    STREAMING,
};

struct connection {
    int fd;
    bool open, wants_write;
    struct buffer in, out;
    size_t out_sent;
    enum state state;
    /* the answer being given */
    int status;
    bool usage;
    long chunks, interval_ms, die_after, drop;
    long next_chunk;
    uint64_t started_us;
    char id[32];
    /* place in the timer wheel */
    int slot;
    struct connection *later, *earlier;
    struct connection *next_closed;
};

static int poller;
static struct {
    unsigned long long requests, streams, aborts, chunks, accepted, open;
} totals;

/* ---------------------------------------------------------------- timers: a wheel of one-millisecond slots */

#define SLOTS 8192 /* the longest wait is 8.19 s */
static struct connection *wheel[SLOTS];
static uint64_t wheel_ms;
static int timers;

static void timer_cancel(struct connection *c) {
    if (c->slot < 0) return;
    if (c->earlier)
        c->earlier->later = c->later;
    else
        wheel[c->slot] = c->later;
    if (c->later) c->later->earlier = c->earlier;
    c->slot = -1;
    c->later = c->earlier = NULL;
    timers--;
}

static void timer_set(struct connection *c, uint64_t at_us) {
    timer_cancel(c);
    uint64_t ms = (at_us + 999) / 1000;
    if (ms <= wheel_ms) ms = wheel_ms + 1;
    if (ms - wheel_ms >= SLOTS) ms = wheel_ms + SLOTS - 1;
    c->slot = (int)(ms % SLOTS);
    c->later = wheel[c->slot];
    if (c->later) c->later->earlier = c;
    wheel[c->slot] = c;
    timers++;
}

/* Milliseconds epoll may sleep: until the next occupied slot, looking 50 ms ahead. */
static int timer_sleep(void) {
    if (!timers) return -1;
    uint64_t ms = wheel_ms + 1;
    while (ms < wheel_ms + 50 && !wheel[ms % SLOTS]) ms++;
    int64_t wait_us = (int64_t)(ms * 1000) - (int64_t)now_us();
    return wait_us <= 0 ? 0 : (int)((wait_us + 999) / 1000);
}

/* ---------------------------------------------------------------- connections */

static struct connection *closed; /* freed at the end of a turn: events of this turn may still point at them */

static void watch(struct connection *c, int operation) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (c->wants_write ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, operation, c->fd, &event);
}

/* Closes a connection; `by_peer` when the other side left, which in the middle of an answer is an abort. */
static void connection_close(struct connection *c, bool by_peer) {
    if (!c->open) return;
    if (by_peer && c->state != READING) totals.aborts++;
    c->open = false;
    timer_cancel(c);
    close(c->fd);
    totals.open--;
    c->next_closed = closed;
    closed = c;
}

static void free_closed(void) {
    while (closed) {
        struct connection *c = closed;
        closed = c->next_closed;
        free(c->in.bytes);
        free(c->out.bytes);
        free(c);
    }
}

/* Sends what is waiting. True when all of it is out; on a full socket it goes on at the next EPOLLOUT. */
static bool flush(struct connection *c) {
    while (c->out_sent < c->out.length) {
        ssize_t sent = send(c->fd, c->out.bytes + c->out_sent, c->out.length - c->out_sent, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN) {
                connection_close(c, true);
            } else if (!c->wants_write) {
                c->wants_write = true;
                watch(c, EPOLL_CTL_MOD);
            }
            return false;
        }
        c->out_sent += (size_t)sent;
    }
    c->out.length = c->out_sent = 0;
    if (c->wants_write) {
        c->wants_write = false;
        watch(c, EPOLL_CTL_MOD);
    }
    return true;
}

/* ---------------------------------------------------------------- answers */

static void reply(struct connection *c, int status, const char *type, const char *body) {
    char head[256];
    size_t length = strlen(body);
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %d %s\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n", status,
                     status == 200 ? "OK" : "Refused", type, length);
    buffer_append(&c->out, head, (size_t)n);
    buffer_append(&c->out, body, length);
    c->state = READING;
    flush(c);
}

static void reply_chat(struct connection *c) {
    char body[1024];
    if (c->status != 200) {
        snprintf(body, sizeof body,
                 "{\"error\":{\"message\":\"the mock was told to fail\",\"type\":\"InternalServerError\","
                 "\"param\":null,\"code\":%d}}",
                 c->status);
    } else {
        snprintf(body, sizeof body,
                 "{\"id\":\"%s\",\"object\":\"chat.completion\",\"created\":" CREATED ",\"model\":\"" MODEL
                 "\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"First word. The quick "
                 "brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. How vexingly quick daft "
                 "zebras jump! Last word.\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,"
                 "\"reasoning\":null},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null,"
                 "\"token_ids\":null}],\"service_tier\":null,\"system_fingerprint\":null,\"usage\":{\"prompt_tokens\":"
                 "512,\"total_tokens\":576,\"completion_tokens\":64,\"prompt_tokens_details\":null},"
                 "\"prompt_logprobs\":null,\"kv_transfer_params\":null}",
                 c->id);
    }
    reply(c, c->status, "application/json", body);
}

/* Appends one event, `data: {chunk head}{rest}`, framed as one HTTP chunk. */
static void put_event(struct connection *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put_event(struct connection *c, const char *format, ...) {
    char event[640], frame[16];
    int n = snprintf(event, sizeof event,
                     "data: {\"id\":\"%s\",\"object\":\"chat.completion.chunk\",\"created\":" CREATED
                     ",\"model\":\"" MODEL "\",\"choices\":",
                     c->id);
    va_list rest;
    va_start(rest, format);
    n += vsnprintf(event + n, sizeof event - (size_t)n - 3, format, rest);
    va_end(rest);
    memcpy(event + n, "}\n\n", 3);
    n += 3;
    int framed = snprintf(frame, sizeof frame, "%x\r\n", (unsigned)n);
    buffer_append(&c->out, frame, (size_t)framed);
    buffer_append(&c->out, event, (size_t)n);
    buffer_append(&c->out, "\r\n", 2);
}

static void put_stream_head(struct connection *c) {
    static const char head[] = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                               "transfer-encoding: chunked\r\n\r\n";
    buffer_append(&c->out, head, sizeof head - 1);
    put_event(c, "[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,"
                 "\"finish_reason\":null}]");
}

static void put_stream_tail(struct connection *c) {
    put_event(c, "[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null,"
                 "\"token_ids\":null}]");
    if (c->usage)
        put_event(c, "[],\"usage\":{\"prompt_tokens\":512,\"total_tokens\":%ld,\"completion_tokens\":%ld}",
                  512 + c->chunks, c->chunks);
    static const char done[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    buffer_append(&c->out, done, sizeof done - 1);
    c->state = READING;
}

/* Puts the next piece of a stream into the output buffer; the last one sets the state back to READING. */
static void put_next(struct connection *c) {
    if (c->die_after >= 0 && c->next_chunk >= c->die_after) {
        connection_close(c, false);
        return;
    }
    if (c->next_chunk == c->chunks) {
        put_stream_tail(c);
        return;
    }
    if (c->next_chunk != c->drop) {
        put_event(c,
                  "[{\"index\":0,\"delta\":{\"content\":\"@T%016llu#%ld \"},\"logprobs\":null,\"finish_reason\":null,"
                  "\"token_ids\":null}]",
                  (unsigned long long)now_us(), c->next_chunk);
        totals.chunks++;
    }
    c->next_chunk++;
}

static void take_requests(struct connection *c);

/* Goes on with a stream at full speed until it ends or the socket is full; one send() a chunk, as engines do. */
static void stream_on(struct connection *c) {
    while (c->open && flush(c) && c->state == STREAMING) put_next(c);
    if (c->open) take_requests(c);
}

/* One step of a paced stream. */
static void stream_step(struct connection *c) {
    put_next(c);
    if (!c->open) return;
    bool sent = flush(c);
    if (!c->open) return;
    if (c->state == STREAMING)
        timer_set(c, c->started_us + (uint64_t)(c->next_chunk * c->interval_ms) * 1000u);
    else if (sent)
        take_requests(c);
}

static void stream_start(struct connection *c) {
    c->state = STREAMING;
    c->next_chunk = 0;
    c->started_us = now_us();
    put_stream_head(c);
    if (!c->interval_ms)
        stream_on(c);
    else if (flush(c) || c->open)
        stream_step(c);
}

static void timer_fired(struct connection *c) {
    if (c->state == DUE_REPLY) {
        reply_chat(c);
        if (c->open) take_requests(c);
    } else if (c->state == DUE_STREAM) {
        stream_start(c);
    } else if (c->state == STREAMING) {
        stream_step(c);
    }
}

/* ---------------------------------------------------------------- requests */

static void answer_get(struct connection *c, const char *path) {
    char body[512];
    if (strstr(path, "/__stats")) {
        snprintf(body, sizeof body,
                 "{\"requests\":%llu,\"streams\":%llu,\"aborts\":%llu,\"chunks\":%llu,\"accepted\":%llu,"
                 "\"open\":%llu}",
                 totals.requests, totals.streams, totals.aborts, totals.chunks, totals.accepted, totals.open);
        reply(c, 200, "application/json", body);
    } else if (strstr(path, "models")) {
        reply(c, 200, "application/json",
              "{\"object\":\"list\",\"data\":[{\"id\":\"" MODEL "\",\"object\":\"model\",\"created\":" CREATED
              ",\"owned_by\":\"vllm\",\"root\":\"" MODEL "\",\"parent\":null,\"max_model_len\":131072}]}");
    } else if (strstr(path, "metrics")) {
        reply(c, 200, "text/plain; version=0.0.4",
              "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"" MODEL
              "\"} 0.0\n# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{model_name=\"" MODEL
              "\"} 0.0\n");
    } else if (strstr(path, "info")) { /* asked for by some routers before they accept a worker */
        reply(c, 200, "application/json",
              "{\"model_path\":\"" MODEL "\",\"served_model_name\":\"" MODEL "\",\"tokenizer_path\":\"" MODEL
              "\",\"is_generation\":true,\"model_type\":\"llama\",\"version\":\"0.5.0\",\"tp_size\":1,\"dp_size\":1}");
    } else if (strstr(path, "version")) {
        reply(c, 200, "application/json", "{\"version\":\"0.32.0\"}");
    } else {
        reply(c, 200, "application/json", "");
    }
}

static void answer_post(struct connection *c, const char *body, size_t length) {
    struct chat chat = read_chat(body, length);
    if (!chat.model || !named(chat.model, chat.model_length, MODEL)) {
        reply(c, 404, "application/json",
              "{\"error\":{\"message\":\"The model does not exist; this engine serves " MODEL
              ".\",\"type\":\"NotFoundError\",\"param\":\"model\",\"code\":404}}");
        return;
    }
    c->status = (int)plan_number(&chat, "s", 200);
    c->usage = chat.include_usage;
    c->chunks = plan_number(&chat, "n", 64);
    c->interval_ms = plan_number(&chat, "d", 0);
    c->die_after = plan_number(&chat, "die", -1);
    c->drop = plan_number(&chat, "drop", -1);
    snprintf(c->id, sizeof c->id, "chatcmpl-%016llx", totals.requests * 0x9e3779b97f4a7c15ull);
    bool stream = chat.stream && c->status == 200;
    if (stream) totals.streams++;
    long first_byte_ms = plan_number(&chat, "ttfb", 0);
    if (first_byte_ms) {
        c->state = stream ? DUE_STREAM : DUE_REPLY;
        timer_set(c, now_us() + (uint64_t)first_byte_ms * 1000u);
    } else if (stream) {
        stream_start(c);
    } else {
        reply_chat(c);
    }
}

/* Decodes a chunked body in place. Its length, or -1 while it is incomplete; *consumed counts the framing too. */
static long decode_chunked(char *body, size_t length, size_t *consumed) {
    char *limit = body + length, *p = body;
    for (;;) { /* first pass: is the whole body here? */
        char *eol = memmem(p, (size_t)(limit - p), "\r\n", 2);
        if (!eol) return -1;
        size_t size = strtoul(p, NULL, 16);
        if ((size_t)(limit - eol) < size + 4) return -1;
        p = eol + 2 + size + 2;
        if (!size) break;
    }
    *consumed = (size_t)(p - body);
    char *to = body;
    for (p = body;;) {
        size_t size = strtoul(p, NULL, 16);
        if (!size) return to - body;
        char *data = (char *)memmem(p, (size_t)(limit - p), "\r\n", 2) + 2;
        memmove(to, data, size);
        to += size;
        p = data + size + 2;
    }
}

/* Finds one header's value in a head, or NULL. `name` is lower case with its colon. */
static const char *header(const char *head, const char *end, const char *name) {
    size_t length = strlen(name);
    for (const char *line = memchr(head, '\n', (size_t)(end - head)); line && line + 1 < end;
         line = memchr(line + 1, '\n', (size_t)(end - line - 1)))
        if (strncasecmp(line + 1, name, length) == 0) return line + 1 + length;
    return NULL;
}

/* Answers one whole request if one has come. True when it did. */
static bool take_request(struct connection *c) {
    char *head = c->in.bytes, *end = memmem(head, c->in.length, "\r\n\r\n", 4);
    if (!end) return false;
    size_t head_length = (size_t)(end - head) + 4, total;
    char *body = head + head_length;
    long body_length;
    const char *value;
    if (header(head, end, "transfer-encoding:")) {
        size_t framed = 0;
        body_length = decode_chunked(body, c->in.length - head_length, &framed);
        if (body_length < 0) return false;
        total = head_length + framed;
    } else {
        body_length = (value = header(head, end, "content-length:")) ? atol(value) : 0;
        total = head_length + (size_t)body_length;
        if (c->in.length < total) return false;
    }
    totals.requests++;
    if (strncmp(head, "POST ", 5) == 0) {
        answer_post(c, body, (size_t)body_length);
    } else {
        char *path = memchr(head, ' ', head_length), *stop = NULL;
        if (path) stop = memchr(path + 1, ' ', (size_t)(end - path));
        if (!stop) {
            connection_close(c, false);
            return true;
        }
        *stop = 0;
        answer_get(c, path + 1);
    }
    if (!c->open) return true;
    memmove(c->in.bytes, c->in.bytes + total, c->in.length - total);
    c->in.length -= total;
    return true;
}

/* Answers what has come, one request after the other. Not re-entered: an answer that ends at once returns here. */
static void take_requests(struct connection *c) {
    static bool taking;
    if (taking) return;
    taking = true;
    while (c->open && c->state == READING && c->in.length && take_request(c)) continue;
    taking = false;
}

static void read_input(struct connection *c) {
    for (;;) {
        buffer_reserve(&c->in, 16384);
        ssize_t n = recv(c->fd, c->in.bytes + c->in.length, c->in.capacity - c->in.length, 0);
        if (n > 0) {
            c->in.length += (size_t)n;
            if (c->in.length < c->in.capacity) break; /* drained: saves the read that would say EAGAIN */
        } else if (n < 0 && errno == EAGAIN) {
            break;
        } else {
            connection_close(c, true);
            return;
        }
    }
    take_requests(c);
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        struct connection *c = calloc(1, sizeof *c);
        if (!c) give_up("memory");
        c->fd = fd;
        c->open = true;
        c->slot = -1;
        totals.accepted++;
        totals.open++;
        watch(c, EPOLL_CTL_ADD);
    }
}

static void run_timers(void) {
    for (uint64_t ms = now_us() / 1000; wheel_ms < ms;) {
        wheel_ms++;
        struct connection *due = wheel[wheel_ms % SLOTS];
        wheel[wheel_ms % SLOTS] = NULL;
        for (struct connection *c = due, *next; c; c = next) {
            next = c->later;
            if (next) next->earlier = NULL;
            c->later = c->earlier = NULL;
            c->slot = -1;
            timers--;
            if (c->open) timer_fired(c);
        }
    }
}

static int listen_on(int port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) give_up("listen");
    return listener;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: mock PORT\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_on(atoi(argv[1]));
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[512];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    wheel_ms = now_us() / 1000;
    for (;;) {
        int n = epoll_wait(poller, events, 512, timer_sleep());
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                accept_all(listener);
                continue;
            }
            if (c->open && events[i].events & EPOLLOUT && flush(c) && c->state == STREAMING && !c->interval_ms)
                stream_on(c);
            if (c->open && events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) read_input(c);
        }
        run_timers();
        free_closed();
    }
}
