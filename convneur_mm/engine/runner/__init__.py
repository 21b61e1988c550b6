"""The Runner of the tools: loops, optimizers, processes that are interrupted."""
