"""`python -m ia3.harness`: the command `lm_eval` with the model type `ia3`, for one adapter or many.

The harness finds no model types of other packages by itself, so this command makes `ia3` known and goes on as `lm_eval`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from ia3.errors import InputError
from ia3.harness.panel import names_of
from ia3.harness.running import own


def main() -> None:
    """Run `lm_eval` once, or once for each adapter of `--model_args adapters=…`; they share one base model."""
    try:
        # Makes the type known.
        from ia3.harness.model import sharing_panels

        given, known = sys.argv[1:], _known(sys.argv[1:])
        names = [*names_of(adapters)] if (adapters := _arguments(known.model_args).get("adapters")) else []
        if not names:
            _lm_eval(given)
            return
        with sharing_panels():
            for name in names:
                more = ["--model_args", json.dumps({"adapter": name})]
                for option in ("output_path", "use_cache"):
                    if (path := getattr(known, option)) is not None:
                        more += [f"--{option}", own(path, name)]
                _lm_eval([*given, *more])
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _known(given: Sequence[str]) -> argparse.Namespace:
    """The options of `lm_eval` that differ from adapter to adapter."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_args", "-a", nargs="+", default=[], action="extend")
    parser.add_argument("--output_path", "-o")
    parser.add_argument("--use_cache", "-c")
    return parser.parse_known_args(given)[0]


def _arguments(values: Sequence[str]) -> dict[str, Any]:
    """What `--model_args` says, as JSON or as `key=value` with commas between."""
    from lm_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {}
    for value in values:
        with contextlib.suppress(ValueError):  # `lm_eval` says what is wrong
            found |= json.loads(value) if value.lstrip().startswith("{") else simple_parse_args_string(value)
    return found


def _lm_eval(given: Sequence[str]) -> None:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.argv = ["lm_eval", *given]
    cli_evaluate()


if __name__ == "__main__":
    main()
