"""What each of several processes does that agree once, and then do not."""

import os

from ia3.processes import connect, dealt, from_first


def main() -> None:
    connect({"seed": 0})
    assert dealt(5, lambda indices: [10 * index for index in indices]) == [0, 10, 20, 30, 40]
    assert dealt(1, lambda indices: indices) == [0]
    assert from_first(lambda: os.environ["RANK"]) == "0"
    try:
        connect({"seed": int(os.environ["RANK"])})
    except ValueError as error:
        print(error)
