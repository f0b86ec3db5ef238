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
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ia3.adapter.config import CONFIG_NAME, IA3Config, adapter_folders
from ia3.adapter.stored import OWN_NAMES
from ia3.errors import InputError, shown, similar
from ia3.files import WEIGHTS_NAME, current, take_over
from ia3.serve.adapter import FILES, Adapter, read_settings, stamp_of

if TYPE_CHECKING:
    from ia3.serve.engine import Engine

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})*")

# Finding close names takes too long among thousands.
_NEAR = 100

# So many adapters that cannot be served are named in the log, a line each.
_MOST_LOGGED = 50

# Characters of a reason.
_MOST_REASON = 400

# In a folder that came over HTTP, and may be replaced and deleted over HTTP.
_UPLOADED = ".uploaded"

# Folders that are on their way in, or out.
_COMING, _GOING = ".upload-", ".deleted-"


class UnknownAdapter(InputError):
    """No adapter of that name is served."""


class UnusableAdapter(InputError):
    """An adapter of that name is there, and cannot be served with this base model."""


class Conflict(InputError):
    """What is asked for cannot be done with the adapters that there are."""


class NotStored(InputError):
    """The adapters' folder takes no files."""


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotStored(
            f"Expected an adapters' folder that can be written to, found: {error.strerror or type(error).__name__}. Make "
            f"room or change its permissions."
        ) from error


