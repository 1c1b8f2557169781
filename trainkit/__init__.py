"""trainkit: one command that trains, resumes, benchmarks and plans language and embedding models."""

__version__ = "0.1.0"
