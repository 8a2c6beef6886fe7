"""The example program beside a built model."""

from __future__ import annotations

from autoprune.repack.aot.build import Compiled
from autoprune.repack.aot.interface import shape_text

_PRINTED = {"float": ("%.9g", "double"), "double": ("%.17g", "double")}  # C type -> how it is printed, and as what
_INTEGER = ("%lld", "long long")


def example(built: Compiled) -> str:
    """The text of ``main.c``: runs the model once, for its first set of shapes."""
    call, name, big = built.calls[0], built.name, built.name.upper()
    own = call.prefix.upper()
    outputs = [each.port for each in call.outputs]
    variables = {f"in_{port.name}": port for port in call.inputs} | {f"out_{port.name}": port for port in outputs}
    memory = [
        f"    static {port.c_type} {variable}[{own}_{port.name.upper()}_COUNT]; /* {shape_text(port.shape)} */"
        for variable, port in variables.items()
    ]
    read = [
        f"    read_input(argc > {number} ? argv[{number}] : NULL, in_{port.name}, sizeof in_{port.name});"
        for number, port in enumerate(call.inputs, 1)
    ]
    printed = []
    for port in outputs:
        form, kind = _PRINTED.get(port.c_type, _INTEGER)
        count = f"{own}_{port.name.upper()}_COUNT"
        printed.append(f'    for (i = 0; i < {count}; i++) printf("{form}\\n", ({kind})out_{port.name}[i]);')
    tensors = ", ".join(variables)
    lines = [
        f"/* An example by autoprune: runs {name} once and prints its outputs, an entry a line.",
        " * Each argument is a file of one input's bytes, in order; inputs without one are zeros. */",
        "#include <stdio.h>",
        "#include <stdlib.h>",
        "",
        f'#include "{name}.h"',
        "",
        "static void read_input(const char *path, void *into, size_t bytes)",
        "{",
        "    FILE *file;",
        "    if (path == NULL) return;",
        '    file = fopen(path, "rb");',
        "    if (file == NULL || fread(into, 1, bytes, file) != bytes || fgetc(file) != EOF) {",
        '        fprintf(stderr, "%s: not a file of %lu bytes\\n", path, (unsigned long)bytes);',
        "        exit(2);",
        "    }",
        "    fclose(file);",
        "}",
        "",
        "int main(int argc, char **argv)",
        "{",
        *memory,
        f"    static char memory[{own}_WORKSPACE_BYTES + {big}_ALIGNMENT];",
        f"    void *workspace = {name}_aligned(memory);",
        "    int32_t status;",
        "    size_t i;",
        "",
        *read,
        f"    status = {call.prefix}_prepare(workspace);",
        f"    if (status == {big}_OK) status = {call.prefix}_run({tensors}, workspace);",
        f"    if (status != {big}_OK) {{",
        f'        fprintf(stderr, "{name}: %s\\n", {name}_status_text(status));',
        "        return 1;",
        "    }",
        *printed,
        "    return 0;",
        "}",
    ]
    return "\n".join([*lines, ""])
