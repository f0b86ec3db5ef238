"""An experiment whose trials Ray's workers share: `run`."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from typing import Any

import ia3
from ia3.adapter.pretrained import quiet
from ia3.cluster.connection import Workers
from ia3.cluster.progress import Board, Together, Told
from ia3.errors import InputError, reason, shown
from ia3.evaluation.checkpoints import Interrupted, require_same
from ia3.evaluation.experiment import Experiment, Outcome
from ia3.evaluation.progress import Progress
from ia3.files import read_json, write_json
from ia3.trainer import last_checkpoint

# Beside the parts' folders of checkpoints: which trials are in each part, with the settings; and a finished part's results.
_PARTS_NAME, _PARTS = "parts.json", "parts"
_RESULTS_NAME = "results.json"

# Seconds between looks at what the workers do.
_LOOK = 0.2

# A part whose workers died so often without a new checkpoint is not tried again: it is what kills them.
_DEATHS = 3


def run(experiment: Experiment, workers: Workers, progress: Progress | None = None, resume: bool = False) -> Outcome:
    """Run an experiment on Ray: each worker has one model, and trains some of the adapters at once.

        with connected("auto") as workers:
            outcome = run(Experiment(tasks, rows, folder="/shared/adapters"), workers)

    Adapters, results and folders are those of `Experiment.run`. The base model and the experiment's folder must be at the same place on
    every machine. If a worker dies, another one goes on from the part's last checkpoint.

    Args:
        experiment: what to do.
        workers: of `connected`.
        progress: shows the progress of all workers.
        resume: continue from the last checkpoints of an interrupted run on Ray, with any number of workers.

    Raises:
        InputError: as of `Experiment.run`; or a worker has another version of this package, or another folder; or workers died again
            and again.
        Interrupted: on a keyboard interrupt.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    experiment.check()
    folder = experiment.checkpoints
    if resume:
        parts = parts_to_resume(experiment)
    else:
        parts = _dealt([trial.name for trial in experiment.trials], workers.count)
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / _PARTS_NAME, experiment.settings() | {_PARTS: parts})
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for number in range(len(parts)):
        done = folder / _part_name(number) / _RESULTS_NAME
        if done.is_file():
            results.update(read_json(done))
        else:
            waiting.append(number)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    together = Together(progress or Progress())
    work = ray.remote(max_retries=0, **workers.resources)(_work)
    shared = ray.put(experiment)
    deaths: dict[int, list[str | None]] = {number: [] for number in waiting}
    running: dict[Any, int] = {}

    def begin(number: int) -> None:
        running[work.remote(shared, parts[number], number, board, ia3.__version__, os.getcwd())] = number

    try:
        for number in waiting:
            begin(number)
        while running:
            ended, _ = ray.wait([*running], timeout=_LOOK)
            together.tell(ray.get(board.take.remote()))
            for reference in ended:
                number = running.pop(reference)
                try:
                    results.update(ray.get(reference))
                except RayTaskError as error:
                    raise _told(error) from None
                except RayError as error:  # its process, its machine, or the memory there
                    deaths[number].append(last_checkpoint(folder / _part_name(number)))
                    _require_progress(deaths[number], parts[number], error)
                    place = "from its last checkpoint" if deaths[number][-1] else "from the start"
                    together.tell([(number, "say", (f"A worker died; another one goes on {place}.",))])
                    begin(number)
        together.tell(ray.get(board.take.remote()))
    except KeyboardInterrupt:
        found = [last_checkpoint(path) or str(path) for path in sorted(folder.glob("part-*"))]
        raise Interrupted(found[0] if found else None) from None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.kill(board)
    return experiment.finish(results)


def _work(
    experiment: Experiment, names: Sequence[str], number: int, board: Any, version: str, place: str
) -> dict[str, dict[str, Any]]:
    """What a worker does: a part of the experiment, from its last checkpoint on. Returns the results of its trials."""
    import ray

    quiet()
    if version != ia3.__version__:
        raise InputError(
            f"Expected ia3 {version} on every machine of the cluster, found {ia3.__version__}; install the same."
        )
    if os.path.isdir(place):  # for relative paths
        os.chdir(place)
    folder = experiment.checkpoints
    if not (folder / _PARTS_NAME).is_file():
        raise InputError(
            f"Expected the folder {str(experiment.folder)!r} on every machine of the cluster, found none on one",
            "give a folder that all of them share by",
            argument="output",
        )
    part = experiment.part(names, folder / _part_name(number))
    checkpoint = last_checkpoint(part.checkpoints) if part.checkpoints.is_dir() else None
    progress = Told(board, number)
    results = part.measured(progress, None if checkpoint is None else part.checkpoint())
    write_json(part.checkpoints / _RESULTS_NAME, results)
    ray.get(progress.tell("say", f"{len(names)} adapters are done."))  # and all that was told before
    return results


def _part_name(number: int) -> str:
    return f"part-{number}"


def _dealt(names: Sequence[str], count: int) -> list[list[str]]:
    """Names in parts of nearly the same size. Neighbours, which share a task, stay together."""
    count = min(count, len(names))
    ends = [len(names) * number // count for number in range(count + 1)]
    return [list(names[start:end]) for start, end in itertools.pairwise(ends)]


def parts_to_resume(experiment: Experiment) -> list[list[str]]:
    """The names of the trials in each part of an interrupted run. Raises `InputError` if it was another run, or not on Ray."""
    path = experiment.checkpoints / _PARTS_NAME
    if not path.is_file():
        raise InputError(
            f"Expected checkpoints of a run on Ray in {str(experiment.checkpoints)!r}, found none",
            "start anew without",
            argument="resume",
        )
    require_same(path, experiment.settings(), "members")
    return read_json(path)[_PARTS]


def _require_progress(checkpoints: Sequence[str | None], names: Sequence[str], error: Exception) -> None:
    """Raise `InputError` if a part's workers died again and again at one checkpoint, given the last one at each death."""
    last = checkpoints[-_DEATHS:]
    if len(last) == _DEATHS and len({*last}) == 1:
        raise InputError(
            f"Expected workers that live, found that {_DEATHS} died one after the other while they trained {shown(names)}: "
            f"{reason(error)}",
            "if memory is short, have fewer by",
            argument="workers",
        )


def _told(error: Any) -> Exception:
    """What a worker's error means here."""
    cause = error.cause
    if isinstance(cause, ModuleNotFoundError):
        return InputError(
            f"Expected ia3 {ia3.__version__} on every machine of the cluster, found none on one: {reason(cause)}."
        )
    return cause if isinstance(cause, (InputError, OSError)) else error
