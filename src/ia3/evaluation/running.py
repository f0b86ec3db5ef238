"""The steps of an experiment on one base model: measure, train, measure again, save, cross-validate."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ia3.errors import InputError
from ia3.evaluation.balance import can_balance
from ia3.evaluation.checkpoints import interruptible
from ia3.evaluation.doubts import HeldOut
from ia3.evaluation.progress import Progress, Stage, training_stages
from ia3.evaluation.report.findings import Point
from ia3.evaluation.report.gathered import Gathered
from ia3.evaluation.results import majority, majority_metrics, median_metrics, tfidf_answers
from ia3.evaluation.saving import save_trained
from ia3.evaluation.start import Start
from ia3.files import replacing
from ia3.processes import dealt, from_first
from ia3.task.rows import as_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.calibration import Calibration
    from ia3.evaluation.experiment import Experiment, Trial
    from ia3.evaluation.learner import Learner
    from ia3.evaluation.prediction import Prediction
    from ia3.evaluation.wordings import Ranked
    from ia3.opinions.opinions import Opinions
    from ia3.scoring.readings import Readings
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe

# What asks a head about test rows is called.
_TITLES = {"head": "Head, test rows", "sentences": "Sentence encoder, test rows"}

# Shares that differ by less are not worth a line.
_TELLING = 0.03

Scores = dict[str, float]
Place = Literal["start", "question"]


class Running:
    """An experiment whose base model is in memory, with an adapter for each trial.

    Args:
        experiment: what to do.
        progress: told how it gets on.
    """

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        from ia3.adapter.pretrained import load_base
        from ia3.evaluation.forming import forms_opinions, where_vectors_pay
        from ia3.evaluation.label_sets import require_reading
        from ia3.scoring.families import family_of
        from ia3.scoring.readings import Readings

        self.experiment, self.progress = experiment, progress
        self.rankings: dict[str, list[Ranked]] = {}
        self._balanced: dict[str, list[Scores]] = {}
        self._by_vectors: dict[str, list[Prediction]] = {}
        self.gathered: dict[str, Gathered] = defaultdict(Gathered)
        with progress.waiting("Loading the model …"):
            labels, where = experiment.whole[0].task.labels, experiment.device_map
            base, self.tokenizer = load_base(experiment.model, labels, experiment.dtype, device_map=where)
        reads_answers = family_of(base, self.tokenizer).reads_answers
        tasks = [(trial.task, trial.examples) for trial in experiment.whole]
        self.recipe = experiment.chosen_recipe
        if not experiment.all_templates:  # for which vectors answer alone
            self.recipe = where_vectors_pay(self.recipe, tasks, reads_answers, experiment.folds, progress)
        self.forms_opinions = {
            one.name: one.task.multi_label  # whose thresholds are part of them
            or forms_opinions(self.recipe, one.task, reads_answers, experiment.all_templates)
            for one in experiment.members
        }
        moves = experiment.unlabelled is not None or experiment.prior != "file"
        require_reading([one.task for one in experiment.trials], reads_answers)
        if moves and not all(self.forms_opinions.values()):
            raise InputError(
                "Expected several opinions, whose probabilities can be moved to a prior, found vectors that answer alone",
                "use --opinions auto, or leave out",
                argument="prior",
            )
        # What is asked about texts before training, in it and after it, is asked of one reading of each.
        readings = Readings(experiment.memory)
        self.trials = self._worded(base, readings)
        self._adapt(base, readings)

    @property
    def own(self) -> list[Trial]:
        """The trials whose adapters are saved."""
        return [trial for trial in self.trials if trial.part is None]

    @property
    def points(self) -> list[Trial]:
        """The trials that are points of learning curves."""
        return [trial for trial in self.trials if trial.part is not None]

    def _adapt(self, base: PreTrainedModel, readings: Readings | None = None) -> None:
        """Put an adapter for each trial into the base model, and make their trainer."""
        from transformers import set_seed

        from ia3.task.task import Task
        from ia3.training.members import Member
        from ia3.training.trainer import TFewTrainer

        # Names in the model may hold neither the dots nor the slashes that names of folders may.
        one = len(self.trials) == 1
        names = ["default"] if one else [f"member{number}" for number in range(len(self.trials))]
        self.adapters = {trial.name: name for trial, name in zip(self.trials, names, strict=True)}
        places: dict[str, Place] = {
            self.adapters[trial.name]: self.recipe.place(base, trial.task) for trial in self.trials
        }
        self.model = with_adapters(base, places, self.recipe)
        self.readings = readings if self.model.waits_for_question() else None
        self.base_name = base.name_or_path
        seed = self.trials[0].seed
        arguments = self.recipe.training_arguments(
            self.experiment.checkpoints,
            seed=seed,
            save_strategy="steps",
            save_steps=max(1, min(10, self.recipe.steps // 4)),
            save_total_limit=2,
            disable_tqdm=True,
        )
        set_seed(seed)
        members = [
            Member(
                trial.task,
                trial.examples,
                self.adapters[trial.name],
                trial.seed,
                trial.learning_rate,
                title=trial.name,
                known=trial.task.taught(trial.examples) if isinstance(trial.task, Task) else None,
            )
            for trial in self.trials
        ]
        self.trainer = TFewTrainer(self.model, arguments, self.tokenizer, members, self.recipe, self.readings)
        logged = {trial.name: self.trainer.logged_as(self.adapters[trial.name]) for trial in self.trials}
        titles = {logged[trial.name]: trial.titled("Training") for trial in self.trials}
        self.trainer.add_callback(training_stages(self.progress, titles))
        self.trainer.silence()

    # The steps.

    def _worded(self, base: PreTrainedModel, readings: Readings) -> list[Trial]:
        """The trials, each in the wordings that its examples chose, where its task has candidates."""
        from ia3.evaluation.wordings import choose_wording
        from ia3.scoring.family import passes_in_step

        found: list[Trial] = []
        chosen: dict[tuple[int, int], tuple[Task, list[Ranked]]] = {}
        for trial in self.experiment.members:
            key = id(trial.task), id(trial.examples)  # learning rates share a draw
            if key not in chosen:
                title = trial.titled("Wordings")
                asked = base, self.tokenizer, trial.task, trial.examples, self.recipe, self.progress, title, readings
                chosen[key] = from_first(lambda asked=asked: choose_wording(*asked), passes_in_step(base))
                if chosen[key][1] and trial.part is None:
                    self.progress.wordings(title, chosen[key][1], len(chosen[key][0].templates))
            task, ranking = chosen[key]
            self.rankings[trial.name] = ranking[: len(task.templates)]
            found.append(replace(trial, task=task, test=self._unseen(trial)))
        return found

    def _unseen(self, trial: Trial) -> Sequence[Row]:
        """A trial's test rows, without those that the adapter has learned which it starts from, unless test rows were given."""
        given = any(one.task is trial.task and one.test is not None for one in self.experiment.sources)
        if self.recipe.init is None or given:
            return trial.test
        start = Start(self.recipe.init)
        test = [row for row in trial.test if not start.has_seen(row)]
        if len(test) < len(trial.test):
            count = len(trial.test) - len(test)
            self.progress.say(f"{count} test rows are left out: {self.recipe.init} was trained on them.")
        return test

    def zero_shot(self) -> dict[str, list[Scores]]:
        """For each trial what the untrained model has on its test rows, in each template that measures; see `trained`."""
        with self.model.disable_adapter():  # which may have been trained on other tasks
            return self._in_each_template(self._zero_shot, self.own)

    def train(self, checkpoint: str | None) -> tuple[dict[str, float], float]:
        """Train all adapters, from a checkpoint where there is one; returns the trainer's metrics, and the seconds.

        Raises:
            Interrupted: on a keyboard interrupt.
        """
        started = time.perf_counter()
        if self.recipe.opinions == "head":
            return {}, 0.0
        with interruptible(self.experiment.checkpoints, self.experiment.settings(), checkpoint):
            metrics = self.trainer.train(resume_from_checkpoint=checkpoint).metrics
        return metrics, time.perf_counter() - started

    def trained(self) -> dict[str, list[Scores]]:
        """For each trial what its vectors have on its test rows, in each template that measures; empty without test rows, or
        where no vectors were trained."""
        if self.recipe.opinions == "head":
            return {trial.name: [] for trial in self.trials}
        # Where rows have several labels, there are no thresholds yet.
        single = [trial for trial in self.trials if not trial.task.multi_label]
        return {trial.name: [] for trial in self.trials} | self._in_each_template(self._trained, single)

    def results(
        self, trial: Trial, zero_shot: Sequence[Scores], trained: Sequence[Scores], metrics: Scores, seconds: float
    ) -> dict[str, Any]:
        """All that is known of a trial, but for what is known when it has been saved."""
        adapter, several = self.adapters[trial.name], len(self.trials) > 1
        ranking = self.rankings[trial.name]
        return self.measured(trial, zero_shot, trained) | {
            **({"wordings": [one.to_dict() for one in ranking]} if ranking else {}),
            "train_seconds": round(seconds, 2),
            **({"train_loss": metrics[f"train_{self.trainer.logged_as(adapter)}"]} if metrics else {}),
            "recipe": self.recipe.name,
            "steps": self.trainer.steps_of(adapter) if metrics else 0,
            "seed": trial.seed,
            **({} if trial.learning_rate is None else {"learning_rate": trial.learning_rate}),
            **({"trained_at_once": len(self.trials)} if several else {}),
            "train_examples": len(trial.examples),
            "test_rows": len(trial.test),
            "trainable_parameters": sum(parameter.numel() for parameter in self.model.adapter_parameters(adapter)),
            "model": self.base_name,
            "task": trial.task.name,
        }

    def measured(self, trial: Trial, zero_shot: Sequence[Scores], trained: Sequence[Scores]) -> dict[str, Any]:
        """What was measured on a trial's test rows; nothing without them."""
        if not trial.test:
            return {}
        task, balanced = trial.task, self._balanced.get(trial.name)
        # The majority of the training rows says nothing when they are balanced; the test rows' own is the fair bar.
        labels = [task.truth(row) for row in trial.test]
        self._keep(trial, "majority", [majority(labels)] * len(labels))
        found: dict[str, Any] = {
            "zero_shot": median_metrics(zero_shot),
            **({} if balanced is None else {"zero_shot_balanced": median_metrics(balanced)}),
            **({"trained": median_metrics(trained)} if trained else {}),
            "majority": majority_metrics(task, labels),
        }
        if can_balance(task):  # the labels are the same for all rows
            words = tfidf_answers(task, trial.examples, trial.test)
            if words is not None:
                self._keep(trial, "tfidf", words)
                found["tfidf"] = task.metrics(labels, words)
        if self.experiment.all_templates:
            pairs = zip(task.templates, zero_shot, trained, strict=True)
            found["templates"] = [{"name": template.name, "zero_shot": a, "trained": b} for template, a, b in pairs]
        return found

    def _keep(self, trial: Trial, method: str, answers: Sequence[Any]) -> None:
        """Keep what a method says to a trial's test rows, for the report."""
        self.gathered[trial.name].answers[method] = answers

    def save(
        self,
        trial: Trial,
        results: dict[str, Any],
        calibration: Calibration | None = None,
        opinions: Opinions | None = None,
        reported: bool = False,
    ) -> dict[str, Any]:
        """Save a trial's adapter, with a report if nothing more will be known of it; returns its results with its size."""
        folder, adapter = Path(self.experiment.folder, trial.name), self.adapters[trial.name]
        what = folder, self.model, adapter, trial.task, self.recipe, results, trial.examples, calibration, opinions

        def saved() -> dict[str, Any]:
            if not reported:
                return save_trained(*what)
            page, elsewhere = self._page(trial, results, opinions), self.experiment.report
            found = save_trained(*what, page if elsewhere is None else None)
            if elsewhere is not None:
                with replacing(elsewhere) as path:
                    path.write_text(page, encoding="utf-8")
            return found

        return from_first(saved)

    def point(self, trial: Trial, trained: Sequence[Scores]) -> dict[str, Any]:
        """A point of a learning curve, as metrics.json has it: what a part of the examples gives."""
        assert trial.part is not None and trial.of is not None
        scores = self.opinions(trial)[0]["trained"] if self.forms_opinions[trial.name] else trained[0]
        answers = self.gathered[trial.name].answers["trained"]
        self.gathered[trial.of].points.append(Point(trial.part, len(trial.examples), scores, answers))
        return {"size": trial.part, "train_examples": len(trial.examples), "trained": scores}

    def _page(self, trial: Trial, results: dict[str, Any], opinions: Opinions | None) -> str:
        """The report on a trial."""
        from ia3.adapter.moved import moved
        from ia3.evaluation.report.page import page_of
        from ia3.scoring.family import passes_in_step

        # A row costs all adapters the same. Only the first process is here: it cannot ask a model of which others have parts.
        if not self.experiment.several and not passes_in_step(self.model):
            self._measure_costs(trial, opinions)
        changed = moved(self.model, self.adapters[trial.name])
        return page_of(self.gathered[trial.name].findings(trial, results, self.recipe, changed, len(self.trials)))

    def _measure_costs(self, trial: Trial, opinions: Opinions | None) -> None:
        """Measure what a row costs, for the report."""
        if trial.test:
            adapter = self.adapters[trial.name] if len(self.trials) > 1 else None
            given = trial, self.model, self.tokenizer, self.recipe, adapter, opinions
            self.gathered[trial.name].measure_costs(*given)

    def opinions(self, trial: Trial) -> tuple[dict[str, Any], Opinions, Calibration | None]:
        """Form a trial's opinions, and measure them: what is known of them beside `results`, and they themselves."""
        from ia3.evaluation.calibration import Calibration
        from ia3.evaluation.forming import form_opinions
        from ia3.evaluation.label_sets import form_label_sets
        from ia3.evaluation.prediction import Prediction
        from ia3.opinions.opinions import VECTORS, Opinions

        experiment, task = self.experiment, trial.task
        given = self.progress, trial.name, self._learner(trial), experiment.folds
        if task.multi_label:
            formed = form_label_sets(*given)
        else:
            pool = [] if experiment.unlabelled is None else as_rows(experiment.unlabelled, task)
            formed = form_opinions(*given, pool)
        found: dict[str, Any] = {"weights": formed.opinions.weights, "why": formed.why}
        results: dict[str, Any] = {"opinions": found}
        calibration = None
        if formed.held_out is not None:
            results["cross_validation"] = task.metrics(formed.labels, [one.best for one in formed.held_out])
            self.gathered[trial.name].held_out = HeldOut(formed.rows, formed.held_out, formed.labels)
            calibration = Calibration.as_it_is(formed.held_out, formed.labels)
        if task.multi_label:
            if trial.test:
                title = trial.titled("Trained")
                asked = {title: [(task, row) for row in trial.test]}
                adapters = [self.adapters[trial.name]] * len(trial.test)
                said, stages = self._predicted(asked, 0, adapters, formed.opinions)
                self._keep(trial, "trained", said[title])
                results["trained"] = _scores(trial, said[title], 0)
                _note(stages[title], task, [results["trained"]])
            return results, formed.opinions, calibration
        opinions = self._moved(trial, formed.opinions)
        if trial.test:
            nothing = [Prediction.of(dict.fromkeys(task.labels or (), 0.0))] * len(trial.test)
            each = [self._by_vectors.get(trial.name, nothing)]
            if trial.name in self._by_vectors:
                each += self._in_other_templates(trial, opinions)
            by_vectors = [[one.scores for one in some] for some in zip(*each, strict=True)]
            if trial.name in self._by_vectors:
                balanced = Opinions.of({VECTORS: 1.0}, balance=opinions.balance)
                alone = [Prediction.of(balanced.together(one), costs=task.costs) for one in by_vectors]
                self._keep(trial, VECTORS, alone)
                found[VECTORS] = _scores(trial, alone, 0)
            by_heads: dict[str, list[Prediction]] = {}
            for name, head in opinions.heads.items():
                title = trial.titled(_TITLES[name])
                its = Opinions.of({name: 1.0}, {name: head}, encoder=opinions.encoder)
                said, stages = self._predicted({title: [(task, row) for row in trial.test]}, 0, opinions=its)
                by_heads[name], found[name] = said[title], _scores(trial, said[title], 0)
                self._keep(trial, name, by_heads[name])
                _note(stages.get(title), task, [found[name]])
            together = []
            for index, one in enumerate(by_vectors):
                heads = {name: its[index].scores for name, its in by_heads.items()}
                together.append(Prediction.of(opinions.together(one, heads), costs=task.costs))
            self._keep(trial, "trained", together)
            results["trained"] = _scores(trial, together, 0)
        return results, opinions, calibration

    def _in_other_templates(self, trial: Trial, opinions: Opinions) -> list[list[Prediction]]:
        """What a trial's vectors say to its test rows in each template but the first that opinions ask in."""
        found = []
        for template in opinions.asking(len(trial.task.templates))[1:]:
            title = _in_words(trial.titled("Trained"), template)
            asked = {title: [(trial.task, row) for row in trial.test]}
            found.append(self._predicted(asked, template, [self.adapters[trial.name]] * len(trial.test))[0][title])
        return found

    def _moved(self, trial: Trial, opinions: Opinions) -> Opinions:
        """A trial's opinions for labels that are as frequent as where predictions will be made."""
        from ia3.evaluation.prediction import predict
        from ia3.opinions.priors import BALANCED, estimated_prior, weighted_shares

        experiment, task = self.experiment, trial.task
        names = list(task.labels or ())
        labels = [task.label(row) for row in trial.examples]
        seen = weighted_shares(labels, task.weights(labels), names)
        prior, where = experiment.prior, "as you say"
        if experiment.unlabelled is not None:
            rows = as_rows(experiment.unlabelled, task)
            stage = self.progress.stage(trial.titled("Rows without labels"), len(rows))
            items = predict(
                self.model,
                self.tokenizer,
                task,
                rows,
                lambda done: stage.advance(len(done)),
                [self.adapters[trial.name]] * len(rows),
                recipe=self.recipe,
                readings=self.readings,
                opinions=opinions,
            )
            said = np.log([[max(item.probabilities[name], 1e-12) for name in names] for item in items])
            prior, where = estimated_prior(said, seen, names), "as estimated on rows without labels"
        elif prior == "file":
            prior, where = seen, "as in the file" + ("" if task.class_weight is None else ", times class weights")
            if trial.shares is not None:
                # Labels without rows are not in the file because nobody had any: that is no reason to move them.
                known = {name: trial.shares[name] for name in dict.fromkeys(labels)}
                weights = task.weights(known)
                known = {name: share * weights.get(name, 1.0) for name, share in known.items()}
                rest = math.fsum(seen[name] for name in known) / math.fsum(known.values())
                prior = {name: known[name] * rest if name in known else seen[name] for name in names}
        elif prior == BALANCED:
            prior, where = dict.fromkeys(names, 1 / len(names)), "equally"
        assert not isinstance(prior, str)
        if max(abs(prior[name] - seen[name]) for name in names) > _TELLING:
            frequent = sorted(names, key=lambda name: -prior[name])[:4]
            listed = ", ".join(f"{name} {prior[name]:.0%}" for name in frequent) + (", …" if len(names) > 4 else "")
            self.progress.say(
                f"{trial.titled('Probabilities')} are for labels that are frequent {where} ({listed}); see --prior."
            )
        return opinions.toward({name: prior[name] for name in names}, seen)

    def cross_validate(self, trial: Trial) -> tuple[dict[str, Any], Calibration]:
        """What a trial's examples have by adapters that have not seen them, and how they calibrate its own; with costs, also what it
        has on test rows with that, for then the decisions are others."""
        experiment, task = self.experiment, trial.task
        title = trial.titled("Cross-validation")
        learner = replace(self._learner(trial), known=task.taught(trial.examples))
        scores, calibration, found = cross_validated(self.progress, title, learner, experiment.folds)
        results: dict[str, Any] = {"cross_validation": scores}
        at = calibration.temperature
        self.gathered[trial.name].held_out = HeldOut(
            range(len(found)), _calibrated(found, at), [task.label(row) for row in trial.examples]
        )
        if trial.test:
            said = _calibrated(self._by_vectors[trial.name], at)
            self._keep(trial, "trained", said)
            if task.costs and not experiment.all_templates:
                results["trained"] = _scores(trial, said, 0)
        return results, calibration

    def _learner(self, trial: Trial) -> Learner:
        from ia3.evaluation.learner import Learner

        recipe = self.recipe.changed(learning_rate=trial.learning_rate)
        return Learner(
            self.model,
            self.tokenizer,
            trial.task,
            trial.examples,
            recipe,
            trial.seed,
            self.experiment.checkpoints,
            self.readings,
        )

    # Measuring.

    def _in_each_template(self, measure: Any, trials: Sequence[Trial]) -> dict[str, list[Scores]]:
        found: dict[str, list[Scores]] = {trial.name: [] for trial in trials}
        count = max((len(trial.task.templates) for trial in trials), default=0) if self.experiment.all_templates else 1
        for template in range(count if trials else 0):
            some = [trial for trial in trials if template < len(trial.task.templates)]
            for trial, scores in zip(some, measure(some, template), strict=True):
                found[trial.name] += [] if scores is None else [scores]
        return found

    def _zero_shot(self, trials: Sequence[Trial], template: int) -> list[Scores | None]:
        """A row of several trials goes through the model once."""
        found, stages = self._untrained("Zero-shot", {one.name: one.test for one in trials}, template)
        found |= self._decided([one for one in trials if one.task.multi_label], found, template)
        scores = [_scores(one, found[one.name], template) for one in trials]
        if not template:
            for one in trials:
                self._keep(one, "zero_shot", found[one.name])
        self._note_each(stages, trials, scores)
        self._balance(trials, found, template)
        return scores

    def _decided(
        self, trials: Sequence[Trial], untrained: Mapping[str, list[Prediction]], template: int
    ) -> dict[str, list[Prediction]]:
        """What the untrained model says to test rows of multi-label tasks, by thresholds that suit the training rows."""
        from ia3.evaluation.balance import balancing_rows
        from ia3.evaluation.label_sets import by_answers
        from ia3.evaluation.prediction import Prediction

        some = [one for one in trials if one.test and one.examples]
        rows = {one.name: balancing_rows(one.examples) for one in some}
        said, _ = self._untrained("Thresholds", rows, template)
        found = {}
        for one in some:
            names = list(one.task.labels or ())
            scores = np.array([[item.scores[name] for name in names] for item in said[one.name]])
            opinions = by_answers(scores, names, [one.task.labels_of(row) for row in rows[one.name]])
            found[one.name] = [
                Prediction.of(opinions.together([item.scores]), thresholds=opinions.thresholds)
                for item in untrained[one.name]
            ]
        return found

    def _balance(self, trials: Sequence[Trial], untrained: Mapping[str, list[Prediction]], template: int) -> None:
        """Keep what the untrained model has on test rows when its answers are balanced on the training rows."""
        from ia3.evaluation.balance import Balance, balancing_rows

        some = [one for one in trials if one.test and one.examples and can_balance(one.task, template)]
        some = [one for one in some if not one.task.multi_label]
        rows = {one.name: balancing_rows(one.examples) for one in some}
        found, stages = self._untrained("Balancing", rows, template)
        scores = []
        for one in some:
            labels = [one.task.label(row, template=template) for row in rows[one.name]]
            balanced = Balance.fit(found[one.name], labels).balanced(untrained[one.name])
            scores.append(_scores(one, balanced, template))
            if not template:
                self._keep(one, "zero_shot_balanced", balanced)
            self._balanced.setdefault(one.name, []).extend(scores[-1:])
        self._note_each(stages, some, scores)

    def _untrained(
        self, title: str, rows: Mapping[str, Sequence[Row]], template: int
    ) -> tuple[dict[str, list[Prediction]], dict[str, Stage]]:
        """What the untrained model says to rows of trials, by name, and the stage of each; a task's row is asked once."""
        some = [trial for trial in self.trials if trial.name in rows]
        tasks = {id(trial.task): trial.task for trial in some}
        each = {key: {id(row): row for one in some if id(one.task) == key for row in rows[one.name]} for key in tasks}
        titles = {key: f"{title} {task.name}" if len(tasks) > 1 else title for key, task in tasks.items()}
        if len({*titles.values()}) < len(tasks):  # one task in the wordings of several trials
            titles = {id(trial.task): trial.titled(title) for trial in reversed(some)}
        titles = {key: _in_words(text, template) for key, text in titles.items()}
        asked = {titles[key]: [(task, row) for row in each[key].values()] for key, task in tasks.items()}
        found, stages = self._predicted(asked, template)
        known = {key: dict(zip(each[key], found[titles[key]], strict=True)) for key in tasks}
        return (
            {one.name: [known[id(one.task)][id(row)] for row in rows[one.name]] for one in some},
            {one.name: stages[titles[id(one.task)]] for one in some if titles[id(one.task)] in stages},
        )

    def _note_each(self, stages: Mapping[str, Stage], trials: Sequence[Trial], scores: Sequence[Scores | None]) -> None:
        """Say the headline number of each stage, which trials may share."""
        for stage in {id(stage): stage for stage in stages.values()}.values():
            its = [(one, score) for one, score in zip(trials, scores, strict=True) if stages.get(one.name) is stage]
            if its:
                _note(stage, its[0][0].task, [score for _, score in its])

    def _trained(self, trials: Sequence[Trial], template: int) -> list[Scores | None]:
        titles = [_in_words(trial.titled("Trained"), template) for trial in trials]
        asked = {title: [(one.task, row) for row in one.test] for title, one in zip(titles, trials, strict=True)}
        names = [self.adapters[trial.name] for trial in trials for _ in trial.test]
        found, stages = self._predicted(asked, template, names if len(self.trials) > 1 else None)
        if not template:
            self._by_vectors = {one.name: found[title] for title, one in zip(titles, trials, strict=True)}
            for one in trials:
                self._keep(one, "trained", self._by_vectors[one.name])
        scores = [_scores(one, found[title], template) for title, one in zip(titles, trials, strict=True)]
        for title, trial, score in zip(titles, trials, scores, strict=True):
            _note(stages.get(title), trial.task, [score])
        return scores

    def _predicted(
        self,
        asked: Mapping[str, Sequence[tuple[Task, Row]]],
        template: int,
        adapters: Sequence[str] | None = None,
        opinions: Opinions | None = None,
    ) -> tuple[dict[str, list[Prediction]], dict[str, Stage]]:
        """Each row's prediction, by the title of its stage, and the stages; rows of all titles share batches."""
        from ia3.evaluation.prediction import predict
        from ia3.scoring.family import passes_in_step

        titles = [title for title, pairs in asked.items() for _ in pairs]
        pairs = [pair for some in asked.values() for pair in some]
        found: dict[str, list[Prediction]] = {title: [] for title in asked}
        stages = {title: self.progress.stage(title, len(some)) for title, some in asked.items() if some}

        def advance(done: list[int]) -> None:
            for title, count in Counter(titles[index] for index in done).items():
                stages[title].advance(count)

        if pairs:

            def said(some: list[int]) -> list[Prediction]:
                return predict(
                    self.model,
                    self.tokenizer,
                    [pairs[index][0] for index in some],
                    [pairs[index][1] for index in some],
                    lambda done: advance([some[place] for place in done]),
                    None if adapters is None else [adapters[index] for index in some],
                    template=template,
                    recipe=self.recipe,
                    readings=self.readings,
                    opinions=opinions,
                )

            for title, item in zip(titles, dealt(len(pairs), said, passes_in_step(self.model)), strict=True):
                found[title].append(item)
            for title, stage in stages.items():
                stage.reach(len(asked[title]))
        return found, stages


