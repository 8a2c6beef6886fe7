"""The C header of a built model: its functions, sizes and shapes, and a call that checks all it is given."""

from __future__ import annotations

from autoprune.repack.aot.build import Compiled
from autoprune.repack.aot.call import Call, Status
from autoprune.repack.aot.description import MEANINGS
from autoprune.repack.aot.image import LINE
from autoprune.repack.aot.interface import C_TYPES, Port, shape_text
from autoprune.version import __version__


def header(built: Compiled, target: str) -> str:
    """The text of ``NAME.h``, C99 and C++.

    Args:
        built: the model.
        target: as it was asked for.
    """
    name, big = built.name, built.name.upper()
    parts = [
        f"/* {name}, built by autoprune {__version__} for {target}.",
        " *",
        " * Nothing here allocates; several threads may call every function, each with a workspace of its own.",
        " * Tensors are contiguous, row by row; outputs overlap neither each other nor inputs nor the workspace. */",
        f"#ifndef AUTOPRUNE_{big}_H",
        f"#define AUTOPRUNE_{big}_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {big}_ALIGNMENT {LINE} /* bytes: a workspace begins at a multiple of it */",
        f"#define {big}_THREADS {built.calls[0].threads} /* that may work on one call, at most */",
        "",
        *_statuses(big),
        "",
        *_types(big),
    ]
    for call in built.calls:
        parts += ["", *_sizes(call), "", *_functions(call, big)]
    parts += ["", *_shared_helpers(name, big)]
    for call in built.calls:
        parts += ["", *_checked(call, name, big)]
    parts += ["", *_dispatch(built, name, big)]
    return "\n".join([*parts, "", "#ifdef __cplusplus", "}", "#endif", "", "#endif", ""])


def _statuses(big: str) -> list[str]:
    rows = [f"    {big}_{status.name} = {int(status)}, /* {MEANINGS[status]} */" for status in Status]
    return ["/* What functions return. */", "enum {", *rows[:-1], rows[-1].replace(",", "", 1), "};"]


def _types(big: str) -> list[str]:
    rows = [f"    {big}_{each.upper()} = {number}" for number, each in enumerate(C_TYPES)]
    return ["/* Types of tensors' entries; a bool is a byte, 0 or 1. */", "enum {", ",\n".join(rows), "};"]


def _sizes(call: Call) -> list[str]:
    big = call.prefix.upper()
    found = [f"#define {big}_WORKSPACE_BYTES {call.workspace_bytes}"]
    for port in call.ports:
        own = f"{big}_{port.name.upper()}"
        found += [
            f"#define {own}_COUNT {port.count} /* {shape_text(port.shape)} */",
            f"#define {own}_BYTES {port.bytes}",
            f"#define {own}_RANK {len(port.shape)}",
        ]
        if port.shape:
            found.append(f"#define {own}_SHAPE {{{', '.join(map(str, port.shape))}}}")
    return found


def _functions(call: Call, big: str) -> list[str]:
    prefix = call.prefix
    told = [f" *   {port.name}: {port.c_type}, {shape_text(port.shape)}" for port in call.ports]
    tensors = [f"const {port.c_type} *{port.name}" for port in call.inputs]
    tensors += [f"{each.port.c_type} *{each.port.name}" for each in call.outputs]
    found = [
        f"/* Makes {prefix.upper()}_WORKSPACE_BYTES of memory, at a multiple of {big}_ALIGNMENT, a workspace: once. */",
        f"int32_t {prefix}_prepare(void *workspace);",
        "",
        "/* Runs the model.",
        *told,
        f" *   workspace: prepared by {prefix}_prepare. */",
        f"int32_t {prefix}_run({', '.join([*tensors, 'void *workspace'])});",
    ]
    if call.threads > 1:
        shared = ", ".join([*tensors, "void *workspace", "int32_t part", "int32_t parts", "void (*idle)(void)"])
        found += [
            "",
            "/* Runs the model by several threads: each of `parts` threads calls it with all the same but `part`, 0 to",
            " * parts - 1. The results are there when all of them have returned; only then may the next call begin.",
            " * They wait for each other, calling `idle` meanwhile, such as sched_yield, where it is not null. */",
            f"int32_t {prefix}_run_part({shared});",
        ]
    return found


