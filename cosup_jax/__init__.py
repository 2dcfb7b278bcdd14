"""Semiparametric token-sequence co-supervision (arXiv 2403.09024) in JAX."""

__version__ = "0.1.0"
