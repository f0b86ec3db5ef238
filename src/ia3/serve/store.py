"""Which adapters are served: found below one folder, uploaded into it, replaced and removed: `Store`."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ia3.config import CONFIG_NAME, IA3Config, adapter_folders
from ia3.errors import InputError, shown, similar

if TYPE_CHECKING:
    from ia3.serve.engine import Engine
    from ia3.tfew.recipe import Recipe
    from ia3.tfew.task import Task

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})*")

TASK_NAME, RECIPE_NAME, CALIBRATION_NAME = "task.yaml", "recipe.yaml", "calibration.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Finding close names takes too long among thousands.
_NEAR = 100

# In a folder that came over HTTP, and may be replaced and deleted over HTTP.
_UPLOADED = ".uploaded"


class UnknownAdapter(InputError):
    """No adapter of that name is served."""


class Conflict(InputError):
    """What is asked for cannot be done with the adapters that there are."""


class Settings(NamedTuple):
    """What stands beside an adapter.

    Attributes:
        task: None: it is for completions only.
        recipe: the paper's, where there is none.
        temperature: of its calibration; 1 where there is none.
        calibrated: whether there is one.
    """

    task: Task | None
    recipe: Recipe
    temperature: float
    calibrated: bool


@dataclasses.dataclass(eq=False)
class Adapter:
    """One content of an adapter; when its files are replaced, another one takes its name.

    Attributes:
        name: what clients call it.
        key: what the engine calls it.
        folder: where it is.
        stamp: changes when its files do.
        users: requests that are under way with it.
        retired: it is served no more; the engine forgets it when its last user has gone.
    """

    name: str
    key: str
    folder: str
    stamp: tuple
    users: int = 0
    retired: bool = False
    _settings: Settings | None = None
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def settings(self) -> Settings:
        """Read once, on a thread that may block. Raises `InputError` for damaged files."""
        with self._lock:
            if self._settings is None:
                self._settings = read_settings(self.folder)
            return self._settings


def read_settings(folder: str) -> Settings:
    """The settings in an adapter's folder. Raises `InputError` for damaged files."""
    from ia3.tfew.calibration import Calibration
    from ia3.tfew.recipe import Recipe
    from ia3.tfew.task import Task

    task, recipe = Path(folder, TASK_NAME), Path(folder, RECIPE_NAME)
    calibration = Calibration.beside(folder)
    return Settings(
        task=Task.from_file(task) if task.is_file() else None,
        recipe=Recipe.load(recipe) if recipe.is_file() else Recipe(),
        temperature=1.0 if calibration is None else calibration.temperature,
        calibrated=calibration is not None,
    )


def _stamp(folder: str) -> tuple:
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME, TASK_NAME, RECIPE_NAME, CALIBRATION_NAME):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(os.path.join(folder, name))
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