def _shared_helpers(name: str, big: str) -> list[str]:
    cases = [f'    case {big}_{status.name}: return "{MEANINGS[status]}";' for status in Status]
    return f"""\
/* A status in words. */
static inline const char *{name}_status_text(int32_t status)
{{
    switch (status) {{
{chr(10).join(cases)}
    default: return "no status of {name}";
    }}
}}

/* The first address in memory that a workspace may begin at: give it {big}_ALIGNMENT bytes more than the workspace. */
static inline void *{name}_aligned(void *memory)
{{
    return (char *)memory + ({big}_ALIGNMENT - (uintptr_t)memory % {big}_ALIGNMENT) % {big}_ALIGNMENT;
}}

/* A tensor, for {name}_call. */
typedef struct {{
    void *data;           /* its entries, row by row; inputs are only read */
    size_t bytes;         /* of memory at `data` */
    int32_t type;         /* {big}_FLOAT32, ... */
    int32_t rank;         /* its axes */
    const int64_t *shape; /* `rank` extents */
}} {name}_tensor;

static inline int32_t {name}_fits(const {name}_tensor *given, int32_t type, int32_t rank, const int64_t *shape)
{{
    if (given->type != type) return {big}_WRONG_TYPE;
    if (given->rank != rank) return {big}_WRONG_RANK;
    for (int32_t axis = 0; axis < rank; axis++) {{
        if (given->shape[axis] != shape[axis]) return {big}_WRONG_SHAPE;
    }}
    return {big}_OK;
}}

static inline int32_t {name}_is_null(const {name}_tensor *given)
{{
    return given->data == NULL || (given->rank > 0 && given->shape == NULL);
}}""".split("\n")


def _checked(call: Call, name: str, big: str) -> list[str]:
    own = call.prefix.upper()
    outputs = [each.port for each in call.outputs]
    given = [(f"inputs[{number}]", port) for number, port in enumerate(call.inputs)]
    written = [(f"outputs[{number}]", port) for number, port in enumerate(outputs)]

    def fitting(tensors: list[tuple[str, Port]]) -> list[str]:
        found = []
        for tensor, port in tensors:
            shape = f"{port.name}_shape" if port.shape else "NULL"
            if port.shape:
                found.append(f"    static const int64_t {shape}[] = {own}_{port.name.upper()}_SHAPE;")
            kind = f"{big}_{port.dtype.upper()}"
            found.append(
                f"    const int32_t {port.name}_is = {name}_fits(&{tensor}, {kind}, {len(port.shape)}, {shape});"
            )
        found += [f"    if ({port.name}_is != {big}_OK) return {port.name}_is;" for _, port in tensors]
        return found

    holding = [
        f"    if ({tensor}.bytes < {own}_{port.name.upper()}_BYTES) return {big}_TOO_SMALL;"
        for tensor, port in (*given, *written)
    ]
    arguments = [f"(const {port.c_type} *){tensor}.data" for tensor, port in given]
    arguments += [f"({port.c_type} *){tensor}.data" for tensor, port in written]
    return [
        f"static inline int32_t {call.prefix}_takes(const {name}_tensor *inputs)",
        "{",
        *fitting(given),
        f"    return {big}_OK;",
        "}",
        "",
        f"static inline int32_t {call.prefix}_checked(const {name}_tensor *inputs, const {name}_tensor *outputs,",
        "    void *workspace, size_t workspace_bytes)",
        "{",
        *fitting(written),
        *holding,
        f"    if (workspace_bytes < {own}_WORKSPACE_BYTES) return {big}_TOO_SMALL;",
        f"    return {call.prefix}_run({', '.join([*arguments, 'workspace'])});",
        "}",
    ]


def _dispatch(built: Compiled, name: str, big: str) -> list[str]:
    counts = {"inputs": len(built.calls[0].inputs), "outputs": len(built.calls[0].outputs)}
    tensors = [f"&{kind}[{number}]" for kind, count in counts.items() for number in range(count)]
    wrong = f"input_count != {counts['inputs']} || output_count != {counts['outputs']}"
    tried = []
    for call in built.calls:
        tried += [
            f"    status = {call.prefix}_takes(inputs);",
            f"    if (status == {big}_OK) return {call.prefix}_checked(inputs, outputs, workspace, workspace_bytes);",
            "    if (status > nearest) nearest = status;",
        ]
    return [
        "/* Runs the model for the shapes of its inputs, once types, shapes and sizes of all tensors are checked.",
        " * The workspace is one that was prepared for these shapes. */",
        f"static inline int32_t {name}_call(const {name}_tensor *inputs, int32_t input_count,",
        f"    const {name}_tensor *outputs, int32_t output_count, void *workspace, size_t workspace_bytes)",
        "{",
        f"    int32_t status, nearest = {big}_OK;",
        f"    if ({wrong}) return {big}_WRONG_COUNT;",
        f"    if (inputs == NULL || outputs == NULL) return {big}_NULL_POINTER;",
        *(f"    if ({name}_is_null({each})) return {big}_NULL_POINTER;" for each in tensors),
        *tried,
        "    return nearest;",
        "}",
    ]
