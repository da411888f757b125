"""Why a model is hard to compress: what its weight errors look like, and what a rank buys."""