class Store:
    """The adapters of a server, by name. All methods but those that say otherwise are called on the event loop.

    Args:
        root: the folder whose subfolders are the adapters; relative paths are their names.
        max_adapters: how many adapters there may be.
        base: the base model's name as served, which no adapter can have.

    Attributes:
        root: the folder's real path.
        max_adapters: how many adapters there may be.
        found: name → folder and stamp of those that were there when the store was made.

    Raises:
        InputError: too many adapters, or the root is an adapter itself.
    """

    def __init__(self, root: str | os.PathLike, max_adapters: int = 20_000, base: str = "") -> None:
        self.root = os.path.realpath(root)
        self.max_adapters, self._base = max_adapters, base
        if (current(self.root) / CONFIG_NAME).is_file():
            raise InputError(
                f"Expected a folder whose subfolders are the adapters, found an adapter in {str(root)!r}; give the folder "
                f"above it."
            )
        self._engine: Engine | None = None
        self._adapters: dict[str, Adapter] = {}
        self._names: list[str] = []  # sorted, made anew when adapters have come or gone
        self._unusable: dict[str, str] = {}  # name → why, in words for clients
        self._removed: set[str] = set()  # whose folders are there, and not to be served
        self._changing = asyncio.Lock()
        self._version = 0
        self._clean()
        self.found = self._scan()

    def kinds(self, base_model: str) -> list[IA3Config]:
        """The different configs of adapters, the most frequent first, but those for models of other names last."""
        found: dict[str, tuple[IA3Config, list[bool]]] = {}
        for folder, _ in self.found.values():
            with contextlib.suppress(InputError, RecursionError, OSError):
                config = IA3Config.from_pretrained(folder)
                # A model's folder may have moved since.
                own = Path(config.base_model_name_or_path or base_model).name == Path(base_model).name
                kind = dataclasses.replace(config, base_model_name_or_path=None, inference_mode=True)
                found.setdefault(kind.to_json(), (config, []))[1].append(own)
        ranked = sorted(found.values(), key=lambda each: (-sum(each[1]), -len(each[1])))
        return [config for config, _ in ranked]

    def labels(self) -> list[str] | None:
        """The labels of the first adapter's task, which a classifier's head has; None where there is none. Blocks."""
        for folder, _ in self.found.values():
            task = read_settings(folder).task
            return None if task is None else task.labels
        return None

    async def open(self, engine: Engine) -> None:
        """Give the engine, which has started, what was found. The log names what cannot be served."""
        async with self._changing:
            self._engine = engine
            for name, (folder, stamp) in self.found.items():
                try:
                    await self._serve(name, folder, stamp, check=False)
                except InputError as error:
                    self._refuse(name, error)
            self._log_unusable()

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
        """Raises `UnknownAdapter`, with names that come close, or `UnusableAdapter`, with the reason."""
        if name in self._unusable:
            raise UnusableAdapter(self._unusable[name])
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
        inside = re.escape(self.root + os.sep) + rf"({re.escape(_COMING)}\w+/)?"
        return re.sub(inside, "", message).replace(self.root, "the root")

    # Changes, one at a time.

    async def reload(self) -> dict[str, list[str]]:
        """Look at the root again. Requests that are under way end with the vectors that they began with.

        Returns:
            Names of adapters: "added", "changed", "removed", "failed".
        """
        async with self._changing:
            found = await asyncio.to_thread(self._scan)
            done: dict[str, list[str]] = {"added": [], "changed": [], "removed": [], "failed": []}
            self._removed &= found.keys()
            self._unusable = {}
            wanted = {name: place for name, place in found.items() if name not in self._removed}
            stamps = dict(found.values())
            for name, adapter in self._adapters.items():
                if adapter.folder != self._folder(name):  # served by another name than its own
                    if name in wanted:
                        logger.warning("Adapter %r is not served: another one goes by its name", name)
                        done["failed"].append(name)
                        del wanted[name]
                    if adapter.folder in stamps:
                        wanted[name] = adapter.folder, stamps[adapter.folder]
            before = dict(self._adapters)
            for name, (folder, stamp) in wanted.items():
                if name in before and before[name].stamp == stamp:
                    continue
                try:
                    await self._serve(name, folder, stamp, check=name in before)
                    done["changed" if name in before else "added"].append(name)
                except InputError as error:
                    if name in before:  # it goes on as it was
                        logger.warning("Adapter %r is not reloaded: %s", name, error.worded(owned=False))
                    else:
                        self._refuse(name, error)
                    done["failed"].append(name)
            self._log_unusable()
            for name in before.keys() - wanted.keys():
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
            Conflict: the name is the base's or another adapter's, or there are too many.
        """
        if not NAME.fullmatch(folder):
            raise InputError(f"Expected a folder below the adapters' root such as 'tickets', found {folder!r}.")
        name = self._checked(folder if name is None else name)
        async with self._changing:
            path = self._folder(folder)
            stamp = await asyncio.to_thread(stamp_of, path)
            if stamp is None:
                raise UnknownAdapter(
                    f"There is no adapter's folder {folder!r} below the adapters' root, with {CONFIG_NAME} and "
                    f"{WEIGHTS_NAME} that are no links."
                )
            self._require_free(name, path)
            await asyncio.to_thread(read_settings, path)
            adapter = await self._serve(name, path, stamp, check=True)
            self._removed.discard(name)
            return adapter

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
            NotStored: the root takes no files.
        """
        if "/" in self._checked(name):
            raise InputError(f"Expected a name without slashes for an upload, found {name!r}.")
        from ia3.serve import uploads

        uploads.check_names(files)
        with _storing():
            os.makedirs(self.root, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=_COMING, dir=self.root)
        try:
            with _storing():
                for file, write in files.items():
                    await write(Path(temporary, file))
                Path(temporary, _UPLOADED).touch()
                os.chmod(temporary, 0o755)
            await asyncio.to_thread(self._checked_upload, temporary)
            async with self._changing:
                final = self._folder(name)
                self._require_free(name, final)
                if os.path.lexists(final) and not os.path.isfile(os.path.join(final, _UPLOADED)):
                    raise Conflict(
                        f"There is another {name!r} below the adapters' root, not uploaded; choose another name."
                    )
                # Read where it is, before anything is replaced.
                new = name not in self._adapters
                trial = await self._prepare(name, temporary, check=True)
                await self._engine_of().drop(trial.key)
                names = dict.fromkeys([name, *(each.name for each in self._in(final))])
                with _storing():
                    await self._take_away(final, lambda: _exchange(temporary, final))
                stamp = stamp_of(final) or ()
                served = [await self._serve(each, final, stamp, check=False) for each in names]
                self._removed.discard(name)
                return served[0], new
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    async def remove(self, name: str) -> None:
        """Serve an adapter no more, and delete its files when they were uploaded.

        Raises:
            UnknownAdapter: there is none.
            NotStored: its files cannot be deleted.
        """
        async with self._changing:
            adapter = None if name in self._unusable else self.get(name)
            folder = self._folder(name) if adapter is None else adapter.folder
            has_others = any(each is not adapter for each in self._in(folder))
            if not has_others and os.path.isfile(os.path.join(folder, _UPLOADED)):
                with _storing():
                    going = tempfile.mkdtemp(prefix=_GOING, dir=self.root)
                    await self._take_away(folder, lambda: os.rename(folder, going))
                await asyncio.to_thread(shutil.rmtree, going, True)
            elif folder == self._folder(name):
                self._removed.add(name)
            self._unusable.pop(name, None)
            if adapter is not None:
                del self._adapters[name]
                self._names = []
                self._retire(adapter)

    # Under the lock.

    def _refuse(self, name: str, error: InputError) -> None:
        """Note why an adapter is not served, in words for clients: without folders."""
        why = error.worded(owned=False)
        base = self._engine_of().name
        with contextlib.suppress(InputError, RecursionError, OSError):
            own = Path(IA3Config.from_pretrained(self._folder(name)).base_model_name_or_path or base).name
            if own != Path(base).name:
                why = f"it was made for {own!r}; {why}"
        why = self.public(why.replace(self._folder(name) + os.sep, ""))
        self._unusable[name] = f"Adapter {name!r} cannot be served with {base!r}: {why}"[:_MOST_REASON]

    def _log_unusable(self) -> None:
        for name, why in list(self._unusable.items())[:_MOST_LOGGED]:
            logger.warning("not served", extra={"fields": {"adapter": name, "reason": why}})
        if len(self._unusable) > _MOST_LOGGED:
            logger.warning("not served", extra={"fields": {"more": len(self._unusable) - _MOST_LOGGED}})

    def _require_free(self, name: str, folder: str) -> None:
        """Raise `Conflict` unless nothing, or what is in that folder, goes by a name."""
        served = self._adapters.get(name)
        other = (current(self._folder(name)) / CONFIG_NAME).is_file() and folder != self._folder(name)
        if other or (served is not None and served.folder != folder):
            raise Conflict(f"There is another adapter {name!r}; choose another name, or remove that one.")

    def _in(self, folder: str) -> list[Adapter]:
        """Those that are served from a folder."""
        return [adapter for adapter in self._adapters.values() if adapter.folder == folder]

    async def _take_away(self, folder: str, change: Callable[[], None]) -> None:
        """Rename a folder, so that requests which have come or come in meanwhile end with what it held."""
        its = self._in(folder)
        for adapter in its:
            with contextlib.suppress(InputError):  # damaged files are its users' trouble, as before
                await asyncio.to_thread(adapter.settings)
        await self._engine_of().keep([adapter.key for adapter in its], change)

    async def _serve(self, name: str, folder: str, stamp: tuple, check: bool) -> Adapter:
        adapter = await self._prepare(name, folder, check)
        adapter.stamp = stamp
        self._replace(adapter)
        return adapter

    async def _prepare(self, name: str, folder: str, check: bool) -> Adapter:
        if name not in self._adapters and len(self._adapters) >= self.max_adapters:
            raise Conflict(
                f"Expected at most {self.max_adapters} adapters",
                "remove one first, or start the server with a larger",
                argument="max_adapters",
            )
        self._version += 1
        adapter = Adapter(name, f"{name}@{self._version}", folder, ())
        try:
            await self._engine_of().add(adapter.key, folder, check)
        except InputError as error:
            if error.owner is not None:
                error.owner = f"Adapter {name!r}"  # the engine knows its key
            raise
        return adapter

    def _replace(self, adapter: Adapter) -> None:
        self._unusable.pop(adapter.name, None)
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
        if not FILES.keys().isdisjoint(str(name).split("/")):  # it would not be found again, or hide another one's file
            raise InputError(f"Expected an adapter's name that is none of its files', found {name[:200]!r}.")
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
            usable = usable and FILES.keys().isdisjoint(name.split("/"))
            stamp = stamp_of(folder) if usable else None  # no links, and no pickles
            if stamp is not None:
                found[name] = (folder, stamp)
            elif not name.startswith("."):
                skipped.append(name)
        if skipped:
            logger.warning("Not served, by their names, as links, or without %s: %s", WEIGHTS_NAME, shown(skipped))
        if len(found) > self.max_adapters:
            raise InputError(
                f"Expected at most {self.max_adapters} adapters, found {len(found)}", "give", argument="max_adapters"
            )
        return found

    def _clean(self) -> None:
        """Remove what a process that was killed has left in the root, unless another server works there now."""
        try:
            import fcntl

            claimed = os.open(self.root, os.O_RDONLY)
            weakref.finalize(self, os.close, claimed)  # the lock is held for as long
            fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(self.root):
                if name.startswith((_COMING, _GOING)):
                    shutil.rmtree(os.path.join(self.root, name), ignore_errors=True)
        except (ImportError, OSError):  # elsewhere than on POSIX; no root yet; another server's
            return

    def _checked_upload(self, folder: str) -> None:
        from ia3.serve import uploads

        uploads.check(Path(folder))
        read_settings(folder)


def _exchange(folder: str, final: str) -> None:
    """Put a folder into another's place, or its files into that of the other's."""
    if os.path.lexists(final):
        take_over(folder, final, OWN_NAMES)
    else:
        os.rename(folder, final)
