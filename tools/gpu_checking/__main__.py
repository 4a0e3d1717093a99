"""`python -m gpu_checking`."""

from gpu_checking.command import main

main()
