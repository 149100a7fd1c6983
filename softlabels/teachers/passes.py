"""Rule 3: logits know the pass that they came from.

A training pass leaves a mark on the graph nodes of its outputs (``grad_fn.metadata``), and the graph of what a loss is
given leads back to a mark: through casts, scaling, views, autocast, torch.compile and checkpoints. A mark lives as long
as its graph. It says which output of the pass it is; the way to it says which rows.
"""

from __future__ import annotations

import re
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from softlabels.kernels import LinearLogits
from softlabels.teachers.hooks import Scriptable, hang, hooks_of
from softlabels.teachers.structures import Logits, Output, outputs, rebuilt, rows_of

if TYPE_CHECKING:
    from softlabels.teachers.ema import EMATeacher
    from softlabels.teachers.steps import Steps

Node = Any  # torch.autograd.graph.Node, and what it saved
Way = Any  # from a mark to a loss's input, () or: (node, which of its outputs, from which of its inputs, the rest)

COMPILED = "CompiledFunctionBackward"
MOVING = set(
    "AsStrided Cat Flip Gather Index IndexSelect MaskedSelect Roll Rot90 Sort Stack Take Topk".split()  # noqa: SIM905
)
WRITING = {"IndexAdd", "IndexCopy", "IndexPut", "MaskedScatter", "Scatter", "ScatterAdd"}  # others into their first
RESHAPING = {"ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"}
VIEWS = {"Permute", "Repeat", "Select", "Slice", "Split", "SplitWithSizes", "T", "Transpose", "Unbind"}


class Pass:
    """One training pass: its inputs until the teacher was asked about them, then its answers, output by output.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        training: The modules in training mode, by id; None: not known.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: set[int] | None) -> None:
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

    def autocast_state(self) -> list[torch.autocast]:
        """What to enter to restore the autocast state of the pass."""
        return [
            torch.autocast(kind, dtype=dtype, enabled=enabled)
            for kind, enabled, dtype in self.autocast
            if enabled or torch.is_autocast_enabled(kind)
        ]


class Passes:
    """Marks the training passes of a model for one loss, and finds them again.

    Args:
        model: The model, not kept alive. Of a model that calls itself the outermost pass is found, being nearest.
        options: What attach was given: optimizer, teacher, where the logits are, and the function of inputs.
        followed: EMA teachers, which take in what happened before each pass.
        teacher: Who is asked about them.
    """

    def __init__(
        self,
        model: nn.Module,
        options: tuple[Any, Any, Output, Any],
        followed: list[tuple[EMATeacher, Steps]],
        teacher: Any,
    ) -> None:
        self.model, self.options = weakref.ref(model), options
        self.followed, self.teacher = followed, teacher
        self.answers = 0
        self._output = options[2]
        self.computes = callable(self._output)  # and then the loss is given anything that is made of one pass
        self._key = object()
        self._running: dict[int, list[Pass | None]] = {}  # by thread: calls of the model that have not returned
        self._unmarked: tuple[Any, ...] = (None,) * 4  # passes, with outputs, of compiled hooks, which see no graph
        self._hooks = (
            hang(self, "before", model.register_forward_pre_hook, prepend=True, with_kwargs=True),
            hang(self, "after", model.register_forward_hook, always_call=True),
        )
        if type(model).__reduce__ is object.__reduce__:  # a copy of a GraphModule knows nothing of the attribute
            model.__dict__.setdefault(Scriptable.NAME, Scriptable(model))

    def end(self) -> None:
        """Remove every hook and release everything."""
        model = self.model()
        for teacher, _ in self.followed:
            teacher.look()
        self.followed = []
        for remove in self._hooks:
            remove()
        if model is not None and not hooks_of(model):
            model.__dict__.pop(Scriptable.NAME, None)

    def begin(self) -> set[int] | None:
        """Bring EMA teachers up to date before a pass of the model. Its modules in training mode, by id."""
        for teacher, _ in self.followed:
            teacher.look(passing=True)
        return self.followed[0][0].modes if self.followed else None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        compiling = torch.compiler.is_compiling()
        if compiling or module is self.model():  # and no replica
            counts = module.training and torch.is_grad_enabled()
            seen = Pass(args, kwargs, None if compiling else self.begin()) if counts else None
            self._running.setdefault(0 if compiling else threading.get_ident(), []).append(seen)

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Forward hook."""
        compiling = torch.compiler.is_compiling()
        running = self._running.get(0 if compiling else threading.get_ident()) or self._running.get(0)
        if running and (compiling or module is self.model()):
            seen = running.pop()
            if seen is not None and compiling:
                self._unmarked = ((seen, result), *self._unmarked[:3])
            elif seen is not None:
                self._mark(seen, result)

    def _mark(self, seen: Pass, result: Any) -> None:
        output = None if callable(self._output) else self._output
        for position, logits in outputs(result, output).items():
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
        for thread in (0, threading.get_ident()):
            self._running.pop(thread, None)  # calls that were interrupted
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
        if len({(seen, self.computes or position) for seen, position, _, _ in found}) > 1:
            raise RuntimeError(
                "the loss was given logits made of several outputs or training passes of the attached model; call it "
                "for each and add up, or let attach(..., output=...) combine the outputs of one pass"
            )
        return found[0] if found else None


def laid_out(answer: Logits, input: Logits, way: Way, shape: torch.Size) -> Logits | None:
    """The teacher's logits, laid out as the model's were; None if it is not clear how.

    Args:
        answer: What the teacher returned.
        input: What the loss was given.
        way: How the model's logits, or the input of its last layer, came to the loss.
        shape: Of these when they left the model.
    """
    if not isinstance(input, LinearLogits):
        if isinstance(answer, LinearLogits):
            return None
        return same_rows(answer, way) if answer.shape == shape else answer
    if not way:
        return answer
    if answer.shape[:-1] != shape[:-1]:
        return None
    places = torch.arange(shape[:-1].numel(), dtype=torch.int32, device=answer.device).view(*shape[:-1], 1)
    moved = same_rows(places.expand(shape), way)  # whatever the width of the teacher's layer
    if moved is None:
        return None
    index = moved[..., 0]
    if isinstance(answer, LinearLogits):
        return replace(answer, hidden=answer.hidden.flatten(0, -2)[index])
    return answer.flatten(0, -2)[index]


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
        if name in VIEWS:  # which is repeated with what its node knows of its arguments
            function = getattr(torch.ops.aten, re.sub(r"(?<=.)(?=[A-Z])", "_", name).lower())
            saved = [key for key in dir(node) if key.startswith("_saved_") and "_self_" not in key]
            views = function(logits, **{key.removeprefix("_saved_"): _signed(getattr(node, key)) for key in saved})
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


def _device_types() -> tuple[str, ...]:
    if not torch.accelerator.is_available():  # torch 2.6 raises where there is none
        return ("cpu",)
    return "cpu", torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
