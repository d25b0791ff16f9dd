"""Evaluation tasks, baselines, leak tests and the report."""
