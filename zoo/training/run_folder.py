"""What a run leaves on disk, and what another run finds there.

recipe.toml (resolved), log.jsonl, events.* (TensorBoard), samples/step-*.png, states/step-*.safetensors (to go on
from), model/ (a checkpoint to load and sample from).
"""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import time
from collections.abc import Mapping
from typing import IO

import numpy
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from torch import Tensor, nn

from nystromgan.zoo import checkpoints, storage
from nystromgan.zoo.training.loop import Position

KIND = "state of a training run"


class RunFolder:
    """A run's folder, locked against a second run in it for as long as this process lives."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        storage.sweep(self.path)
        self._log: IO[bytes] | None = None
        self._events: EventsWriter | None = None

    def _locked(self) -> IO[str]:
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OSError(f"another process is training in {self.path}") from None
        return lock

    def save(self, tensors: Mapping[str, Tensor], position: Position, model: nn.Module, keep: int, card: str) -> None:
        """Writes a state, and the model with its recipe; only then deletes all but the last `keep` states."""
        place = {key: str(value) for key, value in dataclasses.asdict(position).items()}
        path = self.path / "states" / f"step-{position.total:09}.safetensors"
        storage.save_tensors(path, tensors, {"kind": KIND, **place})
        self.save_model(model, card)
        for old in states(self.path)[:-keep]:
            old.unlink()

    def save_model(self, model: nn.Module, card: str) -> None:
        """Writes the model with its recipe."""
        checkpoints.save_checkpoint(model, self.path / "model", card)
        storage.write(self.path / "model" / "recipe.toml", (self.path / "recipe.toml").read_bytes())

    def open_logs(self, after: int) -> None:
        """Starts log.jsonl and the events, without what an interrupted run logged beyond step `after`."""
        path = self.path / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= after]
            storage.write(path, "".join(f"{line}\n" for line in kept).encode())
        self._log = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        count = len(list(self.path.glob("events.*")))  # in the name: one of the same second would be written over
        self._events = EventsWriter(str(self.path / "events"), filename_suffix=f".{count:04}")
        self._event(Event(step=after, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Raises OSError, with the file's name, where the disk is full."""
        assert self._log is not None
        line = json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n"
        try:
            self._log.write(line.encode())
            scalars = [value for item in values.items() for value in summary.scalar(*item).value]
            self._event(Event(step=step, summary=Summary(value=scalars)))  # one sync for all
        except OSError as error:
            raise OSError(f"the logs in {self.path} could not be written: {error.strerror}") from error

    def sheet(self, step: int, image: numpy.ndarray, png: bytes) -> None:
        """A sample sheet: (H, W, C) uint8, and the same as PNG."""
        storage.write(self.path / "samples" / f"step-{step:09}.png", png)
        self._event(Event(step=step, summary=summary.image("samples", image, dataformats="HWC")))

    def _event(self, event: Event) -> None:
        """Written here and now: a writing thread would hide a full disk, and then hang."""
        assert self._events is not None
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Ends the logs and gives the folder free."""
        if self._log is not None:
            self._log.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # what a full disk refused before, it refuses again
                self._events.close()
        self._lock.close()


def _step(line: str) -> float:
    """The step of a log's line; infinite for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def holds_a_run(path: pathlib.Path) -> bool:
    return (path / "recipe.toml").is_file()


def states(path: pathlib.Path) -> list[pathlib.Path]:
    """The saved states of a run's folder, oldest first."""
    return sorted((path / "states").glob("step-*.safetensors"))


def newest_state(path: pathlib.Path) -> tuple[dict[str, Tensor], Position, str] | None:
    """The last saved state, with the file it came from; None where there is none.

    Raises:
        ValueError, OSError: it is damaged or unreadable; the message names the last state before it.
    """
    saved = states(path)
    if not saved:
        return None
    try:
        tensors, metadata = storage.load_tensors(saved[-1])
        if metadata.get("kind") != KIND:
            raise ValueError(f"{saved[-1]} is not the {KIND}")
    except (ValueError, OSError) as error:
        advice = f"delete it to go on from {saved[-2].name}" if len(saved) > 1 else "there is no earlier state"
        raise type(error)(f"{error}; {advice}") from error
    place = {field.name: int(metadata[field.name]) for field in dataclasses.fields(Position)}
    return tensors, Position(**place), str(saved[-1])
