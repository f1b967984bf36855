"""Measuring and showing: heatmaps and benchmarks. Part of the workshop: never shipped in an artifact."""
