"""`python -m kdkernels`: the same as the `kdkernels` command."""

from .cli import main

if __name__ == "__main__":
    main()