def _in_words(title: str, template: int) -> str:
    return f"{title}, template {template + 1}" if template else title


def _scores(trial: Trial, predictions: Sequence[Prediction], template: int) -> Scores | None:
    """A trial's metrics; a template that says itself which answer is right may list its answers in an order of its own."""
    labels = [trial.task.truth(row, template=template) for row in trial.test]
    return trial.task.metrics(labels, [one.best for one in predictions]) if labels else None


def _calibrated(predictions: Sequence[Prediction], temperature: float) -> list[Prediction]:
    """Predictions whose scores are divided by the temperature, so that it is 1."""
    from ia3.evaluation.prediction import Prediction

    return [
        Prediction.of({label: score / temperature for label, score in one.scores.items()}, costs=one.costs)
        for one in predictions
    ]


def _note(stage: Stage | None, task: Task, scores: Sequence[Scores | None]) -> None:
    """Say the headline number, a mean where trials were measured on different rows."""
    values = [score[task.metric] for score in scores if score is not None]
    if values and stage is not None:
        stage.note(f"{task.metric.replace('_', '-')} {statistics.mean(values):.1%}")


def cross_validated(
    progress: Progress, title: str, learner: Learner, folds: int
) -> tuple[Scores, Calibration, list[Prediction]]:
    """The metrics of a learner's rows, each predicted by an adapter that has not seen it, what they calibrate, and the predictions
    with a temperature of 1.

    Args:
        progress: told of the steps.
        title: of its stage.
        learner: an adapter of it is trained for each fold.
        folds: their number.
    """
    from ia3.evaluation.calibration import Calibration

    stage = progress.stage(title, learner.recipe.steps)
    [found] = learner.held_out(folds, stage)
    labels = [learner.task.label(row) for row in learner.rows]
    calibration = Calibration.fit(found, labels)
    scores = learner.task.metrics(labels, [prediction.at(calibration.temperature).best for prediction in found])
    stage.end()
    _note(stage, learner.task, [scores])
    return scores, calibration, found


def with_adapters(base: PreTrainedModel, adapters: Mapping[str, Place], recipe: Recipe) -> IA3Model:
    """A base model with adapters to train, the first one active.

    Args:
        base: the model.
        adapters: name → from where it acts (`IA3Config.acts_from`).
        recipe: which modules they rescale (`target_modules`), and the adapter that all start from (`init`), which acts from
            where it does, and rescales what it does.
    """
    from ia3.adapter.config import IA3Config
    from ia3.adapter.model import IA3Model
    from ia3.adapter.pretrained import task_type

    init = recipe.init
    if init is None:
        config: dict[str, Any] = {"target_modules": recipe.target_modules}
        config |= {"task_type": task_type(base), "base_model_name_or_path": base.name_or_path}
        return IA3Model(base, {name: IA3Config(**config, acts_from=place) for name, place in adapters.items()})
    model = IA3Model(base, {})
    for adapter in adapters:
        Start(init).load(model, adapter)
        model.peft_config[adapter].base_model_name_or_path = base.name_or_path
    model.set_adapter(next(iter(adapters)))
    return model
