"""Checks what is in the wheel and the sdist of a folder: `python .ci/packed.py dist`.

The wheel has all of git's files under src/ia3, data files too. The sdist has the whole repository, so that the tests run in it and the
documentation can be built.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def in_git(folder: str) -> set[str]:
    names = subprocess.run(["git", "ls-files", "-z", folder], check=True, capture_output=True, text=True).stdout
    return {*names.split("\0")} - {""}


def compare(what: str, packed: set[str], expected: set[str]) -> None:
    if packed != expected:
        sys.exit(f"{what}: missing {sorted(expected - packed)}, too many {sorted(packed - expected)}")
    print(f"{what}: {len(packed)} files, as in git")


[wheel], [sdist] = Path(sys.argv[1]).glob("*.whl"), Path(sys.argv[1]).glob("*.tar.gz")
with zipfile.ZipFile(wheel) as opened:
    inside = {name for name in opened.namelist() if ".dist-info/" not in name}
compare("wheel", inside, {name.removeprefix("src/") for name in in_git("src/ia3")})
with tarfile.open(sdist) as archive:
    inside = {name.partition("/")[2] for name in archive.getnames()}
compare("sdist", inside - {"PKG-INFO"}, in_git("."))
