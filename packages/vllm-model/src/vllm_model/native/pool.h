// Threads for the phases of a step.
//
// A phase is a function called for chunks 0..n-1 by whoever is free, the caller included; it ends when all chunks are done, not
// when all threads have come by. So a thread that the system keeps away from its core delays nothing but the chunk it holds.
#pragma once
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define MAX_THREADS 256
#define STACK_BYTES (1 << 20)  // of a worker; an item of attention takes some 160 kB, and some systems give no more than 128
#define SPIN 4000  // looks at the ticket before a worker goes to sleep, some 100 us

typedef void (*phase_fn)(void *args, int chunk);

// chunks << 32 | next chunk
static _Atomic uint64_t ticket;
static _Atomic uint32_t chunks_done;
static _Atomic int num_asleep;
static phase_fn phase_function;
static void *phase_args;
static _Atomic int num_workers;  // threads beside the caller
static _Thread_local int thread_number;  // 0 is the caller
static pthread_mutex_t step_lock = PTHREAD_MUTEX_INITIALIZER;  // held by who runs phases: one caller at a time in a process
static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;  // for going to sleep
static pthread_cond_t pool_wake = PTHREAD_COND_INITIALIZER;

#define CHUNKS_OF(t) ((uint32_t)((t) >> 32))
#define NEXT_OF(t) ((uint32_t)(t))

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Take chunks until none is left. A ticket that was taken holds its phase open, so its function and arguments are there.
static void take_chunks(void) {
    for (;;) {
        uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
        if (NEXT_OF(seen) >= CHUNKS_OF(seen)) return;
        uint64_t mine = atomic_fetch_add_explicit(&ticket, 1, memory_order_acq_rel);
        if (NEXT_OF(mine) >= CHUNKS_OF(mine)) continue;
        phase_function(phase_args, (int)NEXT_OF(mine));
        atomic_fetch_add_explicit(&chunks_done, 1, memory_order_release);
    }
}

static void *worker(void *arg) {
    thread_number = (int)(intptr_t)arg;
    while (thread_number <= num_workers) {
        int left = SPIN;
        uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
        while (NEXT_OF(seen) >= CHUNKS_OF(seen) && --left) {
            relax();
            seen = atomic_load_explicit(&ticket, memory_order_acquire);
        }
        if (left) {
            take_chunks();
            continue;
        }
        pthread_mutex_lock(&pool_lock);
        atomic_fetch_add(&num_asleep, 1);
        seen = atomic_load(&ticket);
        if (NEXT_OF(seen) >= CHUNKS_OF(seen) && thread_number <= num_workers) pthread_cond_wait(&pool_wake, &pool_lock);
        atomic_fetch_sub(&num_asleep, 1);
        pthread_mutex_unlock(&pool_lock);
    }
    return NULL;
}

static void run_chunks(phase_fn function, void *args, int chunks) {
    if (chunks <= 1 || num_workers == 0) {
        for (int i = 0; i < chunks; i++) function(args, i);
        return;
    }
    phase_function = function;
    phase_args = args;
    atomic_store_explicit(&chunks_done, 0, memory_order_relaxed);
    atomic_store(&ticket, (uint64_t)chunks << 32);
    if (atomic_load(&num_asleep)) {
        pthread_mutex_lock(&pool_lock);
        pthread_cond_broadcast(&pool_wake);
        pthread_mutex_unlock(&pool_lock);
    }
    take_chunks();
    for (int looks = 0; atomic_load_explicit(&chunks_done, memory_order_acquire) != (uint32_t)chunks; looks++)
        looks & 1023 ? relax() : (void)sched_yield();
}

// Threads from now on, the caller of a phase among them; as many of them as the system gives.
static void change_threads(int num_threads) {
    static pthread_t threads[MAX_THREADS];
    int old = num_workers;
    pthread_mutex_lock(&pool_lock);
    num_workers = 0;
    pthread_cond_broadcast(&pool_wake);
    pthread_mutex_unlock(&pool_lock);
    for (int i = 1; i <= old; i++) pthread_join(threads[i], NULL);
    int wanted = num_threads < 1 ? 0 : num_threads > MAX_THREADS ? MAX_THREADS - 1 : num_threads - 1;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    num_workers = wanted;
    for (int i = 1; i <= wanted; i++)
        if (pthread_create(&threads[i], &attributes, worker, (void *)(intptr_t)i)) {
            num_workers = i - 1;
            break;
        }
    pthread_attr_destroy(&attributes);
}

// A forked child has none of the threads, and nobody who would release the locks.
static void forget_threads(void) {
    num_workers = num_asleep = 0;
    step_lock = pool_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool_wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

#ifdef PROFILE
// Nanoseconds spent in phases of each name since `profile` was called last, for benchmarks/profile_cpu.py.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#define MAX_NAMES 32
static struct {
    const char *name;
    int64_t nanoseconds, calls;
} spent[MAX_NAMES];
static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static void spend(const char *name, int64_t nanoseconds) {
    int i = 0;
    while (i < MAX_NAMES - 1 && spent[i].name && strcmp(spent[i].name, name)) i++;
    spent[i].name = name;
    spent[i].nanoseconds += nanoseconds;
    spent[i].calls++;
}
void profile(int tell) {
    for (int i = 0; i < MAX_NAMES && spent[i].name; i++) {
        if (tell && spent[i].calls) fprintf(stderr, "%-12s %10.3f ms %8ld calls\n", spent[i].name, spent[i].nanoseconds / 1e6, (long)spent[i].calls);
        spent[i].nanoseconds = spent[i].calls = 0;
    }
}
#define run_phase(name, function, args, chunks)                  \
    do {                                                         \
        int64_t began = now();                                   \
        run_chunks(function, args, chunks);                      \
        spend(name, now() - began);                              \
    } while (0)
#else
#define run_phase(name, function, args, chunks) run_chunks(function, args, chunks)
#endif
