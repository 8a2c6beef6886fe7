/* Times models in turns, or their ops one after another, and prints a line of JSON for each: see bench.py. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__linux__)
#include <sys/utsname.h>
#include <unistd.h>
#endif

struct model {
    const char *name;
    int32_t ops;
    int32_t (*prepare)(void);
    int32_t (*run)(void);
    int32_t (*run_op)(int32_t);
};

#include "models.h" /* MODELS, COUNT, ROUNDS, OP_ROUNDS, WARMUP, LEAD, MIN_SAMPLE_MS */

static double now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e3 * (double)time.tv_sec + 1e-6 * (double)time.tv_nsec;
}

static void check(const char *what, const char *name, int32_t status) {
    if (status != 0) {
        fprintf(stderr, "%s of %s returned %d\n", what, name, (int)status);
        exit(1);
    }
}

static double *room(size_t count) {
    double *numbers = calloc(count ? count : 1, sizeof *numbers);
    if (numbers == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return numbers;
}

static int by_size(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* The samples in the order they were taken, and their median, 10th and 90th percentile. */
static void print_samples(const char *unit, const double *samples, int count) {
    double *ordered = room((size_t)count);
    memcpy(ordered, samples, (size_t)count * sizeof *samples);
    qsort(ordered, (size_t)count, sizeof *ordered, by_size);
    printf(", \"median_%s\": %.9g", unit, (ordered[(count - 1) / 2] + ordered[count / 2]) / 2);
    printf(", \"p10_%s\": %.9g", unit, ordered[(int)(0.1 * (count - 1) + 0.5)]);
    printf(", \"p90_%s\": %.9g, \"samples_%s\": [", unit, ordered[(int)(0.9 * (count - 1) + 0.5)], unit);
    for (int i = 0; i < count; ++i) printf(i ? ", %.9g" : "%.9g", samples[i]);
    printf("]}\n");
    free(ordered);
}

static void print_text(const char *text) {
    for (; *text && *text != '\n'; ++text) putchar(*text < ' ' || *text > '~' || strchr("\"\\", *text) ? ' ' : *text);
}

/* What the device says of itself. */
static void print_device(void) {
    printf("{\"autoprune\": \"device\"");
#if defined(__linux__)
    struct utsname about;
    char line[512], cpu[512] = "";
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        char *value = strchr(line, ':');
        int known = !strncmp(line, "model name", 10) || !strncmp(line, "CPU implementer", 15) ||
                    !strncmp(line, "CPU part", 8) || !strncmp(line, "uarch", 5);
        if (value == NULL || (line[0] == 'p' && cpu[0])) break; /* the second processor */
        if (known) {
            value[strcspn(value, "\n")] = 0;
            snprintf(cpu + strlen(cpu), sizeof cpu - strlen(cpu), "%s%s", cpu[0] ? " " : "",
                     value + 1 + strspn(value + 1, " "));
        }
    }
    if (file != NULL) fclose(file);
    if (uname(&about) == 0) {
        printf(", \"machine\": \"");
        print_text(about.machine);
        printf("\"");
    }
    printf(", \"cpu\": \"");
    print_text(cpu);
    printf("\", \"cores\": %ld", sysconf(_SC_NPROCESSORS_ONLN));
#endif
    printf("}\n");
}

/* Calls before each sample bring a model's own caches back; calls within it make it long enough for the clock. */
static void time_models(void) {
    double *samples = room((size_t)COUNT * ROUNDS);
    int *repeats = calloc(COUNT ? COUNT : 1, sizeof *repeats);
    for (int m = 0; m < COUNT; ++m) {
        double fastest = 1e300;
        for (int i = 0; i < WARMUP; ++i) {
            double start = now_ms();
            check("an inference", MODELS[m].name, MODELS[m].run());
            double took = now_ms() - start;
            if (took < fastest) fastest = took;
        }
        double wanted = MIN_SAMPLE_MS / (fastest > 1e-4 ? fastest : 1e-4) + 0.5;
        repeats[m] = wanted < 1 ? 1 : wanted > 1000 ? 1000 : (int)wanted;
    }
    for (int round = 0; round < ROUNDS; ++round) {
        for (int turn = 0; turn < COUNT; ++turn) {
            int m = round % 2 ? COUNT - 1 - turn : turn;
            for (int i = 0; i < LEAD; ++i) MODELS[m].run();
            double start = now_ms();
            for (int i = 0; i < repeats[m]; ++i) MODELS[m].run();
            samples[(size_t)m * ROUNDS + round] = (now_ms() - start) / repeats[m];
        }
    }
    for (int m = 0; m < COUNT; ++m) {
        printf("{\"autoprune\": \"model\", \"model\": \"%s\"", MODELS[m].name);
        print_samples("ms", samples + (size_t)m * ROUNDS, ROUNDS);
    }
    free(samples);
    free(repeats);
}

static void time_ops(const struct model *model) {
    double *samples = room((size_t)model->ops * OP_ROUNDS);
    for (int round = -WARMUP; round < OP_ROUNDS; ++round) {
        for (int32_t op = 0; op < model->ops; ++op) {
            double start = now_ms();
            int32_t status = model->run_op(op);
            double took = now_ms() - start;
            check("an operation", model->name, status);
            if (round >= 0) samples[(size_t)op * OP_ROUNDS + round] = 1e3 * took;
        }
    }
    for (int32_t op = 0; op < model->ops; ++op) {
        printf("{\"autoprune\": \"op\", \"model\": \"%s\", \"op\": %d", model->name, (int)op);
        print_samples("us", samples + (size_t)op * OP_ROUNDS, OP_ROUNDS);
    }
    free(samples);
}

int main(void) {
    print_device();
    for (int m = 0; m < COUNT; ++m) {
        check("the preparation", MODELS[m].name, MODELS[m].prepare());
        check("an inference", MODELS[m].name, MODELS[m].run());
    }
    if (ROUNDS > 0) time_models();
    for (int m = 0; m < COUNT && OP_ROUNDS > 0; ++m) time_ops(&MODELS[m]);
    printf("{\"autoprune\": \"end\"}\n");
    return 0;
}
