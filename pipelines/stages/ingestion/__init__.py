"""The parts of ingest: lists, downloads, tars made elsewhere, rejects."""