class Store:
    """The adapters of a server, by name. All methods but those that say otherwise are called on the event loop.

    Args:
        root: the folder whose subfolders are the adapters; relative paths are their names.
        most: how many adapters there may be.
        base: the base model's name as served, which no adapter can have.

    Raises:
        InputError: too many adapters, or the root is an adapter itself.
    """

    def __init__(self, root: str | os.PathLike, most: int = 20_000, base: str = "") -> None:
        self.root = os.path.realpath(root)
        self._most, self._base = most, base
        if os.path.isfile(os.path.join(self.root, CONFIG_NAME)):
            raise InputError(
                f"Expected a folder whose subfolders are the adapters, found an adapter in {str(root)!r}; give the folder "
                f"above it."
            )
        self._engine: Engine | None = None
        self._adapters: dict[str, Adapter] = {}
        self._names: list[str] = []  # sorted, made anew when adapters have come or gone
        self._changing = asyncio.Lock()
        self._version = 0
        self._found = self._scan()

    def kinds(self, base_model: str) -> list[IA3Config]:
        """The different configs of adapters, the most frequent first, but those for models of other names last."""
        found: dict[str, tuple[IA3Config, list[bool]]] = {}
        for folder, _ in self._found.values():
            with contextlib.suppress(InputError, RecursionError):
                config = IA3Config.from_pretrained(folder)
                # A model's folder may have moved since.
                own = Path(config.base_model_name_or_path or base_model).name == Path(base_model).name
                kind = dataclasses.replace(config, base_model_name_or_path=None, inference_mode=True)
                found.setdefault(kind.to_json(), (config, []))[1].append(own)
        ranked = sorted(found.values(), key=lambda each: (-sum(each[1]), -len(each[1])))
        return [config for config, _ in ranked]

    def labels(self) -> list[str] | None:
        """The labels of the first adapter's task, which a classifier's head has; None where there is none. Blocks."""
        for folder, _ in self._found.values():
            task = read_settings(folder).task
            return None if task is None else task.labels
        return None

    async def open(self, engine: Engine) -> None:
        """Give the engine, which has started, what was found."""
        async with self._changing:
            self._engine = engine
            for name, (folder, stamp) in self._found.items():
                await self._serve(name, folder, stamp, check=False)

    @property
    def names(self) -> list[str]:
        """All that are served, in alphabetical order."""
        if not self._names:
            self._names = sorted(self._adapters)
        return self._names

    def close_to(self, name: str, *others: str) -> str:
        """For an error message, names that come close; of many, among those near it in the alphabet."""
        place = bisect.bisect(self.names, name)
        return similar(name[:100], [*others, *self.names[max(0, place - _NEAR) : place + _NEAR]])

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, name: str) -> Adapter:
        """Raises `UnknownAdapter`, with names that come close."""
        if name not in self._adapters:
            raise UnknownAdapter(f"There is no adapter {name[:100]!r}; {self.close_to(name)}.")
        return self._adapters[name]

    @contextlib.contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """Within `with`, the engine does not forget an adapter."""
        if adapter is None:
            yield
            return
        adapter.users += 1
        try:
            yield
        finally:
            adapter.users -= 1
            if adapter.retired and not adapter.users:
                self._forget(adapter)

    def public(self, message: str) -> str:
        """A message without paths of this machine."""
        return re.sub(re.escape(self.root + os.sep) + r"(\.upload-\w+/)?", "", message).replace(self.root, "the root")

    # Changes, one at a time.

    async def reload(self) -> dict[str, list[str]]:
        """Look at the root again. Requests that are under way end with the vectors that they began with.

        Returns:
            Names of adapters: "added", "changed", "removed", "failed".
        """
        async with self._changing:
            before = {name: a for name, a in self._adapters.items() if a.folder == self._folder(name)}
            found = await asyncio.to_thread(self._scan)
            done: dict[str, list[str]] = {"added": [], "changed": [], "removed": [], "failed": []}
            for name, (folder, stamp) in found.items():
                if name in before and before[name].stamp == stamp:
                    continue
                try:
                    await self._serve(name, folder, stamp, check=name in before)
                    done["changed" if name in before else "added"].append(name)
                except InputError as error:  # what was served of that name goes on
                    logger.warning("Adapter %r is not reloaded: %s", name, error)
                    done["failed"].append(name)
            for name in before.keys() - found.keys():
                self._retire(self._adapters.pop(name))
                self._names = []
                done["removed"].append(name)
            return done

    async def admit(self, folder: str, name: str | None) -> Adapter:
        """Serve, or read again, an adapter in a folder below the root.

        Args:
            folder: relative to the root.
            name: None: the folder's relative path.

        Raises:
            InputError: no such folder, one outside the root, or no adapter that can be used.
            Conflict: the name is the base's, or there are too many.
        """
        if not NAME.fullmatch(folder):
            raise InputError(f"Expected a folder below the adapters' root such as 'tickets', found {folder!r}.")
        name = self._checked(folder if name is None else name)
        async with self._changing:
            path = self._folder(folder)
            if not os.path.isfile(os.path.join(path, CONFIG_NAME)) or os.path.realpath(path) != path:
                raise UnknownAdapter(f"There is no adapter's folder {folder!r} below the adapters' root.")
            stamp = await asyncio.to_thread(self._usable, path)
            return await self._serve(name, path, stamp, check=True)

    async def upload(self, name: str, files: Mapping[str, Callable[[Path], Awaitable[None]]]) -> tuple[Adapter, bool]:
        """Admit an adapter that came over HTTP; it replaces an uploaded one of that name.

        Args:
            name: without slashes.
            files: name → what writes the file to a path.

        Returns:
            The adapter, and whether it is new.

        Raises:
            InputError: see `uploads.check`; or vectors that do not fit the model or are not finite.
            Conflict: see `admit`; or an adapter of that name that was not uploaded.
        """
        if "/" in self._checked(name):
            raise InputError(f"Expected a name without slashes for an upload, found {name!r}.")
        from ia3.serve import uploads

        uploads.check_names(files)
        os.makedirs(self.root, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".upload-", dir=self.root)
        try:
            for file, write in files.items():
                await write(Path(temporary, file))
            Path(temporary, _UPLOADED).touch()
            await asyncio.to_thread(self._checked_upload, temporary)
            async with self._changing:
                final = self._folder(name)
                new = name not in self._adapters
                if os.path.lexists(final) and not os.path.isfile(os.path.join(final, _UPLOADED)):
                    raise Conflict(
                        f"There is another {name!r} below the adapters' root, not uploaded; choose another name."
                    )
                # Read where it is, before anything is replaced.
                adapter = await self._prepare(name, temporary, check=True)
                former = self._adapters.get(name)
                if former is not None and former.users:
                    await self._engine_of().keep(former.key)
                os.chmod(temporary, 0o755)
                await asyncio.to_thread(_exchange, temporary, final)
                # From its place, so that it can be read again.
                await self._engine_of().drop(adapter.key)
                adapter.folder, adapter.stamp = final, _stamp(final)
                await self._engine_of().add(adapter.key, final, check=False)
                self._replace(adapter)
                return adapter, new
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    async def remove(self, name: str) -> None:
        """Serve an adapter no more, and delete its files when they were uploaded. Raises `UnknownAdapter`."""
        async with self._changing:
            adapter = self.get(name)
            if adapter.users:
                await self._engine_of().keep(adapter.key)
            del self._adapters[name]
            self._names = []
            self._retire(adapter)
            shared = any(other.folder == adapter.folder for other in self._adapters.values())
            if not shared and os.path.isfile(os.path.join(adapter.folder, _UPLOADED)):
                await asyncio.to_thread(shutil.rmtree, adapter.folder, True)

    # Under the lock.

    async def _serve(self, name: str, folder: str, stamp: tuple, check: bool) -> Adapter:
        adapter = await self._prepare(name, folder, check)
        adapter.stamp = stamp
        self._replace(adapter)
        return adapter

    async def _prepare(self, name: str, folder: str, check: bool) -> Adapter:
        if name not in self._adapters and len(self._adapters) >= self._most:
            raise Conflict(f"Expected at most {self._most} adapters; remove one first, or start with --max-adapters.")
        self._version += 1
        adapter = Adapter(name, f"{name}@{self._version}", folder, ())
        await self._engine_of().add(adapter.key, folder, check)
        return adapter

    def _replace(self, adapter: Adapter) -> None:
        former = self._adapters.get(adapter.name)
        self._adapters[adapter.name] = adapter
        self._names = []
        if former is not None:
            self._retire(former)

    def _retire(self, adapter: Adapter) -> None:
        adapter.retired = True
        if not adapter.users:
            self._forget(adapter)

    def _forget(self, adapter: Adapter) -> None:
        task = asyncio.ensure_future(self._engine_of().drop(adapter.key))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _engine_of(self) -> Engine:
        assert self._engine is not None  # the server is ready
        return self._engine

    # Names and files.

    def _folder(self, name: str) -> str:
        return os.path.join(self.root, *name.split("/"))

    def _checked(self, name: str) -> str:
        if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 200:
            raise InputError(
                f"Expected an adapter's name of letters, digits, '.', '_' and '-' that begins with a letter or digit, found "
                f"{name[:200]!r}."
            )
        if name == self._base:
            raise Conflict(f"{name!r} is the base model's name; choose another.")
        return name

    def _scan(self) -> dict[str, tuple[str, tuple]]:
        """Name → folder and stamp of all adapters below the root. May be called on any thread."""
        if not os.path.isdir(self.root):
            return {}
        found, skipped = {}, []
        for name, folder in adapter_folders(self.root).items():
            usable = NAME.fullmatch(name) and len(name) <= 200 and name != self._base
            # No links, and no pickles.
            if usable and os.path.realpath(folder) == folder and os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
                found[name] = (folder, _stamp(folder))
            elif not name.startswith("."):
                skipped.append(name)
        if skipped:
            logger.warning("Not served, by their names, as links, or without %s: %s", WEIGHTS_NAME, shown(skipped))
        if len(found) > self._most:
            raise InputError(f"Expected at most {self._most} adapters, found {len(found)}; give --max-adapters.")
        return found

    def _usable(self, folder: str) -> tuple:
        if not os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
            raise InputError(f"Expected {WEIGHTS_NAME} in the folder, found none.")
        stamp = _stamp(folder)
        read_settings(folder)
        return stamp

    def _checked_upload(self, folder: str) -> None:
        from ia3.serve import uploads

        uploads.check(Path(folder))
        read_settings(folder)


def _exchange(folder: str, final: str) -> None:
    """Put a folder into another's place, which may be there."""
    if not os.path.lexists(final):
        os.rename(folder, final)
        return
    aside = tempfile.mkdtemp(prefix=".replaced-", dir=os.path.dirname(final))
    os.rename(final, aside)
    try:
        os.rename(folder, final)
    except OSError:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
