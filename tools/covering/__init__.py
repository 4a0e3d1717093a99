"""The parts of `coverage_table.py`: which classes, their tiny configurations, what is measured, the page."""
