"""Writes a built model: object file, libraries, header, and callers in C, CMake, Python and JavaScript."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from pprint import pformat
from typing import Any

from autoprune.errors import AutopruneError, FileError
from autoprune.files import as_path, temporary_folder, write_bytes, write_json
from autoprune.repack.aot.build import Compiled, check_arguments, compiled
from autoprune.repack.aot.description import description, interface
from autoprune.repack.aot.example import example
from autoprune.repack.aot.header import header
from autoprune.repack.aot.interface import c_name, shape_text
from autoprune.repack.aot.sections import section_sizes
from autoprune.repack.aot.targets import HOST, platform
from autoprune.repack.aot.toolchain import linker, toolchain
from autoprune.repack.report import ProgramModel, RepackedModel
from autoprune.repack.runtime.program import Shapes

_OURS = "autoprune"  # in the first line of every text that is written here, and among the description's versions
_ZIG = 'pip install "autoprune[build]" brings one for every target'


@dataclass(frozen=True)
class Built:
    """What `build` wrote for one target.

    Attributes:
        target: as it was asked for.
        folder: where the files lie.
        files: their names.
        shapes: of the inputs, for each set the model was built for.
        object_bytes: of the object file.
        code_bytes: of it, machine code.
        data_bytes: of it, read-only data: weights above all.
        workspace_bytes: memory that one call works in, for each set of shapes.
        notes: what was not made, and what is missing for it.
    """

    target: str
    folder: Path
    files: tuple[str, ...]
    shapes: tuple[str, ...]
    object_bytes: int
    code_bytes: int
    data_bytes: int
    workspace_bytes: tuple[int, ...]
    notes: tuple[str, ...]


def build(
    fast: RepackedModel, target: str = HOST, shapes: Sequence[Shapes] | None = None, *, out: Path | str,
    name: str = "model", threads: int = 1,
) -> Built:  # fmt: skip
    """Compiles a repacked program into a C library that needs neither Python nor this package.

    Args:
        fast: what `repack` or `load` returned.
        target: ``host``, this machine, or ``x86-64-v2``, ``x86-64-v3``, ``x86-64-v4``, ``aarch64``,
            ``aarch64-dotprod``, ``armv7``, ``riscv64``, ``wasm32``.
        shapes: for each call that the library shall have, the shapes of all inputs, such as
            ``[((1, 3, 32, 32),), ((8, 3, 32, 32),)]`` for one input; those of the example when None.
        out: the folder for the files. Files of an earlier build there are replaced, one by one.
        name: of the model, in files and in C.
        threads: the most that may work on one call.

    Raises:
        AutopruneError: what is no program, operations without a native form, shapes that the model does not take, an
            unknown target; nothing is written then.
        FileError: a file of the name of one of ours is not of an earlier build, or cannot be written.
    """
    if not isinstance(target, str):
        raise AutopruneError(f"target is one name, not {target!r}: build once for each.")
    return build_all(fast, {target: as_path(out)}, shapes, name=name, threads=threads)[0]


def build_all(
    fast: RepackedModel, folders: Mapping[str, Path], shapes: Sequence[Shapes] | None = None, *, name: str = "model",
    threads: int = 1,
) -> list[Built]:  # fmt: skip
    """`build` for several targets; nothing is written where one of them is refused.

    Args:
        fast: what `repack` or `load` returned.
        folders: target -> its folder.
        shapes: as for `build`, like the others.
        name: of the model.
        threads: the most that may work on one call.
    """
    check_arguments(name, threads)
    for target, folder in folders.items():
        is_wasm = platform(target).is_wasm
        if is_wasm and threads > 1:
            raise AutopruneError(f"{target} is built for one thread, not for {threads}: leave threads out.")
        if target == HOST and sys.platform != "linux":
            raise AutopruneError(
                f"object files are for Linux, and this is {sys.platform}: name the target you build for."
            )
        _check_folder(folder, _names(c_name(name), is_wasm))
    models = {target: compiled(fast, target, shapes, name, threads) for target in folders}
    assert isinstance(fast, ProgramModel)  # else it was refused
    outputs = fast.program.graph.outputs
    made = [_made(each, target, folders[target], outputs) for target, each in models.items()]
    for each in made:
        each.write()
    return [each.built for each in made]


@dataclass(frozen=True)
class _Made:
    """Files that are ready to be written.

    Attributes:
        built: what they are.
        texts: name -> content, None where an earlier build may have left a file that does not go with these.
        about: the description, which is written last.
    """

    built: Built
    texts: Mapping[str, bytes | None]
    about: Mapping[str, Any]

    def write(self) -> None:
        for name, data in self.texts.items():
            path = self.built.folder / name
            if data is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, data)
        write_json(self.built.folder / self.built.files[-1], self.about)


def _names(name: str, is_wasm: bool) -> dict[str, str]:
    """Kind of file -> its name, the description's last."""
    common = {"object": f"{name}.o", "header": f"{name}.h"}
    if is_wasm:
        return common | {"wasm": f"{name}.wasm", "module": f"{name}.mjs", "description": f"{name}.json"}
    return common | {
        "static": f"lib{name}.a", "shared": f"lib{name}.so", "wrapper": f"{name}.py", "example": "main.c",
        "config": f"{name}Config.cmake", "cmake": "CMakeLists.txt", "description": f"{name}.json",
    }  # fmt: skip


