"""What `fit` does for the person who looks on: a bar, or a line an epoch, and a Ctrl-C that waits its turn."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any, Self

from .history import History
from .runstate import RunState

__all__ = ["CtrlC", "epoch_line", "progress_bar"]


class CtrlC:
    """While it is entered, the first Ctrl-C only sets `pressed`; leaving then raises KeyboardInterrupt.

    A second one raises it at once. Only Python's own handler is replaced, and put back: another one, or none, stays.
    """

    pressed = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
        self._replaced = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._replaced:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.pressed and error is None:
            raise KeyboardInterrupt

    def _press(self, *_: object) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def progress_bar(state: RunState, *, epochs: int, examples: int, progress: bool) -> Any:
    """A context manager: a tqdm bar over all epochs' examples, or None where nobody would see it."""
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm  # a notebook's own bar in notebooks

            class Bar(tqdm):
                @property
                def format_dict(self) -> dict[str, Any]:  # asked for only when the bar is drawn, not in every step
                    loss = f"loss {state.total / state.seen:.4f}" if state.seen else ""
                    accuracy = f", accuracy {state.right / state.decisions:.4f}" if state.decisions else ""
                    prefix = f"epoch {max(state.epoch, 1)}/{epochs}: "
                    return {**super().format_dict, "prefix": prefix, "postfix": loss + accuracy}

            done = max(state.epoch - 1, 0) * examples + state.seen
            bar = Bar(total=epochs * examples, initial=done, unit=" examples", unit_scale=True, disable=None)
            if not bar.disable:
                return bar
    return contextlib.nullcontext()


def epoch_line(history: History, epochs: int) -> str:
    """The last epoch in a line."""
    numbers = (
        ("loss", "loss", ".4g"), ("accuracy", "accuracy", ".4f"), ("val_loss", "validation loss", ".4g"),
        ("val_accuracy", "validation accuracy", ".4f"), ("seconds", "seconds", ".1f"),
    )  # fmt: skip
    shown = (
        f"{label} {getattr(history, name)[-1]:{digits}}" for name, label, digits in numbers if getattr(history, name)
    )
    return f"epoch {len(history.loss)}/{epochs}: {', '.join(shown)}"
