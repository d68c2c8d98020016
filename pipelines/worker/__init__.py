"""What a worker does with one unit, and what it leaves behind."""
