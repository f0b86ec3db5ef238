"""A server from a model's name and a place of adapters: `open_server`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.pretrained import find_base
from ia3.adapter.stored import OWN_NAMES
from ia3.errors import needs
from ia3.files import HubMirror, Mirror, are_hub_ids, is_address

try:
    from ia3.serve.server import Server
    from ia3.serve.store import Store
except ModuleNotFoundError as error:
    raise needs("Serving", str(error.name), "serve") from error

if TYPE_CHECKING:
    from ia3.serve.engine import Engine
    from ia3.serve.limits import Limits

# Seconds between looks at an address.
_REFRESH = 60.0


def open_server(
    model: str,
    adapters: str | os.PathLike = "adapters",
    *,
    engine: str = "local",
    dtype: str = "auto",
    memory: str | None = None,
    max_adapters: int = 20_000,
    max_batch: int = 64,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: set[str] | None = None,
    log_texts: bool = False,
    refresh: float | None = None,
) -> Server:
    """A server of adapters, which `run` or another ASGI server (`create_app`) starts. No model is loaded yet.

        server = open_server("smollm2", "s3://bucket/adapters", refresh=10)
        run(server, "127.0.0.1", 8000)

    Args:
        model: the base model's name or folder, or the name of an embedded one.
        adapters: the folder whose subfolders are the adapters; or its address, or hub ids with commas between them, which are
            copied to the cache here.
        engine: "local", or "vllm".
        dtype: the type of the model's weights, see `load_base`.
        memory: the memory for adapters' vectors of a local engine, such as "2GiB"; None: no limit.
        max_adapters: the maximum of adapters.
        max_batch: the maximum of rows per pass through the model.
        tensor_parallel_size, data_parallel_size: vLLM's; see `VllmEngine`.
        limits, token, hosts, log_texts: see `Server`.
        refresh: seconds between looks at the folder or address; None: 60 at an address or on the hub, and none at a folder.

    Raises:
        InputError: the model or the adapters' place cannot be read.
    """
    mirror = None
    if isinstance(adapters, str) and (is_address(adapters) or are_hub_ids(adapters)):
        mirror = (Mirror if is_address(adapters) else HubMirror)(adapters, OWN_NAMES)
        mirror.refresh()
    recorded, _ = find_base(model)  # before anything is loaded
    name = Path(recorded).name if Path(recorded).is_dir() else recorded
    store = Store(adapters if mirror is None else mirror.folder, max_adapters, name, mirror)
    runs: Engine
    if engine == "vllm":
        from ia3.serve.vllm import VllmEngine

        settings: dict[str, Any] = {} if dtype in ("auto", "stored") else {"dtype": dtype}
        settings |= {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        runs = VllmEngine(recorded, name, adapters=max_adapters, max_num_seqs=max_batch, **settings)
    else:
        from ia3.serve.local import LocalEngine

        runs = LocalEngine(recorded, store.kinds(recorded), name, store.labels, memory, max_batch, dtype=dtype)
    if mirror is not None and refresh is None:
        refresh = _REFRESH
    return Server(runs, store, limits, token, hosts, log_texts, refresh)
