"""Parts of `gpu_check`: its steps, what runs and ends them, the page and the command."""
