"""The served adapters: find them in a folder, upload, replace and remove them: `Store`."""

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
from ia3.adapter.stored import replaced_in
from ia3.errors import InputError, shown, similar
from ia3.files import UPLOADED, WEIGHTS_NAME, Mirror, current, take_over
from ia3.serve.adapter import FILES, Adapter, read_settings, stamp_of

if TYPE_CHECKING:
    from ia3.serve.engine import Engine

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})*")

# The maximum of names to search for similar ones, because the search is slow.
_NEAR = 100

# The maximum of unusable adapters to name in the log, one line each.
_MOST_LOGGED = 50

# The maximum of characters of a reason.
_MOST_REASON = 400

# Prefix of temporary folders of uploads and removals.
_COMING, _GOING = ".upload-", ".deleted-"


class UnknownAdapter(InputError):
    """No adapter with this name is served."""


class UnusableAdapter(InputError):
    """The adapter with this name cannot be served with this base model."""


class Conflict(InputError):
    """The request conflicts with the existing adapters."""


class NotStored(InputError):
    """The adapters' folder, or their address, cannot be written to."""


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Convert errors of writing below the adapters' folder to `NotStored`."""
    try:
        yield
    except OSError as error:
        raise NotStored(
            f"Expected an adapters' folder that can be written to, found: {error.strerror or type(error).__name__}. Make "
            f"room or change its permissions."
        ) from error


@contextlib.contextmanager
def _storing_far() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        logger.error("not stored", extra={"fields": {"reason": error.worded()}})  # names the address, not for clients
        raise NotStored(
            "Expected an adapters' address that can be read and written to, found that it cannot; the server's log says why."
        ) from error


