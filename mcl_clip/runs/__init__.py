"""A run: its phases in order, what each depends on, and what each does."""
