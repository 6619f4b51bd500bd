# SPDX-License-Identifier: Apache-2.0
"""Which lines of a file have to do with CUDA, found in its syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hal.launch.libraries import LIBRARIES
from hal.launch.scan.names import Names

Kind = Literal["call", "asks", "text", "environment", "library"]
"""What a site is: `call`, something of torch's is used; `asks`, the program asks where something is, or compares the
name of a device or of a backend, and may choose its way by the answer; `text`, such a name as plain text, which counts
once it reaches a device argument (as a key of a dict it is not certain); `environment`, a variable that CUDA or NCCL
reads; `library`, an import of one that brings CUDA kernels."""

COMPARISON = "comparison of a device's name"
BACKEND_COMPARISON = "comparison of a backend's name"
TEXT = "the text 'cuda'"
KEY = "the key 'cuda'"
BACKEND_TEXT = "the text 'nccl'"
DEVICE_ARGUMENT = "device="

_CUDA = re.compile(r"cuda(:\d*)?$")
_BACKEND = re.compile(r"(cpu:\w+,)?(cuda:)?nccl(,cpu:\w+)?$")
_VARIABLE = re.compile(r"(CUDA|NCCL|TORCH_NCCL|TORCH_CUDA|PYTORCH_CUDA|PYTORCH_ALLOC|CUBLAS|NVTE|TRITON|NVIDIA)_\w*$")

# Attributes of tensors, modules and events, of which the tree does not say what they belong to.
_METHODS = {"cuda", "record_stream", "pin_memory", "is_pinned", "get_device", "elapsed_time"}
_ATTRIBUTES = {"device", "is_cuda", "is_cpu"}
# Functions of `torch.cuda`, called of what may be that module under a name that is given elsewhere: `device_module`.
_OF_A_DEVICE_MODULE = {
    "current_device", "current_stream", "default_stream", "device_count", "empty_cache", "get_device_capability",
    "get_device_name", "get_device_properties", "get_rng_state_all", "is_bf16_supported", "manual_seed_all",
    "max_memory_allocated", "max_memory_reserved", "mem_get_info", "memory_allocated", "memory_reserved",
    "memory_stats", "memory_summary", "reset_max_memory_allocated", "reset_peak_memory_stats", "set_device",
    "set_rng_state_all", "set_stream", "synchronize",
}  # fmt: skip
_MAKERS_OF_LIKES = {"new_tensor", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}
_OWN_RULES = _MAKERS_OF_LIKES | {"to", "type", "cpu", "numpy"}
_FACTORIES = frozenset(
    f"torch.{name}"
    for name in (
        "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
        "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
    )
)  # fmt: skip
_REGISTRATIONS = ("torch.library.impl", "torch.library.register_kernel", "torch.library.custom_op")
_PREFIXES = ("torch.cuda", "torch.version.cuda", "torch.version.hip", "torch.backends.cuda", "torch.backends.cudnn")
_IMPORTERS = ("importlib.import_module", "importlib.util.find_spec")
_ENVIRONMENT = ("os.environ", "os.getenv", "os.putenv", "os.unsetenv")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a program that has to do with CUDA.

    Attributes:
        file: as it was given.
        line: of the expression.
        api: what is used there: a name of torch's such as `torch.cuda.synchronize` or `torch.Tensor.to`, `env:NAME`,
            `import:NAME`, or one of this module's phrases.
        kind: see `Kind`.
        certain: whether CUDA is named there. Otherwise a variable decides, as in `x.to(device)`.
    """

    file: str
    line: int
    api: str
    kind: Kind
    certain: bool = True


@dataclass(frozen=True)
class Known:
    """What the scan wants to know of a redirected name.

    Attributes:
        asks: whether programs choose their way by the answer.
        translates: whether it is redirected only where CUDA is among its arguments, as in `DataLoader(...)`.
    """

    asks: bool = False
    translates: bool = False


