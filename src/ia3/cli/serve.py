"""`ia3 serve`: serve any number of adapters of one model over HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from enum import Enum
from pathlib import Path

import typer

from ia3.adapter.pretrained import DTYPES
from ia3.cli.common import BaseOption, DtypeOption, console
from ia3.errors import InputError, needs, reason, shown
from ia3.files import are_hub_ids, is_address
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
    refresh: float | None = typer.Option(
        None,
        min=0.01,
        help="Seconds between looks at --adapters for new, changed and removed ones, which other servers may have taken. "
        "\\[default: 60 at an address or on the hub; a folder is read again on SIGHUP only]",
        show_default=False,
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
    tensor_parallel_size: int = typer.Option(
        1,
        "--tensor-parallel-size",
        min=1,
        help="Processes (GPUs) that share each layer of the model. For --engine vllm.",
    ),
    data_parallel_size: int = typer.Option(
        1,
        "--data-parallel-size",
        min=1,
        help="Copies of the model, each in processes of its own; a request goes to the one with the least to do. For "
        "--engine vllm.",
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
    drain: float = typer.Option(
        0,
        min=0,
        help="Seconds from SIGTERM to the closing of the port. Meanwhile /ready gets status 503, so that a proxy turns to "
        "other servers, and requests are still accepted.",
    ),
    log_texts: bool = typer.Option(False, "--log-texts", help="Also log the texts that clients send."),
) -> None:
    """Serve adapters of one model over HTTP: labels and probabilities, and OpenAI's completions.

    Without arguments: SmolLM2-135M with the adapters in ./adapters, where ia3 train puts them. A page to try them is at
    http://127.0.0.1:8000, the API at /docs.

    Requests for different adapters share batches, so thousands of adapters are as fast as one. SIGHUP reads the
    adapters' folder (or address) again. SIGTERM and Ctrl-C finish accepted requests and end. Several servers may share a
    folder or address. Logs are JSON lines on standard error, without texts.
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
    if engine == EngineKind.LOCAL and (tensor_parallel_size, data_parallel_size) != (1, 1):
        raise InputError(
            "--tensor-parallel-size and --data-parallel-size are for --engine vllm; add that, or start several servers with "
            "--engine local behind a proxy."
        )
    remote = adapters is not None and (is_address(adapters) or are_hub_ids(adapters))
    if adapters is not None and not remote and not os.path.isdir(adapters):
        raise InputError(f"Expected a folder of adapters, found no {adapters!r}.")
    try:
        import fastapi_offline  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise needs("Serving", str(error.name), "serve") from error
    from ia3.serve.run import run
    from ia3.serve.start import open_server

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
    with console(True).status("Copying adapters …") if remote else contextlib.nullcontext():
        server = open_server(
            model,
            adapters or "adapters",
            engine=engine.value,
            dtype=dtype,
            memory=memory,
            max_adapters=max_adapters,
            max_batch=max_batch,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            limits=limits,
            token=token,
            hosts={host},
            log_texts=log_texts,
            refresh=refresh,
        )
    run(server, host, port, drain)


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
