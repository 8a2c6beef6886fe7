/* Runs one native op again and again, for cachegrind to count: fetch_driver BLOB REPETITIONS.
 *
 * BLOB: int64 first address, bytes of memory, address of the fields, address of the slots, items; then the memory.
 * The memory is put where it says, so that addresses inside it hold. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

void op(const int64_t *fields, const int64_t *slots, int64_t item, int64_t thread);

int main(int argc, char **argv) {
    int64_t head[5];
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    if (!file || fread(head, sizeof *head, 5, file) != 5) return 2;
    void *memory = mmap((void *)head[0], (size_t)head[1], PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (memory != (void *)head[0] || fread(memory, 1, (size_t)head[1], file) != (size_t)head[1]) return 3;
    for (long turn = atol(argv[2]); turn > 0; turn--)
        for (int64_t item = 0; item < head[4]; item++) op((int64_t *)head[2], (int64_t *)head[3], item, 0);
    return 0;
}
