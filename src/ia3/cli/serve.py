"""`ia3 serve`: serve any number of adapters of one model over HTTP."""

from __future__ import annotations

import ipaddress
import os
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from ia3.adapter.pretrained import DTYPES
from ia3.adapter.stored import OWN_NAMES
from ia3.cli.common import BaseOption, DtypeOption, console
from ia3.errors import InputError, reason, shown
from ia3.files import HubMirror, Mirror, is_address, is_hub_id
from ia3.serve.limits import Limits

_DEFAULTS = Limits()

TOKEN_VARIABLE = "IA3_SERVE_TOKEN"


class EngineKind(str, Enum):
    """The engine that runs the model."""

    LOCAL = "local"
    VLLM = "vllm"


def serve(
    model: str = BaseOption,
    dtype: str = DtypeOption,
    adapters: str | None = typer.Option(
        None,
        "--adapters",
        "-a",
        help="Folder with adapters in subfolders; also for uploads. Or a folder's address, such as s3://bucket/adapters, or hub ids, "
        "such as owner/tickets,owner/tone@v1, which are copied to the cache. \\[default: adapters, where ia3 train puts them]",
        show_default=False,
    ),
    refresh: float = typer.Option(
        60,
        min=0.01,
        help="Seconds between looks at an address or hub ids of --adapters for new, changed and removed adapters.",
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on. All but loopback need a token."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0: any free port."),
    token_file: Path | None = typer.Option(
        None,
        "--token-file",
        help=f"File with the token that clients must send. \\[default: the environment variable {TOKEN_VARIABLE}]",
        show_default=False,
    ),
    memory: str | None = typer.Option(
        None,
        help="Memory for adapters' vectors, such as 2GiB; the least recently used are evicted. \\[default: no limit]",
        show_default=False,
    ),
    engine: EngineKind = typer.Option(
        EngineKind.LOCAL, help="Engine that runs the model: this process, or vLLM if it is installed (docs/vllm.md)."
    ),
    max_adapters: int = typer.Option(20_000, min=1, help="Maximum of adapters."),
    max_batch: int = typer.Option(64, min=1, help="Maximum of rows per pass through the model."),
    max_texts: int = typer.Option(_DEFAULTS.texts, min=1, help="Maximum of texts per request."),
    max_text_tokens: int | None = typer.Option(
        None, min=1, help="Maximum of tokens per prompt. \\[default: the model's context]", show_default=False
    ),
    max_text_characters: int | None = typer.Option(
        None,
        min=1,
        help="Maximum of characters per prompt. \\[default: 16 per token that it may have, at least 10000]",
        show_default=False,
    ),
    max_new_tokens: int = typer.Option(_DEFAULTS.new_tokens, min=1, help="Maximum of new tokens per prompt."),
    max_body: int = typer.Option(_DEFAULTS.body_bytes, min=1, help="Maximum of bytes per request."),
    max_upload: int = typer.Option(_DEFAULTS.upload_bytes, min=1, help="Maximum of bytes per upload."),
    queue: int = typer.Option(
        _DEFAULTS.queue,
        min=1,
        help="Maximum of waiting and running texts, each counted once per adapter; further requests get status 429.",
    ),
    deadline: float = typer.Option(
        _DEFAULTS.deadline, min=0.001, help="Maximum of seconds per request; then it gets status 504."
    ),
    log_texts: bool = typer.Option(False, "--log-texts", help="Also log the texts that clients send."),
) -> None:
    """Serve adapters of one model over HTTP: labels and probabilities, and OpenAI's completions.

    Without arguments: SmolLM2-135M with the adapters in ./adapters, where ia3 train puts them. A page to try them is at
    http://127.0.0.1:8000, the API at /docs.

    Requests for different adapters share batches, so thousands of adapters are as fast as one. SIGHUP reads the
    adapters' folder (or address) again. SIGTERM and Ctrl-C finish accepted requests and end. Logs are JSON lines on standard error,
    without texts.
    """
    if max_texts > queue:
        raise InputError(f"Expected a --queue of at least --max-texts ({max_texts}), found {queue}.")
    token = _token(token_file)
    if token is None and not _is_loopback(host):
        raise InputError(
            f"Expected a token with --host {host}, which other machines reach: give --token-file or set {TOKEN_VARIABLE}."
        )
    if dtype not in DTYPES:
        raise InputError(f"Expected a --dtype of {shown(DTYPES)}, found {dtype!r}.")
    if engine == EngineKind.VLLM and memory is not None:
        raise InputError("--memory is for --engine local; vLLM counts adapters. Leave it out.")
    on_hub = adapters is not None and all(map(is_hub_id, adapters.split(",")))
    remote = on_hub or is_address(adapters)
    if adapters is not None and not remote and not os.path.isdir(adapters):
        raise InputError(f"Expected a folder of adapters, found no {adapters!r}.")
    try:
        import fastapi_offline  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"Serving needs the package {error.name!r}; install it: pip install 'ia3[serve]'") from error
    from ia3.adapter.pretrained import find_base
    from ia3.serve.engine import Engine
    from ia3.serve.run import run
    from ia3.serve.server import Server
    from ia3.serve.store import Store

    mirror = (HubMirror if on_hub else Mirror)(adapters, OWN_NAMES) if adapters is not None and remote else None
    if mirror is not None:
        with console(True).status("Copying adapters …"):
            mirror.refresh()
    recorded, _ = find_base(model)  # before anything is loaded
    name = Path(recorded).name if Path(recorded).is_dir() else recorded
    store = Store(adapters or "adapters" if mirror is None else mirror.folder, max_adapters, name, mirror)
    runs: Engine
    if engine == EngineKind.VLLM:
        from ia3.serve.vllm import VllmEngine

        settings: dict[str, Any] = {} if dtype in ("auto", "stored") else {"dtype": dtype}
        runs = VllmEngine(recorded, name, adapters=max_adapters, max_num_seqs=max_batch, **settings)
    else:
        from ia3.serve.local import LocalEngine

        runs = LocalEngine(recorded, store.kinds(recorded), name, store.labels, memory, max_batch, dtype=dtype)
    limits = Limits(
        body_bytes=max_body,
        upload_bytes=max_upload,
        texts=max_texts,
        text_tokens=max_text_tokens,
        text_characters=max_text_characters,
        new_tokens=max_new_tokens,
        queue=queue,
        deadline=deadline,
    )
    run(Server(runs, store, limits, token, {host}, log_texts), host, port, None if mirror is None else refresh)


def _token(file: Path | None) -> str | None:
    """The token that clients must send, or None."""
    if file is not None:
        if not file.is_file():
            raise InputError(f"Expected a file with the token, found no {str(file)!r}.")
        try:
            token = file.read_text(encoding="utf-8", errors="replace").strip()  # what is no text is no token, below
        except OSError as error:
            raise InputError(
                f"Expected a file with the token, found one that cannot be read: {reason(error)}."
            ) from error
    elif TOKEN_VARIABLE in os.environ:
        token = os.environ[TOKEN_VARIABLE].strip()
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            "Expected a token of printable ASCII characters without spaces, found an empty or another one."
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
