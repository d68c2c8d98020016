"""What `evaluate` measures: a file a measurement, each a unit that publishes JSON and pictures."""