def sites(file: str, tree: ast.AST, known: Mapping[str, Known]) -> list[Site]:
    """Return the sites of a file, by line.

    Args:
        file: for the sites.
        tree: of the file.
        known: what is redirected, by torch's name for it.
    """
    finder = _Finder(file, Names(tree, {*known, *_FACTORIES, "torch.device"}), known)
    finder.visit(tree)
    return sorted(set(finder.found))


def is_cuda(node: ast.AST | None) -> bool:
    """Tell whether an expression is the name of a CUDA device: `"cuda"`, `"cuda:1"`, `f"cuda:{rank}"`."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and _CUDA.match(node.value) is not None
    if isinstance(node, ast.JoinedStr) and node.values:
        first = node.values[0]
        return isinstance(first, ast.Constant) and str(first.value).startswith("cuda")
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        return is_cuda(node.left)
    return False


_UNKNOWN = Known()


class _Finder(ast.NodeVisitor):
    """Collects sites. An expression that was taken as part of a site is not one of its own again."""

    def __init__(self, file: str, names: Names, known: Mapping[str, Known]) -> None:
        self.found: list[Site] = []
        self._file = file
        self._names = names
        self._known = known
        self._taken: set[int] = set()

    def _add(self, node: ast.AST, api: str, kind: Kind = "call", certain: bool = True) -> None:
        self.found.append(Site(self._file, getattr(node, "lineno", 1), api, kind, certain))

    def _take(self, *nodes: ast.AST | None) -> None:
        self._taken.update(id(node) for node in nodes)

    # Scopes ----------------------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for part in (*node.decorator_list, node.args, *([node.returns] if node.returns else [])):
            self.visit(part)
        with self._names.inside(node):
            for statement in node.body:
                self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        with self._names.inside(node):
            for statement in node.body:
                self.visit(statement)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        with self._names.inside(node):
            self.visit(node.body)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        with self._names.inside(node):
            self.generic_visit(node)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    # Names of torch's ------------------------------------------------------------------------------------------------

    def _api(self, full: str) -> str | None:
        """Return the API that a dotted name uses: the longest part of it that is one, or None."""
        parts = full.split(".")
        for count in range(len(parts), 0, -1):
            name = ".".join(parts[:count])
            if name in self._known:
                return name
        if full.startswith("torch.distributed."):  # which has many paths to one function
            for name in (f"torch.distributed.{parts[-1]}", f"torch.distributed.fsdp.{parts[-1]}"):
                if name in self._known:
                    return name
        if any(full == prefix or full.startswith(f"{prefix}.") for prefix in _PREFIXES):
            return full
        return full if full.startswith("torch._C._cuda") else None

    def _named(self, node: ast.AST, full: str) -> None:
        """A name of torch's that is not called here: handed on, or a class in `isinstance`."""
        api = self._api(full)
        if api is not None and not self._about(api).translates:
            self._add(node, api, "asks" if self._about(api).asks else "call")

    def _about(self, api: str) -> Known:
        return self._known.get(api, _UNKNOWN)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        full = self._names.of(node)
        if full is not None:
            if id(node) not in self._taken:
                self._named(node, full)
            if not isinstance(node.value, (ast.Name, ast.Attribute)):
                self.generic_visit(node)
            return
        if id(node) not in self._taken and node.attr in _ATTRIBUTES and isinstance(node.ctx, ast.Load):
            self._add(_end(node), f"torch.Tensor.{node.attr}", "asks", node.attr != "device")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        full = self._names.of(node)
        if full is not None and id(node) not in self._taken and isinstance(node.ctx, ast.Load):
            self._named(node, full)

    # Calls -----------------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        full = self._names.of(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if full is None and isinstance(node.func, ast.Attribute):
            self._method(node, node.func, keywords)
        elif full is not None and full.startswith("torch."):
            self._function(node, full, keywords)
        elif full == "functools.partial" and node.args and (self._names.of(node.args[0]) or "").startswith("torch."):
            called = ast.Call(node.args[0], node.args[1:], node.keywords, lineno=node.lineno, col_offset=0)
            self._function(called, str(self._names.of(node.args[0])), keywords)
        elif full is not None and _of_a_device_module(node.func):
            self._of_device_module(node, full.rpartition(".")[2])
        elif full is not None and full in _IMPORTERS and node.args and isinstance(node.args[0], ast.Constant):
            self._library(node, str(node.args[0].value))
        if full is not None and full.startswith(_ENVIRONMENT) and node.args:
            self._variable(node, node.args[0])
        if full is None or not full.startswith("torch."):
            for name, given in keywords.items():
                if "device" in name and is_cuda(given) and id(given) not in self._taken:
                    self._take(given)
                    self._add(given, DEVICE_ARGUMENT)
        self.generic_visit(node)

    def _function(self, node: ast.Call, full: str, keywords: dict[str, ast.expr]) -> None:
        """A function or a class of torch's that is called by name."""
        self._take(node.func)
        api = self._api(full)
        device = keywords.get("device", keywords.get("map_location"))
        given = [*node.args, *keywords.values()]
        if full == "torch.device":
            if given and not _is_other_device(given[0]):
                self._add(node, full, certain=_is_index(given[0]) or any(map(is_cuda, given)))
            self._take(*filter(is_cuda, given))
        elif full in _REGISTRATIONS:
            if any(isinstance(part, ast.Constant) and str(part.value).lower() == "cuda" for part in given):
                self._add(node, "torch.library.Library.impl")
            self._take(*filter(is_cuda, given))
        elif api is not None:
            about = self._about(api)
            certain = not about.translates or api.startswith("torch.cuda.") or any(map(is_cuda, given))
            self._add(node, api, "asks" if about.asks else "call", certain)
            self._take(*filter(is_cuda, given), *(argument for argument in given if _is_backend(argument)))
        elif device is not None and not _is_other_device(device):
            self._add(node, full, certain=self._takes_cuda(device))
        elif full in _FACTORIES and any(keyword.arg is None for keyword in node.keywords):
            self._add(node, full, certain=False)  # `torch.zeros(2, **where)`

    def _method(self, node: ast.Call, method: ast.Attribute, keywords: dict[str, ast.expr]) -> None:
        """A method of something unknown, such as a tensor, a module or an event."""
        name = method.attr
        place = _end(method)
        if name in ("get", "pop", "setdefault") and node.args:
            self._key(node.args[0])
        if name in _METHODS:
            self._add(place, "torch.cuda.Event.elapsed_time" if name == "elapsed_time" else f"torch.Tensor.{name}",
                      "asks" if name in ("get_device", "is_pinned") else "call")  # fmt: skip
        elif _of_a_device_module(method) or (name in _OF_A_DEVICE_MODULE and name != "synchronize"):
            self._of_device_module(place, name)
        elif name == "to_empty":
            device = keywords.get("device", node.args[0] if node.args else None)
            if device is not None and not _is_other_device(device):
                self._add(place, "torch.nn.Module.to_empty", certain=self._takes_cuda(device))
        elif name == "to":
            spread = next((keyword.value for keyword in node.keywords if keyword.arg is None), None)
            device = keywords.get("device", node.args[0] if node.args else spread)
            if device is not None and not _is_other_device(device) and not self._is_dtype(device):
                self._add(place, "torch.Tensor.to", certain=self._takes_cuda(device))
        elif name in _MAKERS_OF_LIKES and "device" in keywords and not _is_other_device(keywords["device"]):
            self._add(place, f"torch.Tensor.{name}", certain=self._takes_cuda(keywords["device"]))
        elif f"torch.Tensor.{name}" in self._known and name not in _OWN_RULES:
            self._add(place, f"torch.Tensor.{name}", certain=False)
        elif name == "type":
            asked = node.args[0] if node.args else None
            cuda = isinstance(asked, ast.Constant) and str(asked.value).startswith("torch.cuda.")
            if asked is None or cuda or not self._is_dtype(asked):
                self._add(place, "torch.Tensor.type", "call" if asked is not None else "asks", cuda)

    def _of_device_module(self, place: ast.AST, name: str) -> None:
        api = f"torch.cuda.{name}"
        self._add(place, api, "asks" if self._about(api).asks else "call", certain=False)

    def _takes_cuda(self, device: ast.AST) -> bool:
        """Tell whether an argument names CUDA; if it does, the text is no site of its own."""
        if is_cuda(device):
            self._take(device)
            return True
        return self._names.of(getattr(device, "func", device)) == "torch.device" and any(
            is_cuda(argument) for argument in getattr(device, "args", ())
        )

    def _is_dtype(self, node: ast.AST) -> bool:
        full = self._names.of(node)
        if full is not None and full.startswith("torch.") and full.count(".") == 1:
            return True
        return isinstance(node, ast.Attribute) and node.attr == "dtype"

    # Comparisons, texts, variables, imports ---------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> None:
        for part in ast.walk(node):
            if id(part) in self._taken or not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                continue
            if _CUDA.match(part.value):
                self._take(part)
                self._add(part, COMPARISON, "asks")
            elif _BACKEND.match(part.value):
                self._take(part)
                self._add(part, BACKEND_COMPARISON, "asks")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        full = self._names.of(node.value)
        if full == "os.environ":
            self._variable(node, node.slice)
        self._key(node.slice)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key in node.keys:
            self._key(key)
        self.generic_visit(node)

    def _key(self, key: ast.AST | None) -> None:
        """A key of a dict is most often a label, and a device only where it is handed on."""
        if isinstance(key, ast.Constant) and is_cuda(key) and id(key) not in self._taken:
            self._take(key)
            self._add(key, KEY, "text", certain=False)

    def _variable(self, node: ast.AST, name: ast.AST) -> None:
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and _VARIABLE.match(name.value):
            self._take(name)
            self._add(node, f"env:{name.value}", "environment")

    def visit_Constant(self, node: ast.Constant) -> None:
        if id(node) not in self._taken and isinstance(node.value, str):
            if _CUDA.match(node.value):
                self._add(node, TEXT, "text")
            elif _BACKEND.match(node.value):
                self._add(node, BACKEND_TEXT, "text")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        if id(node) in self._taken:
            self._take(*node.values)
        elif is_cuda(node) and re.match(r"cuda:?$", str(getattr(node.values[0], "value", ""))):
            self._take(*node.values)
            self._add(node, TEXT, "text")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._library(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            self._library(node, node.module)
            for alias in node.names:
                self._library(node, f"{node.module}.{alias.name}", exact=True)

    def _library(self, node: ast.AST, name: str, exact: bool = False) -> None:
        for library in LIBRARIES:
            if name == library or (not exact and name.startswith(f"{library}.")):
                self._add(node, f"import:{library}", "library")


def _of_a_device_module(called: ast.AST) -> bool:
    """Tell whether what is called is a function of `torch.cuda`, by the names of both: `device_module.empty_cache`."""
    if not isinstance(called, ast.Attribute) or called.attr not in _OF_A_DEVICE_MODULE:
        return False
    owner = getattr(called.value, "attr", getattr(called.value, "id", ""))
    return "device" in owner or "accelerator" in owner


def _is_backend(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and _BACKEND.match(node.value) is not None


def _is_other_device(node: ast.AST) -> bool:
    """Tell whether an expression names a device that is not CUDA, or none."""
    if not isinstance(node, ast.Constant) or isinstance(node.value, int):
        return False
    return node.value is None or (isinstance(node.value, str) and not _CUDA.match(node.value))


def _is_index(node: ast.AST) -> bool:
    """Tell whether an expression is the index of a device, which is CUDA's."""
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def _end(node: ast.Attribute) -> ast.AST:
    """Return a node on the line of the attribute's name, which is the call's: a chain may be spread over many lines."""
    return ast.Name(node.attr, lineno=node.end_lineno or node.lineno, col_offset=0)
