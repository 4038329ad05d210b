"""A line that says how far something long is: rewritten in place on a terminal, now and then elsewhere."""

import sys
import time

QUIET_SECONDS = 30.0  # between lines where stderr is no terminal


class Progress:
    """Counts from `start` to `total` on stderr; `silent` prints nothing."""

    def __init__(self, total: int, start: int = 0, silent: bool = False) -> None:
        self.total, self.first, self.silent = total, start, silent
        self.began = self.told = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def update(self, done: int, message: str = "") -> None:
        now = time.monotonic()
        if self.silent or (now - self.told < (0.1 if self.terminal else QUIET_SECONDS) and done < self.total):
            return
        self.told = now
        rate = (done - self.first) / max(now - self.began, 1e-9)
        left = _duration((self.total - done) / rate) if rate > 0 else "?"
        filled = 24 * done // max(self.total, 1)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{self.total} {rate:.3g}/s, {left} left  {message}"
        if self.terminal:
            print(f"\r\x1b[K{line[:140]}", end="" if done < self.total else "\n", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """1 h 02 min, 3 min 05 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
