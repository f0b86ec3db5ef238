"""Files: find them on disk, on the hub or at an address, read them safely, replace them atomically."""

from ia3.files.atomic import TEMPORARY, alone, has_unfinished, new_folder, replacing
from ia3.files.formats import parse_bytes, parse_json, read_fields, read_json, reading, to_json, write_json
from ia3.files.hub import HUB_ARGUMENTS, hub_answers, hub_arguments, locate, locate_beside, upload
from ia3.files.remote import Mirror, cache_folder, fetch, is_address, opened, stamp
from ia3.files.saves import (
    CONFIG_NAME,
    PENDING,
    TORCH_WEIGHTS_NAME,
    WEIGHTS_NAME,
    current,
    is_unused,
    read_whole,
    replacing_adapter,
    take_over,
    version,
)

__all__ = [
    "CONFIG_NAME",
    "HUB_ARGUMENTS",
    "PENDING",
    "TEMPORARY",
    "TORCH_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "Mirror",
    "alone",
    "cache_folder",
    "current",
    "fetch",
    "has_unfinished",
    "hub_answers",
    "hub_arguments",
    "is_address",
    "is_unused",
    "locate",
    "locate_beside",
    "new_folder",
    "opened",
    "parse_bytes",
    "parse_json",
    "read_fields",
    "read_json",
    "read_whole",
    "reading",
    "replacing",
    "replacing_adapter",
    "stamp",
    "take_over",
    "to_json",
    "upload",
    "version",
    "write_json",
]
