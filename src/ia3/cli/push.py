"""`ia3 push`: upload an adapter's folder to the hub."""

from __future__ import annotations

import typer

from ia3.cli.common import AdapterArgument, JsonOption, console, print_json
from ia3.folder import AdapterFolder


def push(
    adapter: str = AdapterArgument,
    repository: str = typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False),
    private: bool = typer.Option(False, "--private", help="Make a new repository private."),
    revision: str | None = typer.Option(
        None, help="Branch to upload to; created if it does not exist. \\[default: main]", show_default=False
    ),
    message: str | None = typer.Option(
        None, help="Message of the commit. \\[default: Upload (IA)³ adapter]", show_default=False
    ),
    create_pr: bool = typer.Option(False, "--create-pr", help="Open a pull request instead of a commit."),
    license: str | None = typer.Option(
        None,
        help="Licence for the model card, by the hub's name, such as apache-2.0. \\[default: none]",
        show_default=False,
    ),
    language: str | None = typer.Option(
        None, help="Language of the texts for the model card, such as en. \\[default: none]", show_default=False
    ),
    json_output: bool = JsonOption,
) -> None:
    """Upload an adapter to the Hugging Face hub: vectors, task, recipe, heads, calibration, metrics and a model card.

    Then every command takes it from there: ia3 predict OWNER/NAME "some text", of any branch, tag or commit as OWNER/NAME@REVISION.

    Log in first (hf auth login), or set HF_TOKEN. The card has no texts of rows; task.yaml has the wording, and metrics.json a hash of
    each training row.
    """
    options = {"commit_message": message, "revision": revision, "create_pr": create_pr or None}
    given = {name: value for name, value in options.items() if value is not None}
    out = console(json_output)
    with out.status("Uploading …"):
        url = AdapterFolder(adapter).push_to_hub(
            repository, private=private or None, license=license, language=language, **given
        )
    if json_output:
        print_json({"repository": repository, "url": url})
        return
    out.print(f"{adapter} is at {url}", markup=False, soft_wrap=True)
    where = repository if revision is None else f"{repository}@{revision}"
    if not create_pr:
        out.print(f'Use it: ia3 predict {where} "some text"', markup=False, soft_wrap=True)