class Store:
    """The adapters of a server, by name. Unless documented otherwise, methods are called on the event loop.

    Args:
        root: the folder whose subfolders are the adapters; relative paths are their names.
        max_adapters: the maximum of adapters.
        base: the base model's served name, which no adapter can have.
        mirror: copies the adapters to the root from elsewhere; None: the root is theirs.

    Attributes:
        root: the folder's real path.
        max_adapters: the maximum of adapters.
        found: name → folder and stamp of adapters that existed when the store was made.

    Raises:
        InputError: there are too many adapters, or the root is itself an adapter.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        max_adapters: int = 20_000,
        base: str = "",
        mirror: Mirror | None = None,
    ) -> None:
        self.root = os.path.realpath(root)
        self.max_adapters, self._base, self._mirror = max_adapters, base, mirror
        if (current(self.root) / CONFIG_NAME).is_file():
            raise InputError(
                f"Expected a folder whose subfolders are the adapters, found an adapter in {str(root)!r}; give the folder "
                f"above it."
            )
        self._engine: Engine | None = None
        self._adapters: dict[str, Adapter] = {}
        self._names: list[str] = []  # sorted, updated when adapters are added or removed
        self._unusable: dict[str, str] = {}  # name → reason for clients
        self._removed: set[str] = set()  # names whose folders exist but must not be served
        self._changing = asyncio.Lock()
        self._version = 0
        self._clean()
        self.found = self._scanned = self._scan()

    def kinds(self, base_model: str) -> list[IA3Config]:
        """The different configs of adapters, the most frequent first; those for models with other names last."""
        found: dict[str, tuple[IA3Config, list[bool]]] = {}
        for folder, _ in self.found.values():
            with contextlib.suppress(InputError, RecursionError, OSError):
                config = IA3Config.from_pretrained(folder)
                # A model's folder may have moved.
                own = Path(config.base or base_model).name == Path(base_model).name
                kind = dataclasses.replace(config, base_model_name_or_path=None, inference_mode=True)
                found.setdefault(kind.to_json(), (config, []))[1].append(own)
        ranked = sorted(found.values(), key=lambda each: (-sum(each[1]), -len(each[1])))
        return [config for config, _ in ranked]

    def labels(self) -> list[str] | None:
        """The labels of the first adapter's task, for an encoder's head; None if there is none. Blocks."""
        for folder, _ in self.found.values():
            task = read_settings(folder).task
            return None if task is None else task.labels
        return None

    async def open(self, engine: Engine) -> None:
        """Add the found adapters to the started engine. The log names unusable ones."""
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
        """The names of served adapters, in alphabetical order."""
        if not self._names:
            self._names = sorted(self._adapters)
        return self._names

    def close_to(self, name: str, *others: str) -> str:
        """Similar names for an error message; among many names, only alphabetical neighbours are searched."""
        place = bisect.bisect(self.names, name)
        near = self.names[max(0, place - _NEAR) : place + _NEAR]
        return similar(name[:100], [*others, *near], len(others) + len(self.names))

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, name: str) -> Adapter:
        """The adapter with this name. Raises `UnknownAdapter` with similar names, or `UnusableAdapter` with the
        reason."""
        if name in self._unusable:
            raise UnusableAdapter(self._unusable[name])
        if name not in self._adapters:
            raise UnknownAdapter(f"There is no adapter {name[:100]!r}; {self.close_to(name)}.")
        return self._adapters[name]

    @contextlib.contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """Keep the engine from dropping an adapter during a `with` block. Raises `UnknownAdapter` in place of an error that
        comes from another server's having deleted it."""
        if adapter is None:
            yield
            return
        adapter.users += 1
        try:
            yield
        except InputError as error:
            if os.path.isdir(adapter.folder):
                raise
            raise UnknownAdapter(f"There is no adapter {adapter.name!r} any more.") from error
        finally:
            adapter.users -= 1
            if adapter.retired and not adapter.users:
                self._forget(adapter)

    def public(self, message: str) -> str:
        """A message for clients, without paths on this machine."""
        inside = re.escape(self.root + os.sep) + rf"({re.escape(_COMING)}\w+/)?"
        return re.sub(inside, "", message).replace(self.root, "the root")

    # Changes, one at a time.

    async def reload(self, if_changed: bool = False) -> dict[str, list[str]] | None:
        """Read the root again. Running requests end with the vectors that they started with.

        Args:
            if_changed: only if something has changed there since it was read last.

        Returns:
            Names of adapters by "added", "changed", "removed", "failed"; None: nothing has changed.

        Raises:
            InputError: the mirror's address cannot be read, or there are too many adapters.
        """
        if self._mirror is not None:
            await asyncio.to_thread(self._mirror.refresh)
            if self._mirror.unfinished:
                logger.warning("not copied", extra={"fields": {"adapters": self._mirror.unfinished[:_MOST_LOGGED]}})
        async with self._changing:
            found = await asyncio.to_thread(self._scan)
            if if_changed and found == self._scanned:
                return None
            return await self._take_in(found)

    async def admit(self, folder: str, name: str | None) -> Adapter:
        """Serve an adapter in a folder below the root, or read it again.

        Args:
            folder: the path relative to the root.
            name: the adapter's name; None: the folder's relative path.

        Raises:
            InputError: the folder does not exist, is outside the root, or has no usable adapter.
            Conflict: the name is the base model's or another adapter's, or there are too many adapters.
        """
        if not NAME.fullmatch(folder):
            raise InputError(f"Expected a folder below the adapters' root such as 'tickets', found {folder!r}.")
        name = self._checked(folder if name is None else name)
        async with self._changing:
            path = self._folder(folder)
            stamp = await asyncio.to_thread(stamp_of, path)
            if stamp is None:
                raise UnknownAdapter(
                    f"There is no adapter's folder {folder!r} below the adapters' root with {CONFIG_NAME} and "
                    f"{WEIGHTS_NAME} (not links)."
                )
            self._require_free(name, path)
            await asyncio.to_thread(read_settings, path)
            adapter = await self._serve(name, path, stamp, check=True)
            self._removed.discard(name)
            return adapter

    async def upload(self, name: str, files: Mapping[str, Callable[[Path], Awaitable[None]]]) -> tuple[Adapter, bool]:
        """Add an uploaded adapter; it replaces an earlier upload with that name.

        Args:
            name: a name without slashes.
            files: name → function that writes the file to a path.

        Returns:
            The adapter, and whether it is new.

        Raises:
            InputError: the vectors do not fit the model or are not finite; see also `uploads.check`.
            Conflict: an adapter with that name exists that was not uploaded; see also `admit`.
            NotStored: the root cannot be written to.
        """
        self.require_name(name)
        from ia3.serve import uploads

        uploads.check_names(files)
        with storing():
            os.makedirs(self.root, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=_COMING, dir=self.root)
        try:
            with storing():
                for file, write in files.items():
                    await write(Path(temporary, file))
                Path(temporary, UPLOADED).touch()
                os.chmod(temporary, 0o755)
            await asyncio.to_thread(self._checked_upload, temporary)
            async with self._changing:
                if self._mirror is not None:
                    with _storing_far():
                        await asyncio.to_thread(self._mirror.refresh)  # others may have written there
                final = self._folder(name)
                self._require_free(name, final)
                if os.path.lexists(final) and not os.path.isfile(os.path.join(final, UPLOADED)):
                    raise Conflict(
                        f"There is another {name!r} below the adapters' root, not uploaded; choose another name."
                    )
                # Read it in its temporary place, before anything is replaced.
                new = name not in self._adapters
                trial = await self._prepare(name, temporary, check=True)
                await self._engine_of().drop(trial.key)
                if self._mirror is not None:
                    with _storing_far():
                        whole = await asyncio.to_thread(self._mirror.put, name, temporary)
                        await asyncio.to_thread(self._mirror.refresh)
                    if not whole or name in self._mirror.unfinished:
                        raise Conflict(f"Another {name!r} was uploaded at the same time; upload it again.")
                    self._removed.discard(name)
                    await self._take_in(await asyncio.to_thread(self._scan))
                    return self.get(name), new
                names = dict.fromkeys([name, *(each.name for each in self._in(final))])
                with storing():
                    await self._take_away(final, lambda: _exchange(temporary, final))
                stamp = stamp_of(final) or ()
                served = [await self._serve(each, final, stamp, check=False) for each in names]
                self._removed.discard(name)
                return served[0], new
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def require_folder(self) -> None:
        """Raise `NotStored` if the adapters are not in a folder that is the server's own."""
        if self._mirror is not None:
            raise NotStored(
                "Expected a server of a folder of adapters (--adapters DIR) for labels and training, found one that copies them from "
                "elsewhere."
            )

    def require_name(self, name: str, new: bool = False) -> None:
        """Raise `InputError` unless an upload can have this name; with `new` also `Conflict` if there is one that has it."""
        if "/" in self._checked(name):
            raise InputError(f"Expected a name without slashes for an upload, found {name!r}.")
        if new and (name in self._adapters or os.path.lexists(self._folder(name))):
            raise Conflict(f"There is another adapter {name!r}; choose another name, or remove that one.")

    async def remove(self, name: str) -> None:
        """Stop serving an adapter, and delete its files if they were uploaded.

        Raises:
            UnknownAdapter: there is no such adapter.
            NotStored: its files cannot be deleted.
        """
        async with self._changing:
            adapter = None if name in self._unusable else self.get(name)
            folder = self._folder(name) if adapter is None else adapter.folder
            has_others = any(each is not adapter for each in self._in(folder))
            if self._mirror is not None and not has_others and os.path.isfile(os.path.join(folder, UPLOADED)):
                far = os.path.relpath(folder, self.root).replace(os.sep, "/")
                await asyncio.to_thread(self._delete_far, self._mirror, far)
                await self._take_in(await asyncio.to_thread(self._scan))
                return
            if not has_others and os.path.isfile(os.path.join(folder, UPLOADED)):
                with storing():
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

    async def _take_in(self, found: dict[str, tuple[str, tuple]]) -> dict[str, list[str]]:
        """Serve what a scan has found, and nothing else; see `reload`."""
        self._scanned = found
        done: dict[str, list[str]] = {"added": [], "changed": [], "removed": [], "failed": []}
        self._removed &= found.keys()
        self._unusable = {}
        wanted = {name: place for name, place in found.items() if name not in self._removed}
        stamps = dict(found.values())
        for name, adapter in self._adapters.items():
            if adapter.folder != self._folder(name):  # served with another name than its folder's
                if name in wanted:
                    logger.warning("Adapter %r is not served: another adapter has its name", name)
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
                if name in before:  # it stays as it was
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

    def _refuse(self, name: str, error: InputError) -> None:
        """Record why an adapter is not served, in a message for clients, without paths."""
        why = error.worded(owned=False)
        base = self._engine_of().name
        with contextlib.suppress(InputError, RecursionError, OSError):
            own = Path(IA3Config.from_pretrained(self._folder(name)).base or base).name
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
        """Raise `Conflict` if an adapter in another folder has this name."""
        served = self._adapters.get(name)
        other = (current(self._folder(name)) / CONFIG_NAME).is_file() and folder != self._folder(name)
        if other or (served is not None and served.folder != folder):
            raise Conflict(f"There is another adapter {name!r}; choose another name, or remove that one.")

    def _in(self, folder: str) -> list[Adapter]:
        """The adapters that are served from a folder."""
        return [adapter for adapter in self._adapters.values() if adapter.folder == folder]

    async def _take_away(self, folder: str, change: Callable[[], None]) -> None:
        """Rename a folder. Requests that have arrived or arrive meanwhile end with its old content."""
        its = self._in(folder)
        for adapter in its:
            with contextlib.suppress(InputError):  # damaged files fail their requests, as before
                await asyncio.to_thread(adapter.acts_from)
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
        if not FILES.keys().isdisjoint(str(name).split("/")):  # would hide another's file, or be lost
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
        """Name → folder and stamp, for all adapters below the root. May be called on any thread."""
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
        """Remove leftovers of a killed process in the root, unless other servers use it now."""
        try:
            import fcntl

            claimed = os.open(self.root, os.O_RDONLY)
            weakref.finalize(self, os.close, claimed)  # holds the lock until then
            with contextlib.suppress(BlockingIOError):  # another server's lock
                fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in os.listdir(self.root):
                    if name.startswith((_COMING, _GOING)):
                        shutil.rmtree(os.path.join(self.root, name), ignore_errors=True)
            fcntl.flock(claimed, fcntl.LOCK_SH)  # all that use it share this one
        except (ImportError, OSError):  # not POSIX, no root yet, or a file system without locks
            return

    def _delete_far(self, mirror: Mirror, name: str) -> None:
        with _storing_far():
            last = mirror.is_last(name)
            if not last:
                mirror.delete(name)
                mirror.refresh()
        if last:
            raise Conflict(
                f"{name!r} is the only adapter at the address, and an address without any counts as one that cannot be read; "
                f"upload another one first."
            )

    def _checked_upload(self, folder: str) -> None:
        from ia3.serve import uploads

        uploads.check(Path(folder))
        read_settings(folder)


def _exchange(folder: str, final: str) -> None:
    """Replace a folder by another, or its files by the other's."""
    if os.path.lexists(final):
        take_over(folder, final, replaced_in(Path(final)))
    else:
        os.rename(folder, final)
