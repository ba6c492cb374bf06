"""`python -m llama_corral.cli`."""

from . import main

main()
