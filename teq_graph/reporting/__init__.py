"""A report as a page: one HTML file that needs nothing else, and the short form that notebooks show."""
