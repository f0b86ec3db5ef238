"""An adapter's folder with its task, recipe and calibration: `AdapterFolder`."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import (
    CALIBRATION_NAME,
    CARD_MARK,
    CARD_NAME,
    OPINIONS_NAME,
    OWN_NAMES,
    RECIPE_NAME,
    SEEN,
    TASK_NAME,
    UNFINISHED,
    StoredAdapter,
)
from ia3.errors import InputError, shown
from ia3.files import alone, current, locate, replacing, upload

if TYPE_CHECKING:
    from ia3.evaluation.calibration import Calibration
    from ia3.opinions.opinions import Opinions
    from ia3.task.kinds import AnyTask
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe


class AdapterFolder(StoredAdapter):
    """An adapter's folder, on disk or on the hub, with its task, recipe and calibration.

        folder = AdapterFolder("adapters/tickets")
        folder.config, folder.task, folder.recipe, folder.calibration, folder.metrics
        tensors, header = folder.vectors()

    It reads and writes files as `StoredAdapter` does.
    """

    @functools.cached_property
    def any_task(self) -> AnyTask | None:
        """The task of the training, of any kind; None if the folder has none. Raises `InputError` for a damaged file."""
        from ia3.task.kinds import task_from

        data = self.text(TASK_NAME)
        return None if data is None else task_from(self._named(TASK_NAME), data)

    @functools.cached_property
    def task(self) -> Task | None:
        """The task of the training, if it has choices; None if the folder has none or its answer is text."""
        from ia3.task.task import Task

        return self.any_task if isinstance(self.any_task, Task) else None

    def required_task(self) -> Task:
        """The task with choices. Raises `InputError` also if there is none."""
        if self.task is not None:
            return self.task
        if self.any_task is not None:
            raise InputError(
                f"Expected a task with choices in {str(self)!r}, found {self.any_task.name!r}, whose answer is text; ia3 predict, "
                f"evaluate and compare take it, alone."
            )
        inner = [
            str(path.parent) for depth in ("*", "*/*") for path in sorted(self._folder.glob(f"{depth}/{TASK_NAME}"))
        ]
        if inner:
            raise InputError(f"Expected an adapter's folder, found {str(self)!r}, which holds several: {shown(inner)}.")
        if self._on_hub:
            locate(self.path, TASK_NAME, **self._place)  # raises the hub's error
        raise InputError(
            f"Expected a {TASK_NAME} beside the adapter in {str(self)!r}, found none: it was not trained on a task; write "
            f"one, or use the adapter from Python."
        )

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe of the training; the paper's if the folder has none."""
        from ia3.training.recipe import Recipe

        data = self.text(RECIPE_NAME)
        return Recipe() if data is None else Recipe.from_file(self._named(RECIPE_NAME), data)

    @functools.cached_property
    def opinions(self) -> Opinions:
        """What answers, and how much each part counts; the vectors alone if the folder does not say."""
        from ia3.opinions.head import Head
        from ia3.opinions.opinions import HEADS, Opinions

        data = self.text(OPINIONS_NAME)
        if data is None:
            if self.task is not None and self.task.multi_label:
                raise InputError(
                    f"Expected {OPINIONS_NAME} with the labels' thresholds in {str(self)!r}, found none; train to the end, or anew."
                )
            if UNFINISHED in self.metrics:
                warnings.warn(
                    f"The training of {str(self)!r} was interrupted before its opinions were formed, so its vectors answer alone. "
                    f"The same ia3 train with --resume finishes it.",
                    stacklevel=2,
                )
            return Opinions()

        def head(name: str) -> Head | None:
            tensors = self.text(HEADS[name])
            return None if tensors is None else Head.from_bytes(tensors, self._named(HEADS[name]))

        opinions = Opinions.from_json(data, self._named(OPINIONS_NAME), head)
        known = None if self.task is None else self.task.labels
        named = {
            *itertools.chain(*opinions.balance),
            *opinions.seen,
            *opinions.thresholds,
            *(label for head in opinions.heads.values() for label in head.labels),
        }
        if known is not None and not named <= {*known}:
            raise InputError(
                f"Expected opinions on the task's labels {shown(known)} in {str(self)!r}, found {shown(sorted(named))}; train anew."
            )
        if self.task is not None:
            opinions.asking(len(self.task.templates))
            decided = sorted(known or ()) if self.task.multi_label else []
            if sorted(opinions.thresholds) != decided:
                raise InputError(
                    f"Expected thresholds of the labels {shown(decided)} in {str(self)!r}, found those of "
                    f"{shown(sorted(opinions.thresholds))}; train anew."
                )
        return opinions

    @functools.cached_property
    def calibration(self) -> Calibration | None:
        """The calibration of its probabilities; None if it is not calibrated."""
        from ia3.evaluation.calibration import Calibration

        data = self.text(CALIBRATION_NAME)
        return None if data is None else Calibration.from_json(data, self._named(CALIBRATION_NAME))

    @property
    def temperature(self) -> float:
        """The calibration's temperature, or 1."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    def seen(self) -> Callable[[Row], bool] | None:
        """A function: whether the adapter was trained on a row; None if the folder has no fingerprints."""
        if SEEN not in self.metrics:
            return None
        task, keys = self.any_task or self.required_task(), set(self.metrics[SEEN])
        return lambda row: row.keys() >= set(task.columns) and task.fingerprint(row) in keys

    def card(self, where: str, license: str | None = None, language: str | None = None) -> bytes | None:
        """The model card for a place, made anew from what the folder holds; a user's own card, or one of an adapter without a task,
        as it is; None if the folder has no card.

        Args:
            where: the folder or hub id that its examples name.
            license: the hub's name of a licence; None: none.
            language: the language of the texts; None: not said.

        Raises:
            InputError: a license or language for a card that is not made anew.
        """
        from ia3.evaluation.card import trained_card

        kept, task = self.text(CARD_NAME), self.any_task
        if task is None or (kept is not None and CARD_MARK.encode() not in kept):
            if license is not None or language is not None:
                whose = "an adapter without a task" if task is None else "a card of your own"
                raise InputError(
                    f"Expected a card of ia3's to write license and language into, found {whose} in {str(self)!r}; write them into "
                    f"the head of its {CARD_NAME}."
                )
            return kept
        calibration = {} if self.calibration is None else {"calibration": self.calibration.model_dump()}
        known = self.metrics | calibration
        return trained_card(task, self.recipe, known, self.config, where, license, language).encode()

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        language: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload the adapter to a hub repository, which is created if it does not exist: all files of this table in
        docs/adapters.md, in place of those of an earlier adapter. A user's other files stay.

        Args:
            repo_id: owner/name.
            private: whether a new repository is private.
            token: the hub's token; None: that of the login.
            license: the hub's name of a licence for the card, such as "apache-2.0"; None: the card names none.
            language: the code of the texts' language for the card, such as "en"; None: the card names none.
            **kwargs: `commit_message`, `revision`, `create_pr`, … as of `huggingface_hub.upload_folder`. A branch that does not
                exist is created.

        Returns:
            The URL of the commit or of the pull request.

        Raises:
            InputError: the folder has no adapter; see also `card` and `upload`.
        """
        card = self.card(repo_id, license, language)

        def save(folder: str) -> None:
            self.copy_to(folder)
            if card is not None:
                Path(folder, CARD_NAME).write_bytes(card)

        kwargs = {"commit_message": "Upload (IA)³ adapter", "delete_patterns": [*OWN_NAMES], **kwargs}
        return upload(save, repo_id, private, token, **kwargs)

    def calibrate(self, calibration: Calibration) -> None:
        """Store a new calibration in the folder.

        Raises:
            InputError: the folder is not on disk, or holds another adapter by now.
        """
        if self._on_hub:
            raise InputError(f"Expected a folder here to store the calibration in, found {str(self)!r}.")
        with alone(self._folder):
            self.require_unchanged()
            with replacing(current(self._folder) / CALIBRATION_NAME) as temporary:
                temporary.write_text(calibration.to_json(), encoding="utf-8")
