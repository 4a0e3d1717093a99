"""Graph passes, one per file, named by what they do."""
