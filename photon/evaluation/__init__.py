"""Asks benchmarks' questions and scores the answers; `evaluate_hf.py` is the command.

questions     load_benchmark: a benchmark's files -> rows of one form
benchmarks/   one file a benchmark: its rows, its metric, its letter rule; its docstring shows how to add one
benchmark     Benchmark, the base class of them; BenchmarkError
records, row, scans    CSV and JSON records by line; one row; the files of scans in a folder
dealing       questions -> groups on the same scans -> ranks -> batches
models        a model that answers a batch: Photon, or a 2D model that gets axial slices (slices)
encoded_scans scans read ahead, encoded once, freed after their last question
run           a whole run: several processes, resumption; predictions, the file of its answers
scoring       score: all figures; measures, resampling, baselines, letters are its parts
comparison    two sets of predictions; swapping: other patients' scans; table: scores as markdown
"""
