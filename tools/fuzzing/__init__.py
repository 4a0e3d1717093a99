"""Parts of `fuzz_files.py` and `kill_runs.py`: what is read, how it is damaged, and processes to do it in."""
