/* bench.h - what the mock engine and the load generator share: the clock, byte buffers, a reader of chat bodies.
 *
 * Both programs stamp and read CLOCK_MONOTONIC on the same machine, so a stamp written by one can be subtracted
 * from a time read by the other: that difference is the one-way delay of a chunk through the gateway.
 */
#ifndef BENCH_H
#define BENCH_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Microseconds since some fixed moment of this machine. */
static inline uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

/* Ends the program: something is wrong with the bench itself, not with the gateway under test. */
static inline void __attribute__((noreturn)) give_up(const char *what) {
    perror(what);
    exit(2);
}

/* A growing run of bytes. */
struct buffer {
    char *bytes;
    size_t length, capacity;
};

/* Makes room for `more` bytes after those already there. */
static inline void buffer_reserve(struct buffer *b, size_t more) {
    if (b->length + more <= b->capacity) return;
    b->capacity = (b->length + more) * 2;
    b->bytes = realloc(b->bytes, b->capacity);
    if (!b->bytes) give_up("memory");
}

static inline void buffer_append(struct buffer *b, const char *bytes, size_t length) {
    buffer_reserve(b, length);
    memcpy(b->bytes + b->length, bytes, length);
    b->length += length;
}

/* What a chat request says that matters to a bench.
 *
 * `plan` is the text of the first string that starts with "@@ ": knobs for the mock engine ride in the prompt, so
 * that any gateway passes them on unread. */
struct chat {
    const char *model, *plan;
    size_t model_length, plan_length;
    bool stream, include_usage;
};

/* The closing quote of the JSON string whose first byte is at `p`, or NULL. */
static inline const char *string_end(const char *p, const char *limit) {
    for (const char *q = p; (q = memchr(q, '"', (size_t)(limit - q))) != NULL; q++) {
        const char *first = q; /* of the backslashes before the quote: an odd number of them escapes it */
        while (first > p && first[-1] == '\\') first--;
        if ((q - first) % 2 == 0) return q;
    }
    return NULL;
}

static inline bool named(const char *key, size_t length, const char *name) {
    return length == strlen(name) && memcmp(key, name, length) == 0;
}

/* Reads a chat body in one pass. Long prompts cost a memchr, so a megabyte takes some tens of microseconds. */
static inline struct chat read_chat(const char *body, size_t length) {
    struct chat chat = {0};
    const char *limit = body + length, *key = NULL;
    size_t key_length = 0;
    int depth = 0;
    for (const char *p = body; p < limit; p++) {
        if (*p == '{' || *p == '[') {
            depth++;
        } else if (*p == '}' || *p == ']') {
            depth--;
        } else if (*p == 't' && key) { /* the only bare word that matters is `true` */
            if (depth == 1 && named(key, key_length, "stream")) chat.stream = true;
            if (depth == 2 && named(key, key_length, "include_usage")) chat.include_usage = true;
        } else if (*p == '"') {
            const char *end = string_end(p + 1, limit);
            if (!end) break;
            const char *text = p + 1;
            size_t text_length = (size_t)(end - text);
            const char *after = end + 1;
            while (after < limit && *after == ' ') after++;
            if (after < limit && *after == ':') {
                key = text, key_length = text_length;
            } else if (depth == 1 && key && named(key, key_length, "model")) {
                chat.model = text, chat.model_length = text_length;
            } else if (!chat.plan && text_length > 3 && memcmp(text, "@@ ", 3) == 0) {
                chat.plan = text, chat.plan_length = text_length;
            }
            p = end;
        }
    }
    return chat;
}

/* The number after `name=` in a plan such as "@@ n=64 d=5 @@ prompt…", or `otherwise`. */
static inline long plan_number(const struct chat *chat, const char *name, long otherwise) {
    if (!chat->plan) return otherwise;
    const char *limit = chat->plan + chat->plan_length;
    const char *stop = memmem(chat->plan + 3, chat->plan_length - 3, "@@", 2);
    if (stop) limit = stop;
    size_t length = strlen(name);
    for (const char *p = chat->plan + 2; p + length + 2 < limit; p++)
        if (p[0] == ' ' && memcmp(p + 1, name, length) == 0 && p[1 + length] == '=') return atol(p + length + 2);
    return otherwise;
}

#endif
