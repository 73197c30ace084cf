"""Exact tests of the theory: expectations as sums over every trajectory of a small policy."""
