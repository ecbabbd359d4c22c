"""Entry point of `python -m mimae`, which torchrun needs."""

from mimae.cli import main

main()
