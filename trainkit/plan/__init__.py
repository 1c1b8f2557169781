"""Will it fit, how fast, what would fit: a run's memory and time before it runs, by tracing its real step."""