def _check_folder(folder: Path, names: Mapping[str, str]) -> None:
    """Raises FileError where a file would be replaced that a user wrote."""
    for kind in ("header", "module", "wrapper", "example", "config", "cmake", "description"):
        path = folder / names[kind] if kind in names else None
        if path is not None and path.exists():
            text = path.read_bytes() if path.is_file() else b""
            told = text if kind == "description" else text[:4096].partition(b"\n")[0]
            if _OURS.encode() not in told:
                raise FileError(f"{path} is there already, and of no earlier build: give another folder.")


def _made(built: Compiled, target: str, folder: Path, outputs: Any) -> _Made:
    names, sizes = _names(built.name, built.platform.is_wasm), section_sizes(built.code)
    libraries = _libraries(built, names)
    about = interface(built, outputs)
    files = {"object": built.code, "header": header(built, target).encode(), **libraries}
    files |= _callers(built, about)
    told = Built(
        target=target,
        folder=folder,
        files=(*(names[kind] for kind in files), names["description"]),
        shapes=tuple(" and ".join(shape_text(port.shape) for port in call.inputs) for call in built.calls),
        object_bytes=sizes["object"],
        code_bytes=sizes["code"],
        data_bytes=sizes["data"],
        workspace_bytes=tuple(call.workspace_bytes for call in built.calls),
        notes=_missing(built, libraries),
    )
    texts = {name: files.get(kind) for kind, name in names.items() if kind != "description"}
    return _Made(told, texts, about | description(built, target, sizes))


def _libraries(built: Compiled, names: Mapping[str, str]) -> dict[str, bytes]:
    """What tools that are installed here make of the object file."""
    own = built.platform
    with temporary_folder() as folder:
        source = folder / names["object"]
        source.write_bytes(built.code)
        if own.is_wasm:
            tool = linker()
            if tool is None:
                return {}
            exported = [f"{call.prefix}_{each}" for call in built.calls for each in ("prepare", "run", "mark")]
            tool.module([source], folder / names["wasm"], exported)
            return {"wasm": (folder / names["wasm"]).read_bytes()}
        tools = toolchain(own)
        if tools is None:
            return {}
        tools.static_library([source], folder / names["static"])
        tools.shared_library([source], folder / names["shared"])
        return {kind: (folder / names[kind]).read_bytes() for kind in ("static", "shared")}


def _missing(built: Compiled, made: Mapping[str, bytes]) -> tuple[str, ...]:
    if made:
        return ()
    if built.platform.is_wasm:
        return (f"no {built.name}.wasm, which the .mjs needs: no wasm-ld is here; {_ZIG}, or Debian's package lld.",)
    package = built.platform.debian_package
    debian = f", or Debian's package {package}" if package else ""
    there = f"cc -shared -o lib{built.name}.so {built.name}.o"
    return (f"no libraries: no linker for this target is here; {_ZIG}{debian}. On the device: {there}",)


def _callers(built: Compiled, about: Mapping[str, Any]) -> dict[str, bytes]:
    texts: dict[str, str] = {}
    if built.platform.is_wasm:
        model = dict(about) | {"library": f"{built.name}.wasm"}
        line = f"const MODEL = {json.dumps(model, indent=1)};"
        texts["module"] = _filled("wrapper.mjs", "const MODEL = {};", line)
    else:
        model = dict(about) | {"library": f"lib{built.name}.so"}
        line = f"MODEL: dict[str, Any] = {pformat(model, width=120, sort_dicts=False)}"
        texts["wrapper"] = _filled("wrapper.py", "MODEL: dict[str, Any] = {}", line)
        texts["example"] = example(built)
        texts["config"] = _filled("Config.cmake", "@NAME@", built.name)
        texts["cmake"] = _filled("CMakeLists.txt", "@NAME@", built.name)
    return {kind: text.encode() for kind, text in texts.items()}


def _filled(template: str, place: str, text: str) -> str:
    """A template with `text` in a place, which is in it."""
    source = (resources.files("autoprune.repack.aot") / "templates" / template).read_text(encoding="utf-8")
    assert place in source, template
    return source.replace(place, text)
