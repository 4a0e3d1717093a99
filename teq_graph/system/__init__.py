"""Small helpers around the operating system: files, memory, signals, progress."""
