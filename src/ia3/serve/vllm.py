"""A vLLM engine behind the HTTP service: `VllmEngine`, which `ia3 serve --engine vllm` starts."""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ia3.adapter.config import IA3Config
from ia3.errors import InputError, reason
from ia3.files import reading
from ia3.serve.engine import AdapterFailed, GenerateJob, Piece, ScoreJob, normalized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.scoring.question import Question
    from ia3.scoring.scorer import Scorer
    from ia3.task.wording import Wording
    from ia3.training.recipe import Recipe

_Result = TypeVar("_Result")

# Absolute paths, which clients must not see.
_FOLDERS = re.compile(r"(?<!\S)/\S*/")

# Seconds between checks whether vLLM's processes still run.
_WATCH_SECONDS = 1.0

# The maximum of tokens per request for log-probabilities.
_TOKENS_ASKED = 128

# The text that vLLM's processes add around an error.
_WRAPPED = re.compile(
    r"^Call to add_lora method failed: (?:Worker failed with error '(?=.*', please check))?(.*?)(?:', please check.*)?$"
)


class VllmEngine:
    """See `Engine`. vLLM batches, caches prefixes, and loads and evicts adapters; the plugin adds (IA)³ to it.

    A question becomes one request for each inner node of the tree of its choices. The request has the tokens up to the
    node, generates one token, and returns the log-probabilities of the tokens that follow in the tree. The requests
    share the prompt through prefix caching. If each choice is one token, one request is enough. (Log-probabilities of
    a prompt would read the prompt again for each choice.) `observe` gets vLLM's steps: how many prompts and texts got
    a token, and the number of different adapters of the running requests.

    Args:
        model: the name of the base model, a decoder-only model.
        name: the served name; None: `model`.
        slots: the maximum of different adapters in a step.
        adapters: the maximum of adapters. Adapters stay in memory after their first use, because vLLM would end if it
            had to read one again and could not.
        **settings: other fields of vLLM's `AsyncEngineArgs`, such as `dtype`, `max_model_len`, `tensor_parallel_size`.
    """

    def __init__(
        self, model: str, name: str | None = None, slots: int = 16, adapters: int = 20_000, **settings: Any
    ) -> None:
        self.name, self._source = name or model, model
        self.source, self.dtype = None, "auto"  # vLLM takes what memory there is, and has no states for heads
        self.tokenizer: PreTrainedTokenizerBase
        self.context_length: int | None = None
        self.generates = True
        self.observe: Callable[[str, int, int], None] = lambda kind, rows, adapters: None
        self.on_end: Callable[[BaseException], None] = lambda error: None
        self._most = 2 * adapters + slots  # a replaced adapter exists twice while requests use it
        self._settings = {"max_loras": slots, "max_cpu_loras": self._most, **settings}
        self._engine: Any = None
        self._scorer: Scorer
        self._adapters: dict[str, Any] = {}  # key → vLLM's request for it
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._under_way: Counter[str | None] = Counter()  # vLLM's requests by their adapter's key
        self._hits = self._misses = 0
        self._watching: asyncio.Future[None] | None = None
        self._ids, self._requests = itertools.count(1), itertools.count()

    async def start(self) -> None:
        self._engine = await asyncio.get_running_loop().run_in_executor(None, self._load)
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        """Watch for the end of vLLM's processes, because vLLM reports it only to requests."""
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        self.on_end(self._engine.dead_error)

    def _load(self) -> Any:
        try:
            import vllm  # noqa: F401
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise InputError(
                f"The engine vllm needs the package vllm, which cannot be imported here ({reason(error)})",
                'install it: pip install "ia3[vllm]"; docs/vllm.md says how without a GPU',
            ) from error
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from ia3.adapter.pretrained import find_base
        from ia3.scoring.scorer import Scorer
        from ia3.vllm.plugin import ONLY, unsupported

        problem = unsupported()
        if problem is not None:
            raise InputError(problem)
        path = find_base(self._source)[1]
        fixed = {"enable_lora": True, "max_lora_rank": 1, "additional_config": {ONLY: True}}
        try:
            with reading(path, "a model and its tokenizer"):
                config = AutoConfig.from_pretrained(path)
                self.tokenizer = AutoTokenizer.from_pretrained(path)
            with torch.device("meta"):  # its architecture decides how questions are asked
                shape = AutoModelForCausalLM.from_config(config)
            dtype = str(config.dtype or "auto").removeprefix("torch.")  # vLLM's "auto" rounds float32 down
            arguments = AsyncEngineArgs(model=path, **{"dtype": dtype, **fixed, **self._settings})
            engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda *_: _stat_logger(self._stepped)])
        except (ValueError, OSError, TypeError) as error:
            raise InputError(f"vLLM cannot serve {self.name!r} so: {reason(error)}") from error
        self.context_length = engine.model_config.max_model_len
        shape.config.max_position_embeddings = self.context_length
        self._scorer = Scorer(shape, self.tokenizer)
        return engine

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.get_running_loop().run_in_executor(None, engine.shutdown)
            engine.shutdown = lambda: None  # its finalizer calls it again, which fails at the interpreter's end

    def questions(self, wordings: Sequence[Wording], recipe: Recipe) -> list[Question]:
        return self._scorer.questions(wordings, False, recipe.long_prompts)

    async def score(self, jobs: Sequence[ScoreJob]) -> list[list[float]]:
        return await _together([self._score(job) for job in jobs])

    async def _score(self, job: ScoreJob) -> list[float]:
        from ia3.scoring.question import tree_of

        if job.head is not None:
            raise InputError(
                "Expected an adapter whose vectors answer alone, for vLLM gives no hidden states to a head",
                "train it with --opinions vectors, or serve it with --engine local",
            )
        question, adapter = job.question, await self._request(job.adapter)
        tree = tree_of(question)
        follow: dict[int, set[int]] = {}
        for choice, path in zip(question.choices, tree.paths, strict=True):
            for node, token in zip(path, choice, strict=True):
                follow.setdefault(node, set()).add(token)

        def text(node: int) -> list[int]:
            tokens: list[int] = []
            while node > 0:
                tokens.append(tree.tokens[node])
                node = tree.parents[node]
            return [*question.prompt, *reversed(tokens)]

        # Ask the prompt first, so that the other requests find it in the cache.
        found = {0: await self._next(text(0), follow.pop(0), adapter, question.read)}
        others = await _together(
            [self._next(text(node), tokens, adapter, question.read) for node, tokens in follow.items()]
        )
        found.update(zip(follow, others, strict=True))
        scores = [
            normalized(
                sum(found[node][token] for node, token in zip(path, choice, strict=True)),
                len(choice),
                job.length_normalization,
            )
            for choice, path in zip(question.choices, tree.paths, strict=True)
        ]
        return question.as_listed(scores)

    async def _next(self, text: list[int], tokens: set[int], adapter: Any, read: int) -> dict[int, float]:
        """The log-probabilities of these tokens after a text, whose first `read` tokens stand before the question."""
        from vllm import SamplingParams

        from ia3.vllm.from_question import PLACE

        asked, found = sorted(tokens), {}
        for first in range(0, len(asked), _TOKENS_ASKED):
            some = asked[first : first + _TOKENS_ASKED]
            sampling = SamplingParams(
                max_tokens=1,
                temperature=0,
                logprob_token_ids=some,
                detokenize=False,
                extra_args={PLACE: read},  # for adapters that act from the question on; others have no use for it
            )
            async for output in self._generate(text, sampling, adapter):
                for entry in output.outputs[0].logprobs or ():
                    found.update({token: entry[token].logprob for token in some})
        if len(found) < len(asked) or not all(value <= 0 for value in found.values()):  # false for NaN too
            raise InputError("The model gives scores that are not numbers", "is the adapter or the base broken?")
        return found

    async def _generate(self, text: Sequence[int], sampling: Any, adapter: Any) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMClientError

        key = None if adapter is None else adapter.lora_name
        self._under_way[key] += 1
        made = self._engine.generate(
            {"prompt_token_ids": list(text)}, sampling, f"ia3-{next(self._requests)}", lora_request=adapter
        )
        try:
            async with contextlib.aclosing(made) as outputs:  # vLLM aborts a closed request
                async for output in outputs:
                    yield output
        except VLLMClientError as error:  # a request that vLLM or the plugin refuses
            raise InputError(str(error)) from error
        finally:
            self._under_way[key] -= 1
            self._under_way = +self._under_way

    def _stepped(self, tokens: int) -> None:
        self.observe("step", tokens, min(tokens, max(1, len(self._under_way))))

    async def generate(self, job: GenerateJob) -> AsyncIterator[Piece]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=job.max_tokens,
            temperature=job.temperature,
            top_p=job.top_p,
            stop=list(job.stop) or None,
            seed=job.seed,
            output_kind=RequestOutputKind.DELTA,
        )
        adapter, count = await self._request(job.adapter), 0
        async with contextlib.aclosing(self._generate(job.prompt, sampling, adapter)) as outputs:
            async for output in outputs:
                (part,) = output.outputs
                count += len(part.token_ids)
                if part.finish_reason not in (None, "stop", "length"):
                    raise InputError(f"The generation ended by {part.finish_reason!r}; is the model or adapter broken?")
                yield Piece(part.text, count, part.finish_reason)

    async def add(self, key: str, folder: str, check: bool) -> None:
        from vllm.lora.request import LoRARequest

        from ia3.vllm.from_question import acts_from_question

        if len(self._adapters) >= self._most:
            raise InputError(f"Expected at most {self._most} adapters at a time, found one more; allow more of them.")
        IA3Config.from_pretrained(folder)  # refuse other adapters, which vLLM would accept
        self._adapters[key] = LoRARequest(key, next(self._ids), folder)
        acts_from_question(self._adapters[key])  # which the plugin remembers: the folder may change
        if check:
            try:
                await self._request(key)
            except AdapterFailed as error:  # its text is about a job
                del self._adapters[key]
                raise InputError(_FOLDERS.sub("", error.message), owner=error.owner) from error

    async def _request(self, key: str | None) -> Any:
        """vLLM's request for an adapter. vLLM reads the adapter here once, because an error inside a step would end
        it."""
        if key is None:
            return None
        if key not in self._adapters:
            raise AdapterFailed(f"Adapter {key!r} is not known; add it first.")
        known = self._loading.get(key)
        self._hits += known is not None and known.done()
        if known is None:
            self._misses += 1
            self._loading[key] = asyncio.ensure_future(self._engine.add_lora(self._adapters[key]))
        try:
            await asyncio.shield(self._loading[key])
        except Exception as error:
            self._loading.pop(key, None)
            owner, said = f"Adapter {key!r}", _WRAPPED.sub(r"\1", reason(error))
            message = said.removeprefix(f"{owner} ").removeprefix(f"{owner}: ")
            raise AdapterFailed(message, owner=owner if message != said else None) from error
        return self._adapters[key]

    async def keep(self, keys: Sequence[str], change: Callable[[], None]) -> None:
        for key in keys:
            with contextlib.suppress(AdapterFailed):  # an unreadable adapter could not be used before either
                await self._request(key)
        await asyncio.get_running_loop().run_in_executor(None, change)

    async def drop(self, key: str) -> None:
        request = self._adapters.pop(key)
        if self._loading.pop(key, None) is not None:
            await self._engine.remove_lora(request.lora_int_id)

    def statistics(self) -> dict[str, Any]:
        resident = sum(each.done() for each in self._loading.values())
        return {"resident": resident, "hits": self._hits, "misses": self._misses, "evictions": 0}


def _stat_logger(stepped: Callable[[int], None]) -> Any:
    """A logger of vLLM's steps: the number of generated tokens, one for each request after its prompt."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StatLogger(StatLoggerBase):
        def __init__(self) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            if iteration_stats is not None and iteration_stats.num_generation_tokens:
                stepped(iteration_stats.num_generation_tokens)

    return StatLogger()


async def _together(parts: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of all coroutines. If one fails or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
