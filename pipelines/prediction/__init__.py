"""What a plan will take: units, samples, bytes, hours, money."""
