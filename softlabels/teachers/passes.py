"""Rule 3: logits know the pass that they came from.

A training pass leaves a mark on the graph nodes of its outputs (``grad_fn.metadata``), and the graph of what a loss is
given leads back to a mark: through casts, scaling, views, autocast, torch.compile and checkpoints. A mark lives as long
as its graph. It says which output of the pass it is; the way to it says which rows.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from softlabels.teachers.hooks import Scriptable, hang
from softlabels.teachers.structures import Logits, Output, outputs, rebuilt, rows_of

Node = Any  # torch.autograd.graph.Node, and what it saved
Way = Any  # from a mark to a loss's input, () or: (node, which of its outputs, from which of its inputs, the rest)

COMPILED = "CompiledFunctionBackward"
MOVING = {
    *("AsStrided", "Cat", "Flip", "Gather", "Index", "IndexSelect", "MaskedSelect"),
    *("Roll", "Rot90", "Sort", "Stack", "Take", "Topk"),
}
WRITING = {
    "IndexAdd",
    "IndexCopy",
    "IndexPut",
    "MaskedScatter",
    "Scatter",
    "ScatterAdd",
}  # their others into their first
RESHAPING = {"ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"}
VIEWS = {  # what repeats them, and what their nodes know of its arguments
    "Permute": ("permute", "dims"),
    "Repeat": ("repeat", "repeats"),
    "Select": ("select", "dim", "index"),
    "Slice": ("slice", "dim", "start", "end", "step"),
    "Split": ("split", "split_size", "dim"),
    "SplitWithSizes": ("split_with_sizes", "split_sizes", "dim"),
    "T": ("t",),
    "Transpose": ("transpose", "dim0", "dim1"),
    "Unbind": ("unbind", "dim"),
}


class Pass:
    """One training pass: its inputs until the teacher was asked about them, then its answers, output by output.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        training: The modules that are in training mode, by id; None where that is not known.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: frozenset[int] | None) -> None:
        self.answers: dict[int, Logits] = {}  # by position in the output
        self.args, self.kwargs, self.training = args, kwargs, training
        self.autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in _device_types()]
        self.versions: list[tuple[Tensor, int]] = []
        if not torch.compiler.is_compiling():  # a compiler knows neither versions nor copies of objects
            self.args, self.kwargs = rebuilt(args, self._noted), rebuilt(kwargs, self._noted)

    def _noted(self, tensor: Tensor) -> Tensor:
        self.versions.append((tensor, _version(tensor)))
        return tensor

    def arguments(self, caches: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs; ``caches``: also where the model writes to one.

        Raises:
            RuntimeError: they have been written to, or one is a cache that the model writes to.
        """
        for name, value in (*enumerate(self.args), *self.kwargs.items()):
            if not caches and any("Cache" in cls.__name__ for cls in type(value).__mro__):
                raise RuntimeError(
                    f"the model was given a cache of its own ({name!r}), and writes to it; train without it "
                    "(use_cache=False), or let attach(..., teacher_inputs=...) leave it out"
                )
        if any(_version(tensor) != version for tensor, version in self.versions):
            raise RuntimeError(
                "the inputs of this training pass have been written to since it began, so the teacher would see "
                "something else; do not change them in place before the loss is computed"
            )
        return self.args, self.kwargs

    @contextmanager
    def autocast_state(self) -> Iterator[None]:
        """Restore the autocast state of the pass."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


class Passes:
    """Marks the training passes of a model for one loss, and finds them again.

    Args:
        model: The model, not kept alive; what it calls of itself within a pass is no pass.
        output: Where its logits are.
        begin: Called before each training pass; tells which modules are in training mode.
    """

    def __init__(self, model: nn.Module, output: Output, begin: Callable[[], frozenset[int] | None]) -> None:
        self.model = weakref.ref(model)
        self._output, self._begin = output, begin
        self._key = object()
        self._running: dict[int, list[Pass | None]] = {}  # by thread: calls of the model that have not returned
        self._unmarked: tuple[Any, ...] = (None,) * 4  # passes, with outputs, of compiled hooks, which see no graph
        self.hooks = (
            hang(self, "before", model.register_forward_pre_hook, prepend=True, with_kwargs=True),
            hang(self, "after", model.register_forward_hook, always_call=True),
        )
        model.__dict__.setdefault(Scriptable.NAME, Scriptable(model))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        compiling = torch.compiler.is_compiling()
        if not compiling and module is not self.model():
            return  # a replica
        running = self._running.setdefault(0 if compiling else threading.get_ident(), [])
        if running and not compiling and not _is_nested(module):
            running.clear()  # calls that were interrupted
        counts = not running and module.training and torch.is_grad_enabled()
        training = self._begin() if counts and not compiling else None
        running.append(Pass(args, kwargs, training) if counts else None)

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Forward hook."""
        compiling = torch.compiler.is_compiling()
        running = self._running.get(0 if compiling else threading.get_ident()) or self._running.get(0)
        if not running or (not compiling and module is not self.model()):
            return
        seen = running.pop()
        if seen is not None and compiling:
            self._unmarked = ((seen, result), *self._unmarked[:3])
        elif seen is not None:
            self._mark(seen, result)

    def _mark(self, seen: Pass, result: Any) -> None:
        for position, logits in outputs(result, None if callable(self._output) else self._output).items():
            tensor = rows_of(logits)
            if tensor.grad_fn is not None:
                marks: dict[int, Any] = tensor.grad_fn.metadata.setdefault(self._key, {})  # type: ignore[attr-defined]
                if tensor.output_nr not in marks or marks[tensor.output_nr][0] is not seen:
                    marks[tensor.output_nr] = (seen, position)

    def find(self, logits: Logits) -> tuple[Pass, int, Way, torch.Size] | None:
        """The pass that logits came from, which of its outputs they were, the way, and the shape of that output.

        Raises:
            RuntimeError: they came from several.
        """
        unmarked, self._unmarked = self._unmarked, (None,) * 4
        for entry in reversed([entry for entry in unmarked if entry is not None]):
            self._mark(*entry)
        start = rows_of(logits)
        waiting: list[tuple[Node, int, Way]] = [(start.grad_fn, start.output_nr, ())]
        found: list[tuple[Pass, int, Way, torch.Size]] = []
        visited: set[Any] = {(None, 0)}
        for node, index, way in waiting:
            marks = node.metadata.get(self._key, {}) if node is not None else {}
            if marks and node.name() == COMPILED and index not in marks:
                index = next(iter(marks))  # the graph of the model and of what comes after it
            if index in marks:
                found.append((*marks[index], way, _shape(node, index)))
            elif node is not None:
                edges = list(enumerate(node.next_functions))
                if 1 < len(edges) == len(node._input_metadata) and isinstance(node, BackwardCFunction):
                    edges = [edges[index]]  # a hook's node, which hands each tensor on
                for number, edge in edges:
                    if edge not in visited:
                        visited.add(edge)
                        waiting.append((*edge, (node, index, number, way)))
        if len({(seen, callable(self._output) or position) for seen, position, _, _ in found}) > 1:
            raise RuntimeError(
                "the loss was given logits made of several outputs or training passes of the attached model; call it "
                "for each and add up, or let attach(..., output=...) combine the outputs of one pass"
            )
        if not found:
            self._running.clear()  # whatever was interrupted inside a compiled model
        return found[0] if found else None


def same_rows(logits: Tensor, way: Way) -> Tensor | None:
    """Lay out a teacher's logits as the model's were on their way from the model to the loss; None if it is not clear.

    Raises:
        RuntimeError: rows were picked or moved.
    """
    while way:
        node, index, number, way = way
        name = node.name().split("Backward")[0]
        if name in MOVING or (name in WRITING and number):
            raise RuntimeError(
                f"the loss was given rows picked from the model's logits of shape {tuple(logits.shape)}, perhaps in "
                "another order, which the teacher's do not follow; let attach(..., output=...) do the same to what the "
                "teacher returns, or reorder the targets instead"
            )
        shape = _shape(node, index)
        if name in VIEWS:
            function, *arguments = VIEWS[name]
            saved = [_signed(getattr(node, f"_saved_{argument}")) for argument in arguments]
            views = getattr(torch.ops.aten, function)(logits, *saved)
            logits = views if isinstance(views, Tensor) else views[index]
        elif name in RESHAPING:
            logits = logits.reshape(shape)
        elif name == "Expand":
            logits = logits.expand(shape)
        if logits.shape != shape:
            return None
    return logits


def _shape(node: Node, index: int) -> torch.Size:
    return torch.Size(node._input_metadata[index].shape)


def _signed(saved: Any) -> Any:
    """Nodes show negative numbers as unsigned ones."""
    return [_signed(number) for number in saved] if isinstance(saved, tuple) else (saved + 2**63) % 2**64 - 2**63


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_nested(module: nn.Module) -> bool:
    """Whether a module is called within a call of itself in this thread."""
    frame, calls = sys._getframe(), 0
    while frame is not None:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1


def _device_types() -> list[str]:
    if not torch.accelerator.is_available():  # torch 2.6 raises where there is none
        return ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
