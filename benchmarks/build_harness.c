/* Runs a built model: its inputs, one after the other, from the first file; its outputs into the second.

   model.h, which `build_programs.py` writes, says what is called, and how many bytes everything has. */
#include <stdio.h>
#include <stdlib.h>
#include "model.h"
#ifndef TURNS
#define TURNS 2 /* the second finds what the first has left in the workspace */
#endif

static const size_t inputs[] = INPUTS, outputs[] = OUTPUTS;
enum { READS = sizeof inputs / sizeof *inputs, WRITES = sizeof outputs / sizeof *outputs };

static void *memory(size_t bytes)
{
    void *found = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!found)
        exit(3);
    return found;
}

int main(int count, char **names)
{
    void *x[READS], *y[WRITES], *workspace = memory(WORKSPACE);
    FILE *file;
    if (count != 3 || !(file = fopen(names[1], "rb")))
        return 2;
    for (int i = 0; i < READS; i++)
        if (fread(x[i] = memory(inputs[i]), 1, inputs[i], file) != inputs[i])
            return 2;
    fclose(file);
    for (int i = 0; i < WRITES; i++)
        y[i] = memory(outputs[i]);
    if (PREPARE(workspace))
        return 4;
    for (int turn = 0; turn < TURNS; turn++)
        if (RUN(x, y, workspace))
            return 5;
    if (!(file = fopen(names[2], "wb")))
        return 2;
    for (int i = 0; i < WRITES; i++)
        if (fwrite(y[i], 1, outputs[i], file) != outputs[i])
            return 2;
    return fclose(file) ? 2 : 0;
}
