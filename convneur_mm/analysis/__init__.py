"""Counting and timing of models, tables of both, and the paper's figures."""
