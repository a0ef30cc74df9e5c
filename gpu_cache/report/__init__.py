"""What a process tells of its cache."""
