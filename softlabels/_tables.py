"""What a loss remembers of samples and classes: buffers that keep their dtype, and that a checkpoint may size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Tables(nn.Module):
    """Buffers that follow moves between devices only, and are empty until their size is known."""

    def is_in(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a checkpoint has all of them; empty ones are put where they are missing."""
        empty = self.emptied().state_dict(prefix=prefix)
        found = set(empty) <= set(state_dict)
        for name, table in empty.items():
            state_dict.setdefault(name, table)
        return found

    def emptied(self) -> Tables:
        """The same, as it was made."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves but keep the dtypes."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the sizes of the checkpoint's tables: they may have been made already, or not yet."""
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.dim() == buffer.dim() and 0 in (*saved.shape, *buffer.shape):
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
