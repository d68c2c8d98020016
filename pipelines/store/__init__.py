"""The durable truth: stages, receipts and leases in a directory or a bucket."""
