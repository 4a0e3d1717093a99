"""What several test files and the coverage table share."""
