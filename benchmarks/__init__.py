"""Side-by-side measurements, each one command: `python -m benchmarks.<name> [--json FILE]`.

Ours and the other side run interleaved in one process tree; what comes out are rows as
`benchmarks.report.Row` describes them.
"""
