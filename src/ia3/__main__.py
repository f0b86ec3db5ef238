"""`python -m ia3`: the command line, for launchers that start a module (`torchrun --nproc_per_node 2 -m ia3 train …`)."""

from ia3.cli import main

if __name__ == "__main__":
    main()
