"""A whole training: steps until the last, with logs, sample sheets, saved states, and what ends it early."""

import collections
import contextlib
import dataclasses
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

from nystromgan.zoo import media, storage
from nystromgan.zoo.progress import Progress
from nystromgan.zoo.training import run_folder
from nystromgan.zoo.training.loop import Loop, TrainingError
from nystromgan.zoo.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training ended: steps done in all, and whether it was asked to stop before the last."""

    steps: int
    stopped: bool


def run(loop: Loop, path: pathlib.Path, recipe: str, *, resume: bool = False, quiet: bool = False) -> Outcome:
    """Trains to the end in a run's folder; SIGINT and SIGTERM save a state and stop.

    Args:
        path: the run's folder; with several processes the first one writes there and all read.
        recipe: the resolved recipe, written to the folder and to the model's card.
        resume: go on from the folder's last state; without it the folder must hold no run.

    Raises:
        TrainingError: a loss or a weight is not finite; says from which state one can go on.
        OSError: the disk is full, another process trains here, or a state is unreadable.
        ValueError: the last state is damaged, or of another objective.
    """
    if not resume and run_folder.holds_a_run(path):
        raise ValueError(f"{path} holds a run: give that folder in the recipe's place to go on, or another output")
    folder = RunFolder(path) if loop.processes.main else None
    loop.processes.wait()
    try:
        found = run_folder.newest_state(path) if resume else None
        if found:
            loop.restore(*found)
        if found and loop.done:  # nothing trains, so what trained it stays
            recipe = (path / "recipe.toml").read_text(encoding="utf-8")
        card = _card(loop, recipe)
        if folder:
            storage.write(path / "recipe.toml", recipe.encode())
            folder.open_logs(loop.position.total)
            if found:  # a save that was killed after its state left an older model
                folder.save_model(loop.shipped(), card)
        with _stop_signals() as asked:
            return _train(loop, folder, card, asked, quiet or not folder)
    except TrainingError as error:
        raise TrainingError(f"{error}; {_advice(path)}") from error
    finally:
        if folder:
            folder.close()


def _train(loop: Loop, folder: RunFolder | None, card: str, asked: list[int], quiet: bool) -> Outcome:
    options = loop.options
    progress = Progress(loop.steps, loop.position.total, quiet)
    recent: dict[str, list[float]] = collections.defaultdict(list)
    stopped = False
    while not loop.done and not stopped:
        for name, value in loop.step().items():
            recent[name].append(value)
        done, stopped = loop.position.total, loop.processes.any(bool(asked))
        last = loop.done or stopped
        saves = last or done % options.save_every == 0
        if folder and (saves or done % options.log_every == 0):  # a resumed run has no steps from before its save
            means = {name: sum(values) / len(values) for name, values in recent.items()}
            folder.log(done, means)
            recent.clear()
            progress.update(done, "  ".join(f"{k} {v:.3g}" for k, v in means.items() if k.endswith("/loss")))
        if folder and (last or done % options.sample_every == 0):
            image = media.sheet(loop.preview())
            folder.sheet(done, image, media.png(image))
        if saves:
            _save(loop, folder, card)
    return Outcome(loop.position.total, stopped)


def _save(loop: Loop, folder: RunFolder | None, card: str) -> None:
    if folder:
        try:
            folder.save(loop.state(), loop.position, loop.shipped(), loop.options.keep, card)
        except ValueError as error:
            raise TrainingError(str(error)) from error
    loop.processes.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of each SIGINT and SIGTERM; a second one ends the process as usual."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in map(int, (signal.SIGINT, signal.SIGTERM)):
        before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _advice(path: pathlib.Path) -> str:
    states = run_folder.states(path)
    return f"the last good state is {states[-1]}" if states else "no state was saved yet"


def _card(loop: Loop, recipe: str) -> str:
    name = type(loop.objective.model).__name__
    return (
        f"# {name}\n\nA model that this recipe is training or has trained; the last of the run's states says after how "
        f"many steps.\n\n```toml\n{recipe.strip()}\n```\n"
    )
