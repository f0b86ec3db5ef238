"""Several processes that work together (`torchrun`, `accelerate launch`), each with the whole model or with a share of its layers.

In training, each has a part of every batch, and what they find is added up once a step; rows to predict are dealt out.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ia3.errors import InputError, brief

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")


def count() -> int:
    """How many processes a launcher started together (`WORLD_SIZE`); 1 without one. Raises `InputError` if it is no number."""
    found = os.environ.get("WORLD_SIZE", "1")
    if not found.isdecimal() or not int(found):
        raise InputError(f"Expected the number of processes in WORLD_SIZE, found {brief(found)}; unset it.")
    return int(found)


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def sharded_by_launcher() -> bool:
    """Whether `accelerate launch` was told to leave each process a share of the model's layers (FSDP 2).

    That is then taken out of the environment: accelerate's own way would divide vectors, too, which are few numbers.

    Raises:
        InputError: it was told of another way to do so.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise not_fsdp2("DeepSpeed")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise not_fsdp2(f"fsdp_version {version}")
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if os.environ.get(name, "false").lower() == "true":
            raise not_fsdp2(name.lower())
    del os.environ["ACCELERATE_USE_FSDP"]
    return True


def not_fsdp2(found: str) -> InputError:
    """The error for another way to divide a model among processes than ours."""
    return InputError(
        f"Expected whole models, or FSDP 2 without offloading and checkpointing (fsdp_version: 2), to divide a base model among "
        f"processes, found {found}; change the launcher's configuration."
    )


def connect(settings: Any) -> None:
    """Connect the processes, before they load a model.

    Raises:
        InputError: they disagree about the settings (JSON), such as rows or a seed.
    """
    if count() > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError(
                f"Expected {', '.join(missing)} beside WORLD_SIZE={count()}, found none; start the processes by torchrun, or unset "
                f"WORLD_SIZE."
            )
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())
        leave_at_exit()
        mine = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        found: list[Any] = [None] * count()
        torch.distributed.all_gather_object(found, mine)
        if len({*found}) > 1:
            others = [number for number, its in enumerate(found) if its != found[0]]
            raise InputError(
                f"Expected {count()} processes with the same data, task, recipe and seed, found others in process "
                f"{', '.join(map(str, others))}; start all with one command and the same files."
            )


def _connected() -> bool:
    if count() == 1:
        return False
    import torch

    return torch.distributed.is_initialized()


def leave_at_exit() -> None:
    """Leave the other processes before Python ends.

    Gloo's threads may still hold tensors then; freeing them in an interpreter that is being torn down aborts the process.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_first(work: Callable[[], T], together: bool = False) -> T:
    """What the first process finds, for all of them; the others wait, or work `together` with it, as processes with shares of a
    model must."""
    if not _connected():
        return work()
    import torch

    found: list[Any] = [work() if together or is_first() else None]
    torch.distributed.broadcast_object_list(found, 0)
    return found[0]


def dealt(rows: int, work: Callable[[list[int]], Sequence[T]], together: bool = False) -> list[T]:
    """What `work` finds for each row. Every process works on a part of them.

    Args:
        rows: their number.
        work: finds something for each of some rows, given as indices.
        together: every process works on all rows, as processes with shares of a model must.
    """
    if together or not _connected():
        return list(work([*range(rows)]))
    import torch

    mine = [*range(rows)][torch.distributed.get_rank() :: count()]
    parts: list[Any] = [None] * count()
    torch.distributed.all_gather_object(parts, list(work(mine)) if mine else [])
    return [parts[index % count()][index // count()] for index in range(rows)]


def add_up(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of each tensor over all processes, in one exchange. All have tensors of the same shapes, in the same order."""
    import torch

    flat = torch.cat([value.detach().float().reshape(-1) for value in values])
    torch.distributed.all_reduce(flat)
    sizes = [value.numel() for value in values]
    parts = zip(flat.split(sizes), values, strict=True)
    return [part.reshape(value.shape).to(value.dtype) for part, value in parts]


def add_up_gradients(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Add up the gradients of parameters, and some more values, of which it returns the sums.

    A gradient that no process has stays None.
    """
    import torch

    have = torch.tensor([float(one.grad is not None) for one in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    some, *rest = add_up([have, *gradients, *values])
    for parameter, has, gradient in zip(parameters, some.tolist(), rest, strict=False):
        parameter.grad = gradient if has else None
    return rest[len(parameters) :]
