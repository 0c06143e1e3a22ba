"""What is left out of the bundle, each with the reason; and the proof that nothing which stays asks for it."""

import ast
import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

# Patterns of paths below site-packages; a star also matches slashes. The first that matches decides.
KEPT = (
    "torch/bin/torch_shm_manager",
    "torch/_inductor/*",
    "*/licenses/*",
)
PRUNED = (
    ("torch/bin/*", "tests and protoc"),
    ("torch/test/*", "tests"),
    ("torch/lib/libaoti_custom_ops.so", "tests"),
    ("torch/lib/libbackend_with_compiler.so", "tests"),
    ("torch/lib/libjitbackend_test.so", "tests"),
    ("torch/lib/libtorchbind_test.so", "tests"),
    ("torch/share/*", "for building with CMake"),
    ("cv2/data/*", "face detectors"),
    ("numba/np/ufunc/tbbpool.*", "for libtbb, which comes with nothing here"),
    ("mistral_common/data/*", "tokenizers of models; a model brings its own"),
    ("pycountry/locales/*", "names of countries in other languages"),
    ("jsonschema/benchmarks/*", "tests"),
    ("scipy/special/_precompute/*", "made SciPy's tables"),
    ("setuptools/*/*.exe", "Windows"),
    ("*/tests/*", "tests"),
    ("*/test/*", "tests"),
    ("*/conftest.py", "tests"),
    ("*.a", "static libraries"),
    ("*.lib", "static libraries"),
    ("*.cmake", "for building with CMake"),
    ("*.pyi", "types, for checkers"),
    ("*.dist-info/direct_url.json", "a path of the building machine"),
    ("*.dist-info/INSTALLER", "says nothing"),
    ("*.dist-info/REQUESTED", "says nothing"),
    ("*.dist-info/RECORD", "rewritten: it would name what is left out"),
)
# On a GPU kernels are built from sources of several packages; on a CPU by inductor alone.
PRUNED_ON_CPU = (
    ("torch/include/*", "headers; those that inductor's code reaches are copied by headers.py"),
    ("*.pxd", "sources"),
    ("*.pyx", "sources"),
    ("*.c", "sources"),
    ("*.cc", "sources"),
    ("*.cpp", "sources"),
    ("*.cu", "sources"),
    ("*.h", "headers"),
    ("*.hpp", "headers"),
)
# The same for the standard library, below lib/pythonX.Y.
STDLIB_PRUNED = (
    ("site-packages/*", "comes from the environment"),
    ("test/*", "tests"),
    ("*/test/*", "tests"),
    ("*/tests/*", "tests"),
    ("config-*", "for building Python"),
    ("ensurepip/*", "nothing is installed into a bundle"),
    ("idlelib/*", "an editor"),
    ("lib2to3/*", "Python 2"),
    ("tkinter/*", "windows"),
    ("turtledemo/*", "windows"),
    ("turtle.py", "windows"),
    ("lib-dynload/_tkinter.*", "windows"),
    ("lib-dynload/_curses*", "terminals"),
    ("lib-dynload/readline.*", "terminals, and its library is under the GPL"),
    ("lib-dynload/_gdbm.*", "its library is under the GPL"),
    ("lib-dynload/nis.*", "Sun's directory service"),
    ("lib-dynload/ossaudiodev.*", "sound cards"),
    ("lib-dynload/*test*", "tests"),
    ("lib-dynload/xxlimited*", "examples"),
    ("*.exe", "Windows"),
    ("*.pyc", "compiled anew"),
)
# Modules that no server imports as a rule, and that are compiled each time if one does.
UNCOMPILED = re.compile(
    r"/(transformers/models/\w+/(modeling|modular|convert)_|torch/testing/|sympy/physics/|pygments/lexers/|networkx/)"
)
# Imports of what is left out, of which each needs its reason.
DANGLING = (
    ("PIL/ImageTk.py", "windows"),
    ("PIL/_tkinter_finder.py", "windows"),
    ("distutils/util.py", "translates Python 2"),
    ("multiprocessing/util.py", "cleans up after tests"),
    ("mpmath/__init__.py", "mpmath.runtests() runs its tests"),
    ("numba/cuda/testing.py", "a base of tests"),
    ("numba/misc/POST.py", "runs its tests"),
    ("numba/misc/help/inspector.py", "a tool of numba's developers"),
    ("numba/testing/_runtests.py", "runs its tests"),
    ("tqdm/tk.py", "windows"),
)


def reason(path: PurePosixPath, accelerator: str) -> str | None:
    """Why the file of a package, below site-packages, is left out; None where it stays."""
    if any(fnmatch.fnmatchcase(str(path), pattern) for pattern in KEPT):
        return None
    return _first(path, PRUNED + (PRUNED_ON_CPU if accelerator == "cpu" else ()))


def stdlib_reason(path: PurePosixPath) -> str | None:
    """The same for a file of the standard library."""
    return _first(path, STDLIB_PRUNED)


def _first(path: PurePosixPath, rules: Iterable[tuple[str, str]]) -> str | None:
    return next((why for pattern, why in rules if fnmatch.fnmatchcase(str(path), pattern)), None)


@dataclasses.dataclass(frozen=True, order=True)
class Dangling:
    """An import of a module that is left out, by one that stays."""

    path: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def dangling_imports(kept: Iterable[tuple[PurePosixPath, Path]], left_out: Iterable[PurePosixPath]) -> list[Dangling]:
    """Every import, at any depth of any module that stays, of a module that is left out.

    Not counted is one whose failure is caught where it stands, that only a type checker sees, or that `DANGLING` names.

    Args:
        kept: path below site-packages, and where it can be read.
        left_out: paths below site-packages.

    """
    staying, gone = set(), {module for path in left_out if (module := _module(path))}
    sources = []
    for path, where in kept:
        if module := _module(path):
            staying.add(module)
            # A package stays as long as anything in it does.
            staying.update(".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 1))
        if path.suffix == ".py":
            sources.append((path, where))
    gone -= staying
    # Whoever imports one of them writes the name of the outermost folder or file that went.
    names = {module.rpartition(".")[2] for module in gone if module.rpartition(".")[0] not in gone}
    named = re.compile(rf"\b(?:{'|'.join(sorted(names))})\b".encode())
    found = []
    for path, where in sources:
        source = where.read_bytes()
        if not named.search(source):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # a template, or for another version of Python
        package = list(path.parent.parts)
        for line, module in _imports(tree, package):
            if module in gone:
                found.append(Dangling(str(path), line, module))
    explained = {path for path, _ in DANGLING}
    return sorted({each for each in found if each.path not in explained})


def _module(path: PurePosixPath) -> str | None:
    if path.suffix not in {".py", ".so"}:
        return None
    stem = path.name.split(".")[0]
    parts = path.parent.parts if stem == "__init__" else (*path.parent.parts, stem)
    return ".".join(parts) or None


def _imports(node: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every module that the code may import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        name = ".".join([*base, *([node.module] if node.module else [])])
        yield node.lineno, name
        for alias in node.names:
            yield node.lineno, f"{name}.{alias.name}"
    elif isinstance(node, ast.Try) and any(_catches_import(handler) for handler in node.handlers):
        children = [*node.handlers, *node.orelse, *node.finalbody]
        for child in children:
            yield from _imports(child, package)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.orelse:
            yield from _imports(child, package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package)


def _catches_import(handler: ast.ExceptHandler) -> bool:
    names = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
    caught = handler.type
    if caught is None:
        return True
    each = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(isinstance(name, ast.Name) and name.id in names for name in each)
